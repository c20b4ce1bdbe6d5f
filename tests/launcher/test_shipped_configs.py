"""Does every YAML that is shipped hold, in itself and as the method that its name promises?"""

import dataclasses
from pathlib import Path

import pytest

from launcher.config import load_config, parse_config, resolved_yaml
from launcher.deepspeed_config import deepspeed_config
from launcher.plan.planned_run import Gpu, plan_run
from launcher.sweep.points import expand
from launcher.sweep.sweep_config import read_sweep
from launcher.yaml_files import merge, parse_yaml, read_mapping

CONFIGS = Path(__file__).parents[2] / "configs"
PAPERS = sorted((CONFIGS / "runs" / "papers").glob("*.yaml"))
RUNS = [*sorted((CONFIGS / "runs").glob("*.yaml")), *PAPERS]
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
# What a fragment of each folder may hold: nothing that another folder decides.
SECTIONS = {
    "models": {"model"},
    "methods": {"selection", "zero"},
    # What is asked of a model, and the data.
    "tasks": {"model", "data"},
    # A paper's schedule, batches and length.
    "training": {"data", "training", "checkpoint"},
    "clusters": {"cluster"},
}
FRAGMENTS = sorted(file for folder in SECTIONS for file in (CONFIGS / folder).glob("*.yaml"))


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_every_file_is_checked() -> None:
    # Studies are no runs: tests/scripts reads them.
    studies = {file for file in (CONFIGS / "studies").rglob("*.yaml") if file not in SWEEPS}
    others = {file for file in (*CONFIGS.rglob("*.yaml"), *CONFIGS.rglob("*.yml")) if file not in studies}
    assert {*RUNS, *FRAGMENTS, *SWEEPS} == others
    recipes = (
        "llama-2-7b-smt",
        "llama-2-7b-rocoft-rows",
        "llama-2-7b-rocoft-columns",
        "llama-2-13b-mixed",
        "llama-3-8b-smt",
    )
    expected = {f"{recipe}-{size}" for recipe in recipes for size in ("1x8", "2x8")}
    answers = {
        "llama-2-7b-smt-1x24gb",
        "llama-2-13b-smt-1x80gb",
        "llama-2-13b-mixed-8x24gb",
        "llama-3.1-70b-smt-8x80gb",
    }
    own = {run.stem for run in RUNS if run not in PAPERS}
    assert own == {*expected, *answers, "llama-2-13b-smt-nf4", "quickstart"}
    decoders = ("llama-2-7b", "llama-2-13b", "bloom-7b1")
    tasks, glue = ("commonsense", "math"), ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
    assert {run.stem for run in PAPERS} == {
        *(f"smt-{model}-{task}" for model in ("llama-2-7b", "llama-2-13b", "llama-3-8b") for task in tasks),
        *(f"rocoft-{kind}-{model}-{task}" for kind in ("rows", "columns") for model in decoders for task in tasks),
        *(f"rocoft-rows-roberta-{size}-{task}" for size in ("base", "large") for task in glue),
        *("diablo-llama-2-7b-commonsense", "diablo-llama-3-8b-commonsense", "diablo-llama-2-7b-gsm8k"),
    }


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_run_parses_and_its_resolved_form_is_the_same_run(path: Path) -> None:
    config = load_config(path)
    assert config.output.folder == f"runs/{path.stem}"
    assert parse_config(parse_yaml(resolved_yaml(config), "resolved")) == config


@pytest.mark.parametrize("path", SWEEPS, ids=name)
def test_every_point_of_a_sweep_is_a_run(path: Path) -> None:
    sweep, base = read_sweep(path, [])
    points = expand(sweep, base)
    assert sweep.folder == f"runs/{path.stem}"
    assert sweep.repeats
    for point in points:
        assert parse_config(parse_yaml(resolved_yaml(point.config), "resolved")) == point.config
        assert not Path(point.config.output.folder).is_absolute()


