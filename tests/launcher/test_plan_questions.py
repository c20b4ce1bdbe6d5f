"""Does `sparse-zero plan` find what fits, and does what it finds fit?"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.__main__ import main
from launcher.commands import plan as command
from launcher.config import load_config
from launcher.plan.answers import about
from launcher.plan.comparisons import compared, models_that_fit
from launcher.plan.defaults import PLAN_METHODS, SELECTIONS, default_run, described, peer_changes
from launcher.plan.options import dimensions
from launcher.plan.planned_run import SAFE_SHARE, Gpu, PlannedRun, plan_run
from launcher.plan.questions import (
    QUESTIONS,
    at_stage,
    fewest,
    gpus_needed,
    largest_batch,
    largest_budget,
    largest_length,
)
from launcher.plan.settings import judge, possible, settings_that_fit
from models.known_shapes import KNOWN_SHAPES
from sparse_zero.errors import InputError
from sparse_zero.memory.closed_form.forecast import forecast_memory

METHODS = Path(__file__).parents[2] / "configs" / "methods"


def planned(method: str = "smt", model: str = "tinyllama-1.1b", ranks: int = 1, *overrides: str) -> PlannedRun:
    config = default_run(model, method, overrides)
    return plan_run(config, ranks, **peer_changes(method, str(described(model)["model_type"])))


@pytest.fixture(scope="module")
def smt() -> PlannedRun:
    return planned()


def gpu_with(num_bytes: float) -> Gpu:
    """One on which a rank that needs so many bytes just fits."""
    found = Gpu(gib=(num_bytes + 1) / (SAFE_SHARE * 2**30))
    assert abs(found.usable_bytes - num_bytes) <= 2
    return found


def test_recipes_are_those_of_the_configs() -> None:
    assert set(SELECTIONS) <= set(PLAN_METHODS)
    for name, selection in SELECTIONS.items():
        shipped = yaml.safe_load((METHODS / f"{name}.yaml").read_text())
        assert shipped["selection"] == json.loads(json.dumps(selection)), name
        assert shipped["zero"] == {"stage": 2, "placement": "inplace"}


def test_the_command_offers_what_there_is() -> None:
    assert command._METHODS == PLAN_METHODS
    assert command._QUESTIONS == QUESTIONS


def test_calibration_reads_as_many_samples_as_the_recipe() -> None:
    chosen = default_run("tinyllama-1.1b", "smt").selection
    assert (chosen.calibration_batches, chosen.calibration_batch_size) == (1600, 1)
    chosen = default_run("tinyllama-1.1b", "smt", ("--training.micro_batch_size=8",)).selection
    assert (chosen.calibration_batches, chosen.calibration_batch_size) == (200, 8)
    chosen = default_run("tinyllama-1.1b", "smt", ("--selection.calibration_batch_size=2",)).selection
    assert chosen.calibration_batch_size == 2


@pytest.mark.parametrize("method", ["smt", "full", "lora", "qlora"])
def test_more_ranks_never_need_more_of_each(method: str) -> None:
    run = planned(method)
    for stage in (0, 1, 2, 3):
        # The second micro-batch of a step holds gradients of the first: as many on any number of ranks.
        staged = at_stage(run, stage).but(accumulation=2)
        peaks = [staged.but(world_size=ranks).peak_bytes for ranks in (2, 8, 1024)]
        assert peaks == sorted(peaks, reverse=True), stage


def test_as_many_gpus_as_are_needed_and_no_fewer(smt: PlannedRun) -> None:
    full = planned("full")
    gpu = gpu_with(0.4 * full.needed_bytes)
    found = gpus_needed(full, gpu)
    assert [each.stage for each in found] == [0, 1, 2, 3]
    for each in found:
        if each.num_gpus is None:
            assert not each.run.fits(gpu)
        else:
            assert each.run.world_size == each.num_gpus
            assert each.run.fits(gpu)
            assert each.num_gpus == 1 or not each.run.but(world_size=each.num_gpus - 1).fits(gpu)
    best = fewest(found)
    assert best is not None
    assert best.num_gpus is not None
    assert best.num_gpus > 1
    one = fewest(gpus_needed(smt, gpu_with(smt.needed_bytes)))
    assert one is not None
    assert one.num_gpus == 1
    assert fewest(gpus_needed(full, gpu_with(2**20))) is None


@pytest.mark.parametrize(
    ("search", "field", "step"), [(largest_batch, "micro_batch", 1), (largest_length, "length", 1)]
)
def test_the_largest_fits_and_the_next_does_not(smt: PlannedRun, search: Any, field: str, step: int) -> None:
    gpu = gpu_with(3 * smt.needed_bytes)
    found = search(smt, gpu)
    assert found.value > getattr(smt.job, field)
    assert getattr(found.run.job, field) == found.value
    assert found.run.fits(gpu)
    assert found.above == found.value + step
    assert not smt.but(**{field: found.above}).fits(gpu)
    nothing = search(smt, gpu_with(2**20))
    assert nothing.value is None
    assert nothing.above_run is not None


def test_the_largest_batch_is_one_that_the_run_accepts(smt: PlannedRun) -> None:
    found = largest_batch(smt, gpu_with(1000 * smt.needed_bytes))
    assert found.value == smt.config.training.global_batch_size
    assert found.above is None
    answer = about(smt, "smt", gpu=gpu_with(1000 * smt.needed_bytes), name="any", find="batch")
    assert answer.shown[-1] == "A micro-batch is no larger than training.global_batch_size, which is 16."


@pytest.mark.parametrize("method", ["mixed", "rocoft-rows", "diablo", "lora"])
def test_the_largest_budget_fits(method: str) -> None:
    run = planned(method)
    gpu = gpu_with(1.15 * run.needed_bytes)
    found = largest_budget(run, gpu)
    assert found.value is not None
    assert found.run.fits(gpu)
    assert found.run.num_trained > run.num_trained
    assert found.above_run is not None
    assert not found.above_run.fits(gpu)
    assert found.above_run.num_trained > found.run.num_trained


def test_every_layout_that_is_shown_fits_and_the_order_is_by_speed(smt: PlannedRun) -> None:
    run = smt.but(world_size=8)
    everything = [each.job for each in possible(run)]
    assert len(everything) == len(set(map(repr, everything)))
    assert {(job.stage, job.placement) for job in everything} == {
        (stage, placement) for stage in (0, 1, 2, 3) for placement in ("inplace", "delta")
    }
    assert all(job.stage == 3 or job.offload_base == "none" for job in everything)
    gpu = gpu_with(run.needed_bytes)
    settings, least = settings_that_fit(run, gpu)
    assert settings
    assert all(each.run.fits(gpu) for each in settings)
    assert [each.seconds for each in settings] == pytest.approx(sorted(each.seconds for each in settings), abs=1e-4)
    assert least.run.needed_bytes == min(each.run.needed_bytes for each in settings)
    # Recomputation and gathering the base cost.
    plain = run.but(stage=2, gradient_checkpointing=False)
    assert judge(plain).seconds < judge(plain.but(gradient_checkpointing=True)).seconds
    assert (
        judge(plain).seconds < judge(plain.but(stage=3)).seconds < judge(plain.but(stage=3, offload_base="cpu")).seconds
    )
    assert judge(plain.but(stage=3)).wire_bytes > 10 * judge(plain).wire_bytes


def test_peers_stand_beside_a_run(smt: PlannedRun) -> None:
    gpu = gpu_with(1.2 * smt.needed_bytes)
    found = compared(smt, "smt", gpu)
    assert [each.name for each in found] == ["smt", "full", "lora", "dora", "qlora"]
    peaks = {each.name: each.run.peak_bytes for each in found}
    assert peaks["smt"] < peaks["full"]
    assert peaks["qlora"] < peaks["lora"] <= peaks["dora"] < peaks["full"]
    trained = {each.name: each.run.num_trained for each in found}
    assert trained["full"] == smt.shapes.shape.num_parameters
    assert trained["lora"] < trained["dora"]
    gpus = {each.name: each.gpus.num_gpus for each in found}
    assert gpus["smt"] == 1
    assert gpus["full"] > 1


def test_the_largest_model_that_fits_comes_first() -> None:
    gpu = Gpu(gib=24)
    names = ("llama-2-70b", "llama-2-13b", "llama-2-7b", "smollm2-135m")
    found = models_that_fit("smt", 1, gpu, models=[shape for shape in KNOWN_SHAPES if shape.name in names])
    assert [(each.name, each.fits) for each in found] == list(zip(names, (False, False, True, True), strict=True))
    for each in found:
        assert each.run is not None
        assert each.run.fits(gpu) == each.fits


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("bloom-7b1", "mixed"),
        ("bloom-7b1", "diablo"),
        ("bloom-7b1", "lora"),
        ("mixtral-8x7b", "qlora"),
        pytest.param("mixtral-8x7b", "mixed", marks=pytest.mark.slow),
        ("smollm2-135m", "smt"),
    ],
)
def test_other_families_have_recipes_too(model: str, method: str) -> None:
    run = planned(method, model)
    assert 0 < run.num_trained <= run.shapes.shape.num_parameters
    assert run.peak_bytes > 0


def test_packing_is_planned_and_offered_only_where_a_run_takes_it() -> None:
    with pytest.raises(InputError, match="but packed samples of bloom models"):
        planned("smt", "bloom-7b1", 1, "--data.batching=pack")
    run = planned()
    assert run.config.data.batching == "pad"

    def offered(can_pack: bool) -> bool:
        found = dimensions(run.config, 1, False, can_pack=can_pack)
        return any("--data.batching=pack" in option.overrides for options in found for option in options)

    assert offered(True)
    assert not offered(False)


def test_an_answer_is_the_forecast_of_its_config(smt: PlannedRun) -> None:
    gpu = gpu_with(smt.needed_bytes)
    found = about(smt, "smt", gpu=gpu, name="tiny").found
    again = forecast_memory(smt.shapes.shape, smt.job, smt.selection, shared_inputs=smt.shapes.module_map.shared_inputs)
    assert found["phases"] == again.to_json()
    assert found["fits"] is True
    assert about(smt, "smt", gpu=gpu_with(0.8 * smt.needed_bytes), name="tiny").found["fits"] is False


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "plan.json"


def test_a_run_is_planned_by_names_alone(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "tinyllama-1.1b", "--method", "rocoft-rows", "--ranks", "8", "--gpu-memory"]
    assert main([*arguments, "24", "--json", str(out), "--plot", "plan.png", "--data.max_length=512"]) == 0
    found = json.loads(out.read_text())
    assert (found["world_size"], found["micro_batch"], found["stage"]) == (8, [1, 512], 2)
    assert found["parameters"] == 1_100_048_384
    assert found["peak_bytes"] == max(row["peak_bytes"] for row in found["phases"].values())
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert "fits into 98% of 24 GiB" in said.out
    assert all(len(line.rstrip()) <= 110 for line in said.out.splitlines())
    assert not said.err
    # Too small, and what would do.
    assert main([*arguments, "2", "--json", str(out)]) == 1
    assert json.loads(out.read_text())["fits"] is False
    said = capsys.readouterr()
    assert "does not fit" in said.out
    for change in json.loads(out.read_text())["changes"]:
        assert " ".join(change["overrides"]) in " ".join(said.out.split())


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_have_answers_on_the_terminal_and_in_json(
    question: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--model", "tinyllama-1.1b", "--ranks", "4", "--gpu-memory", "16", "--find", question]
    assert main([*arguments, *(["--compare"] if question == "batch" else []), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    key = {"gpus": "gpus", "stage": "settings"}.get(question, "largest")
    assert found[key]
    said = capsys.readouterr().out
    assert {"gpus": "GPUs of 16 GiB", "stage": "the fastest first"}.get(question, "that fits is") in said
    if question == "batch":
        assert [row["method"] for row in found["compare"]] == ["smt", "full", "lora", "dora", "qlora"]
        assert "qlora" in said
    assert all(len(line.rstrip()) <= 110 for line in said.splitlines())


def test_a_config_is_planned_by_another_method(out: Path) -> None:
    runs = METHODS.parent / "runs"
    config = str(runs / "llama-2-7b-smt-1x8.yaml")
    trained = {}
    for method in (None, "rocoft-rows", "lora"):
        more = [] if method is None else ["--method", method]
        assert main(["plan", "--config", config, *more, "--json", str(out)]) == 0
        found = json.loads(out.read_text())
        assert found["world_size"] == 8
        assert found["micro_batch"] == [2, 2048]
        trained[method] = found["trained"]
    assert trained["rocoft-rows"] < trained["lora"] < trained[None]


@pytest.mark.slow
def test_what_fits_is_asked_of_all_models(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--fits", "--method", "rocoft-columns", "--gpu-memory", "24", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["largest"] == next(row["model"] for row in found["models"] if row["fits"])
    assert f"The largest that fits is {found['largest']}." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config and --model are both missing"),
        (["--model", "llama-2-7b", "--config", "run.yaml"], "--config and --model are both given"),
        (["--model", "lama-2-7b"], "did you mean llama-2-7b?"),
        (["--model", "llama-2-7b", "--ranks", "0"], "--ranks is 0"),
        (["--model", "llama-2-7b", "--gpu-memory", "-1"], "--gpu-memory is -1"),
        (["--model", "llama-2-7b", "--gpu-memory", "nan"], "--gpu-memory is nan"),
        (["--model", "llama-2-7b", "--find", "gpus"], "--find gpus needs --gpu-memory"),
        (["--model", "llama-2-7b", "--find", "money"], "--find"),
        (["--model", "llama-2-7b", "--method", "sgd"], "--method"),
        (["--model", "llama-2-7b", "--lora-rank", "0"], "--lora-rank is 0"),
        (["--model", "llama-2-7b", "--lora-rank", "8"], "--lora-rank is 8 with no --method"),
        (["--model", "llama-2-7b", "--method", "smt", "--lora-rank", "8"], "--lora-rank is 8 with --method smt"),
        (
            ["--model", "llama-2-7b", "--method", "lora", "--lora-rank", "99999"],
            "--lora-rank is 99999, and of llama-2-7b",
        ),
        (["--model", "llama-2-7b", "--compare", "--lora-rank", "99999"], "no adapted matrix is above 4096"),
        (["--model", "llama-2-7b", "--plot", "plan.pdf"], "--plot is plan.pdf"),
        (["--model", "llama-2-7b", "--json", "."], "--json is ., which is a folder"),
        (["--model", "llama-2-7b", "--data.max_lenght=3"], "did you mean data.max_length?"),
        (["--model", "llama-2-7b", "--simulate", "--gpu-memory", "8", "--find", "batch"], "--simulate with --find"),
        (["--fits", "--model", "llama-2-7b"], "--fits and --model are both given"),
        (["--fits"], "--fits needs --gpu-memory"),
        (["--model", "tinyllama-1.1b", "--method", "full", "--gpu-memory", "8", "--find", "budget"], "method full"),
    ],
)
def test_wrong_input_ends_in_one_line(
    arguments: list[str], message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert not said.out


def test_a_budget_from_a_file_is_not_searched(smt: PlannedRun) -> None:
    run = plan_run(load_config(METHODS.parent / "runs" / "llama-2-7b-smt-1x8.yaml"), 8)
    changed = run.but(selection=type(run.config.selection)(file="selection.safetensors"))
    with pytest.raises(InputError, match=r"selection\.file is selection\.safetensors"):
        largest_budget(changed, Gpu(gib=80))
