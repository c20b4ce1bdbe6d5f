"""Does the benchmark run, train equal numbers of parameters, and compute the ratios that it prints?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from scripts import bench_step as bench
from scripts.benchmarks import methods
from sparse_zero.errors import InputError


@pytest.fixture(autouse=True)
def _threads() -> object:
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


HAS_PEFT = importlib.util.find_spec("peft") is not None
METHODS = [method for method in (*methods.METHODS, *methods.DELTA) if HAS_PEFT or method not in methods.PEFT]


# PEFT 0.21 reads an attribute that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
# Its SHiRA makes sparse tensors without saying whether they are to be checked.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_every_method_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "numbers.json", tmp_path / "plot.png"
    usual = ",".join(method for method in METHODS if method not in methods.DELTA)
    flags = ["--small", "--delta", "--no-memory", "--methods", usual, "--json", str(out), "--plot", str(plot)]
    assert bench.main(flags) == 0
    numbers = json.loads(out.read_text())
    rows = numbers["methods"]
    assert list(rows) == METHODS
    trained = {method: rows[method]["trained_parameters"] for method in METHODS}
    assert trained.pop("floor") == trained.pop("floor2") == 0
    assert trained.pop("full") == numbers["num_parameters"]
    same = 2 * 3 * 4 * 64  # 2 layers, q, k and v, 4 rows of 64
    for method in ("mixed", "mixed_delta"):
        assert 0.9 < trained.pop(method) / same <= 1.0, "each entry is owned once"
    for method in ("small_blocks", "small_blocks_delta"):
        assert trained.pop(method) == 2 * 3 * 32 * 64, "32 blocks of 8 x 8"
    if HAS_PEFT:
        assert trained.pop("dora") == same + 2 * 3 * 64, "and a magnitude for every output channel"
    assert set(trained.values()) == {same}
    assert all(len(seconds) == methods.SMALL.steps for seconds in numbers["step_seconds"].values())
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(method in printed for method in METHODS)
    assert "only 3 rounds" in printed


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    peaks = {method: bench.measure_memory(method, _larger()) for method in ("floor", "full", "rows")}
    parameters = 4 * 12 * 256**2
    # Full fine-tuning holds gradients and two moments of every parameter; rows hold those of a few.
    assert peaks["full"] - peaks["rows"] > 0.8 * 3 * 4 * parameters
    assert peaks["rows"] > 0


def _larger() -> methods.Settings:
    """Large enough to stand out from what the allocator keeps: 3 million parameters and more."""
    from dataclasses import replace

    return replace(methods.SMALL, hidden=256, layers=4, intermediate=682, vocab=256)


def _changed(method: str, settings: methods.Settings) -> tuple[dict[str, int], int]:
    """Entries of each parameter that five steps change, which must lower the loss, and the number said to be trained."""
    model = methods.build_models({method: methods.own_parameters(method)}, settings)[method]
    # The model is wrapped by some methods: by the end of their names, its tensors stay the same.
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ready = methods.prepare(method, model, settings)
    tokens = bench.batch_of(settings, 0)
    losses = [ready.step(tokens) for _ in range(5)]
    assert losses[-1] < losses[0]
    after = model.state_dict()
    return {name: int((after[name] != value).sum()) for name, value in before.items()}, ready.num_trained


@pytest.mark.parametrize("method", ["blocks", "rows", "columns", "mixed", "small_blocks", "copies"])
def test_steps_train_what_they_should(method: str) -> None:
    """A step lowers the loss and changes the selected share of q, k and v in place, nothing else."""
    changed, trained = _changed(method, methods.SMALL)
    assert {name.split(".")[-2] for name, number in changed.items() if number} == set(methods.MODULES)
    # What was written back before the last step: the copies come before a forward.
    assert 0.9 * trained < sum(changed.values()) <= trained


def test_masked_steps_leave_the_rest_as_it_was() -> None:
    settings = methods.SMALL
    model = bench.build_model(settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ready = methods.prepare("masked", model, settings)
    for _ in range(3):
        ready.step(bench.batch_of(settings, 0))
    after = model.state_dict()
    changed = sum(int((after[name] != value).sum()) for name, value in before.items() if name in after)
    assert 0.9 * ready.num_trained < changed <= ready.num_trained


def test_depth_leaves_the_lower_layers_out_and_trains_as_many() -> None:
    from dataclasses import replace

    settings = replace(methods.SMALL, depth_from=0.5, small_blocks=16)
    for method in ("rows", "blocks", "small_blocks"):
        changed, trained = _changed(method, settings)
        everywhere = methods.prepare(method, bench.build_model(settings), replace(settings, depth_from=0.0)).num_trained
        assert trained == everywhere
        assert {name.split(".")[2] for name, number in changed.items() if number} == {"1"}, "of layers 0 and 1"


def test_models_share_what_none_of_them_trains() -> None:
    models = methods.build_models(
        {"rows": methods.own_parameters("rows"), "full": methods.own_parameters("full")}, methods.SMALL
    )
    rows, full = (dict(models[method].named_parameters()) for method in ("rows", "full"))
    again = dict(
        methods.build_models({m: methods.own_parameters(m) for m in ("floor", "rows")}, methods.SMALL)[
            "rows"
        ].named_parameters()
    )
    for name, parameter in rows.items():
        assert parameter is not full[name]
        assert (parameter == full[name]).all()
        assert (parameter == again[name]).all()
    pair = methods.build_models(
        {"floor": methods.own_parameters("floor"), "rows": methods.own_parameters("rows")}, methods.SMALL
    )
    floor, rows = (dict(pair[method].named_parameters()) for method in ("floor", "rows"))
    own = {name.split(".")[-2] for name, parameter in rows.items() if parameter is not floor[name]}
    assert own == set(methods.MODULES)


def test_ratios() -> None:
    seconds = {"floor": [1.0, 3.0, 2.0], "rows": [2.0, 6.0, 3.0]}
    summary = bench.summarize(seconds, {"floor": 0, "rows": 7}, {"floor": 10, "rows": 15})
    over = summary["rows"].pop("over_floor")
    assert summary["rows"] == {
        "trained_parameters": 7,
        "median_seconds": 3.0,
        "min_seconds": 2.0,
        "memory_over_floor": 1.5,
        "peak_growth_bytes": 15,
    }
    # Of the same round: 2, 2 and 1.5.
    assert (over["median"], over["lower_quartile"], over["of_minima"]) == (2.0, 1.75, 2.0)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--methods", "rows,guess"]) == 2
    assert (
        capsys.readouterr().err.strip()
        == f"error: --methods has 'guess': choose from {', '.join(methods.METHODS + methods.DELTA)}"
    )
    with pytest.raises(InputError, match="--rows 6 of 64 entries"):
        methods.Settings(hidden=64, rows=6)
    with pytest.raises(InputError, match="--rows 12 is no divisor of --hidden 64"):
        methods.Settings(hidden=64, rows=12, block_size=8, layers=2)
    with pytest.raises(InputError, match=r"--depth-from 1.0 must be a share"):
        methods.Settings(depth_from=1.0)
    with pytest.raises(InputError, match=r"--depth-from 0.6 leaves 3 of 8 layers"):
        methods.Settings(depth_from=0.6)
    with pytest.raises(InputError, match="--small-blocks 300 of side 64 do not fit"):
        methods.Settings(small_blocks=300)
    assert bench.main(["--methods", "rows", "--plot", "x.png"]) == 2
    assert "add floor to --methods" in capsys.readouterr().err
    with pytest.raises(InputError, match="--clock is 'sun': choose from wall, cpu"):
        methods.Settings(clock="sun")
    with pytest.raises(InputError, match="adds up the time of 2 threads"):
        methods.Settings(clock="cpu", threads=2)