def test_study_of_depth() -> None:
    points = expand(*read_sweep(CONFIGS / "sweeps" / "depth.yaml", []))
    assert len(points) == 15
    depths = [(point.config.selection.min_depth, point.config.selection.depth_tradeoff) for point in points]
    assert set(depths) == {(0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (0.0, 1.0)}
    # What is trained competes for one budget: every point has as many parameters.
    assert all(region.per_matrix is None for point in points for region in point.config.selection.regions)
    assert {point.config.selection.budget.fraction for point in points if point.config.selection.budget} == {0.01}


def test_quick_sweep() -> None:
    points = expand(*read_sweep(CONFIGS / "sweeps" / "quick.yaml", []))
    # Three methods, three learning rates, two seeds, but for one pair.
    assert len(points) == 3 * 3 * 2 - 2
    kinds = {point.settings["method"]: {region.kind for region in point.config.selection.regions} for point in points}
    assert kinds == {"mixed": {"block", "row", "column"}, "rows": {"row"}, "columns": {"column"}}
    assert {point.config.selection.budget is None for point in points} == {True, False}


@pytest.mark.parametrize("path", FRAGMENTS, ids=name)
def test_fragment_completes_the_quickstart(path: Path) -> None:
    fragment = read_mapping(path)
    assert set(fragment) <= SECTIONS[path.parent.name]
    mapping = read_mapping(CONFIGS / "runs" / "quickstart.yaml")
    # A method replaces the selection as a whole: its budget may be of the other form.
    mapping.update({key: value for key, value in fragment.items() if key == "selection"})
    if path.parent.name == "tasks":  # So does a task with the data.
        mapping.update(data=fragment["data"], output={**mapping["output"], "evaluate": "test" in fragment["data"]})
    if path.parent.name == "training":  # How long is the task's, where the paper has one number for each.
        mapping.update(training={} if "epochs" in fragment["training"] else {"steps": 1})
    parse_config(merge(mapping, fragment))


@pytest.mark.parametrize("path", [run for run in RUNS if run.stem.endswith("x8")], ids=name)
def test_large_run(path: Path) -> None:
    config = load_config(path)
    nodes = int(path.stem.rpartition("-")[2].partition("x")[0])
    assert (config.cluster.num_nodes, config.cluster.ranks_per_node) == (nodes, 8)
    assert config.training.precision == "bf16"
    assert config.model.dtype == "bfloat16"
    assert config.training.gradient_checkpointing
    settings = deepspeed_config(config, nodes * 8)
    # No rank computes on padding: the global batch divides.
    assert settings["train_batch_size"] == config.training.global_batch_size
    assert settings["zero_optimization"]["stage"] == 2
    assert config.zero.placement == "inplace"


@pytest.mark.parametrize("path", [run for run in RUNS if run.stem.endswith("gb")], ids=name)
def test_a_run_named_after_its_gpus_fits_on_them(path: Path) -> None:
    gpus, _, gib = path.stem.rpartition("-")[2].removesuffix("gb").partition("x")
    config = load_config(path)
    assert (config.cluster.num_nodes, config.cluster.ranks_per_node) == (1, int(gpus))
    assert (config.training.precision, config.model.dtype) == ("bf16", "bfloat16")
    settings = deepspeed_config(config, int(gpus))
    # No rank computes on padding.
    assert settings["train_batch_size"] == config.training.global_batch_size
    run, gpu = plan_run(config, int(gpus)), Gpu(gib=float(gib))
    assert run.fits(gpu), f"{run.needed_bytes:,} of {gpu.usable_bytes:,}"
    # Calibration takes no more than training, but for what stage 3 gathers.
    peaks = {phase: run.forecast.peak(phase).num_bytes() for phase in run.forecast.phases()}
    assert peaks["calibration"] <= 1.01 * max(peaks["forward"], peaks["backward"])


@pytest.mark.parametrize("path", [run for run in RUNS if run.stem.endswith("-1x8")], ids=name)
def test_two_nodes_train_the_same_as_one(path: Path) -> None:
    one, two = load_config(path), load_config(path.with_name(path.name.replace("1x8", "2x8")))
    assert (one.model, one.data, one.zero) == (two.model, two.data, two.zero)
    # The same samples for the scores, which add up over micro-batches.
    samples = {run.selection.calibration_batches * run.selection.calibration_batch_size for run in (one, two)}
    assert len(samples) == 1
    size = one.selection.calibration_batch_size
    batches = one.selection.calibration_batches
    selection = dataclasses.replace(two.selection, calibration_batch_size=size, calibration_batches=batches)
    assert one.selection == selection
    assert one.training.global_batch_size == two.training.global_batch_size
    assert one.training.learning_rate == two.training.learning_rate


def test_quantized_run() -> None:
    config = load_config(CONFIGS / "runs" / "llama-2-13b-smt-nf4.yaml")
    assert (config.model.quantization, config.model.double_quantization, config.model.dtype) == (
        "nf4",
        True,
        "bfloat16",
    )
    assert (config.zero.placement, config.zero.stage, config.training.precision) == ("delta", 2, "bf16")
    assert (config.cluster.num_nodes, config.cluster.ranks_per_node) == (1, 1)
    settings = deepspeed_config(config, 1)
    assert settings["train_batch_size"] == config.training.global_batch_size


def test_recipes_of_the_papers() -> None:
    smt = load_config(CONFIGS / "runs" / "llama-2-7b-smt-1x8.yaml")
    (blocks,) = smt.selection.regions
    assert (blocks.kind, blocks.block_size, blocks.modules) == ("block", 256, ("*.self_attn.{q,k,v}_proj",))
    assert smt.selection.score == "abs_of_mean"
    assert smt.selection.budget is not None
    assert smt.selection.budget.fraction == 0.0084
    assert (smt.training.epochs, smt.data.max_length) == (3, 2048)
    assert 9.65e-6 <= smt.training.learning_rate <= 1e-4

    llama3 = load_config(CONFIGS / "runs" / "llama-3-8b-smt-1x8.yaml")
    assert llama3.selection.budget is not None
    assert llama3.selection.budget.fraction == 0.0071

    for kind in ("row", "column"):
        rocoft = load_config(CONFIGS / "runs" / f"llama-2-7b-rocoft-{kind}s-1x8.yaml")
        (region,) = rocoft.selection.regions
        assert region.kind == kind
        assert region.per_matrix in (1, 2, 3)
        assert not rocoft.selection.needs_data
        assert 1e-3 <= rocoft.training.learning_rate <= 2e-3

    for run in ("llama-2-13b-mixed-1x8", "quickstart"):
        mixed = load_config(CONFIGS / "runs" / f"{run}.yaml")
        assert {region.kind for region in mixed.selection.regions} == {"block", "row", "column"}


@pytest.mark.parametrize("path", PAPERS, ids=name)
def test_recipes_of_the_papers_folder(path: Path) -> None:
    """What the authors' repositories say, as far as it is the same for all of a method's recipes."""
    config = load_config(path)
    training, selection = config.training, config.selection
    ranks = config.cluster.num_nodes * (config.cluster.ranks_per_node or 1)
    assert deepspeed_config(config, ranks)["train_batch_size"] == training.global_batch_size
    # A family whose samples would read one another in a packed row is among them.
    assert config.data.batching == "pad"
    method = path.stem.partition("-")[0]
    if method == "smt":
        assert (training.epochs, training.global_batch_size, training.learning_rate) == (3, 64, 9.65e-6)
        assert (training.beta1, training.beta2, training.warmup_fraction) == (0.9, 0.95, 0.0)
        assert selection.calibration_batches * selection.calibration_batch_size == 100 * 64
        assert selection.budget is not None
        assert selection.budget.fraction == (0.0071 if "llama-3" in path.stem else 0.0084)
    elif method == "diablo":
        (region,) = selection.regions
        assert (region.blocks_per_side, region.per_matrix, selection.score) == (64, 64, "diagonal")
        assert training.learning_rate == (5e-4 if "gsm8k" in path.stem else 2.5e-4)
    else:
        assert selection.score == "first"
        assert selection.regions[0].per_matrix == 3
        assert (training.schedule, config.data.template) == ("cosine", "alpaca")


def test_rows_and_columns_of_the_papers_folder_differ_in_that_alone() -> None:
    for rows in (run for run in PAPERS if run.stem.startswith("rocoft-rows") and "roberta" not in run.stem):
        changes = ["--selection.regions.0.kind=column", f"--output.folder=runs/{rows.stem.replace('rows', 'columns')}"]
        assert load_config(rows, changes) == load_config(rows.with_name(rows.name.replace("rows", "columns")))
    methods = CONFIGS / "methods"
    mapping = read_mapping(methods / "rocoft-rows-roberta.yaml")
    mapping["selection"]["regions"][0]["kind"] = "column"
    assert mapping == read_mapping(methods / "rocoft-columns-roberta.yaml")
