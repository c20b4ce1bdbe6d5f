"""Does a grid become the runs that it says, under names that stay, and is what makes no sense refused?"""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config import resolved_yaml
from launcher.sweep.array_script import array_of_points
from launcher.sweep.points import combinations, expand, find_config, name_of
from launcher.sweep.sweep_config import MAX_POINTS, SweepConfig, read_sweep
from launcher.sweep.sweep_folder import SweepFolder, check_folders, find_listed, list_points, read_list, write_list
from launcher.yaml_files import dump_yaml
from sparse_zero.errors import InputError
from tests.launcher.test_bad_input import run_mapping


def sweep(grid: dict[str, Any], **others: Any) -> SweepConfig:
    return SweepConfig(folder="out", grid=grid, **others)


def names(grid: dict[str, Any], **others: Any) -> list[str]:
    return [point.name for point in expand(sweep(grid, **others), run_mapping())]


def test_the_last_key_changes_fastest_and_every_point_has_its_settings() -> None:
    points = expand(sweep({"training.learning_rate": [1e-3, 3e-4], "training.seed": [0, 1]}), run_mapping())
    assert [point.name for point in points] == [
        "learning_rate=0.001,seed=0",
        "learning_rate=0.001,seed=1",
        "learning_rate=0.0003,seed=0",
        "learning_rate=0.0003,seed=1",
    ]
    assert [(point.config.training.learning_rate, point.config.training.seed) for point in points] == [
        (1e-3, 0), (1e-3, 1), (3e-4, 0), (3e-4, 1),
    ]  # fmt: skip
    assert [point.config.output.folder for point in points] == [f"out/{point.name}" for point in points]


def test_a_choice_removes_merges_and_sets_in_this_order_and_a_key_of_the_grid_has_the_last_word(tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    method = {"selection": {"regions": [{"kind": "row", "modules": ["*.up_proj"], "per_matrix": 3}], "score": "first"}}
    (tmp_path / "methods" / "rows.yaml").write_text(dump_yaml(method))
    grid = {
        "method": {
            "base": {},
            "rows": {
                "without": ["selection"],
                "extends": "methods/rows.yaml",
                "training": {"learning_rate": 0.5},
                "selection.regions.0.per_matrix": 2,
                "training.seed": 9,
            },
        },
        "training.seed": [4],
    }
    (tmp_path / "run.yaml").write_text(dump_yaml({**run_mapping(), "sweep": {"folder": "out", "grid": grid}}))
    (tmp_path / "above").mkdir()
    # Files start at the folder of the file that names them, also where another one extends that.
    (tmp_path / "above" / "mine.yaml").write_text("extends: ../run.yaml\n")
    for file in ("run.yaml", "above/mine.yaml"):
        points = expand(*read_sweep(tmp_path / file, []))
        base, rows = (point.config for point in points)
        assert [point.name for point in points] == ["method=base,seed=4", "method=rows,seed=4"]
        assert base.selection.budget is not None
        assert rows.selection.budget is None
        (region,) = rows.selection.regions
        assert (region.kind, region.per_matrix, rows.selection.score) == ("row", 2, "first")
        assert (rows.training.learning_rate, rows.training.steps, rows.training.seed) == (0.5, 2, 4)


def test_what_a_point_changes_does_not_reach_the_next_one() -> None:
    grid = {"a": {"one": {"selection.regions.0.block_size": 32}, "two": {}}, "b": {"x": {"training.seed": 1}, "y": {}}}
    sizes = [point.config.selection.regions[0].block_size for point in expand(sweep(grid), run_mapping())]
    assert sizes == [32, 32, 64, 64]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ([{"training.seed": 0}], ["a=p,seed=1", "a=q,seed=1"]),
        ([{"a": "p", "training.seed": 0}], ["a=p,seed=1", "a=q,seed=0", "a=q,seed=1"]),
        ([{"a": ["p", "q"], "training.seed": 0}], ["a=p,seed=1", "a=q,seed=1"]),
        ([{"a": "p"}, {"training.seed": 1}], ["a=q,seed=0"]),
    ],
)
def test_exclusions(exclude: list[dict[str, Any]], left: list[str]) -> None:
    grid = {"a": {"p": {}, "q": {"training.learning_rate": 0.5}}, "training.seed": [0, 1]}
    assert names(grid, exclude=tuple(exclude)) == left


def test_a_list_may_be_a_value() -> None:
    grid = {"selection.regions.0.modules": [["*.q_proj"], ["*.q_proj", "*.k_proj"]]}
    points = expand(sweep(grid, exclude=({"selection.regions.0.modules": ["*.q_proj"]},)), run_mapping())
    assert [point.config.selection.regions[0].modules for point in points] == [("*.q_proj", "*.k_proj")]
    assert len(expand(sweep(grid), run_mapping())) == 2


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=60),
    st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=3),
    st.sampled_from(["none", "true", "1", "0.1", "a/b", "../x", "a,b=c", "~x", "x\n", "$(x)", "1~a", "é"]),
)  # fmt: skip


@given(st.lists(VALUES, min_size=1, max_size=12, unique_by=lambda value: f"{type(value)}{value!r}"), st.data())
def test_names_are_unique_safe_and_stay_when_values_are_appended(values: list[Any], data: st.DataObject) -> None:
    known = data.draw(st.integers(1, len(values)))
    grid = {"data.train": values, "training.seed": [0, 1]}
    found = [name_of(settings) for settings in combinations(sweep(grid))]
    assert len(set(found)) == len(found) == 2 * len(values)
    for name in found:
        assert re.fullmatch(r"train=[\w.+~-]+,seed=[01]", name, re.ASCII)
        assert len(name) < 130
    # The first points are the same ones, in the same order.
    fewer = [name_of(settings) for settings in combinations(sweep({**grid, "data.train": values[:known]}))]
    assert found[: 2 * known] == fewer


def test_values_that_print_the_same_have_two_names() -> None:
    first, second, third = (name_of({"data.train": value}) for value in (["a b"], "['a b']", '["a b"]'))
    assert len({first, second, third}) == 3
    assert (name_of({"x.y": 1}), name_of({"x.y": None})) == ("y=1", "y=none")
    assert len({name_of({"x.y": value}) for value in (1, "1", True, "true", None, "none", "null", 1.0)}) == 8


def test_long_names_are_cut_and_differ() -> None:
    settings = {f"section.a_rather_long_key_{number}": "v" * 30 for number in range(6)}
    other = {**settings, "section.a_rather_long_key_5": "w"}
    assert len(name_of(settings)) <= 120
    assert name_of(settings) != name_of(other)


def test_keys_are_as_long_as_tells_them_apart() -> None:
    assert name_of({"training.seed": 1, "selection.seed": 2, "zero.stage": 3}) == (
        "training.seed=1,selection.seed=2,stage=3"
    )


MANY = {"training.seed": list(range(100)), "training.learning_rate": [0.1 * n for n in range(1, 51)]}
BAD_GRIDS = [
    ({}, {}, ["sweep.grid is empty"]),
    ({"training.seed": []}, {}, ["sweep.grid.training.seed is empty"]),
    ({"training.seed": 3}, {}, ["sweep.grid.training.seed is 3", "a list of values"]),
    ({"training.seed": [1, 1]}, {}, ["sweep.grid.training.seed has 1 twice"]),
    ({"seed": [1]}, {}, ["sweep.grid.seed is a list", "training.seed"]),
    ({"training.": [1]}, {}, ["'training.'", "section.key"]),
    ({"training.seed": {"a": {}}}, {}, ["sweep.grid.training.seed has named choices", "another name"]),
    ({"state": {"a": {}}}, {}, ["'state' is the name of a column"]),
    ({"a": {"b": 1}}, {}, ["sweep.grid.a.b is 1", "mapping"]),
    ({"a": {"b": {"seed": 1}}}, {}, ["sweep.grid.a.b.seed is 1", "training.seed"]),
    ({"a": {"b": {"without": "selection"}}}, {}, ["sweep.grid.a.b.without is 'selection'", "a list"]),
    ({"a": {"b": {"without": ["data.tests"]}}}, {}, ["sweep.grid.a.b.without has data.tests", "take it out"]),
    ({"a": {"b": {"extends": 3}}}, {}, ["extends is 3 in sweep.grid.a.b"]),
    ({"a": {"b": {"extends": "gone.yaml"}}}, {}, ["gone.yaml does not exist"]),
    ({"output.folder": ["a"]}, {}, ["output.folder", "take it out"]),
    ({"sweep.folder": ["a"]}, {}, ["sweep.folder", "does not change itself"]),
    (MANY, {}, ["sweep.grid has 5,000 points", f"{MAX_POINTS:,}"]),
    ({"training.seed": [0]}, {"exclude": ({},)}, ["sweep.exclude.0 is empty"]),
    ({"training.seed": [0]}, {"exclude": ({"seed": 0},)}, ["sweep.exclude.0", "'seed'", "training.seed"]),
    ({"training.seed": [0]}, {"exclude": ({"training.seed": 1},)}, ["sweep.exclude.0.training.seed is 1", "it has 0"]),
    ({"training.seed": [0]}, {"exclude": ({"training.seed": 0},)}, ["sweep.exclude leaves no point"]),
    ({"training.seed": [0]}, {"repeat_over": ("seed",)}, ["sweep.repeat_over has 'seed'"]),
    # What a point is.
    ({"training.seed": [0, -1]}, {}, ["the point seed=-1 of the sweep", "training.seed is -1"]),
    ({"training.sed": [0, 1]}, {}, ["the point sed=0 of the sweep", "unknown key training.sed", "training.seed?"]),
    ({"zero.stage": [2, 7]}, {}, ["the point stage=7 of the sweep", "zero.stage is 7"]),
    ({"model.name_or_path.x": [2]}, {}, ["the point x=2", "sweep.grid.model.name_or_path.x"]),
    ({"training.epsilon": [1, 1.0]}, {}, ["epsilon=1 and epsilon=1.0", "the same run"]),
    ({"a": {"b": {}, "c": {"training.steps": 2}}}, {}, ["a=b and a=c", "the same run"]),
    ({"data.train": ["x.json", "X.json"]}, {}, ["train=x.json and train=X.json", "the same name on some file systems"]),
]  # fmt: skip


@pytest.mark.parametrize(("grid", "others", "says"), BAD_GRIDS, ids=lambda each: str(each)[:40])
def test_a_bad_grid_is_one_line(grid: dict[str, Any], others: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(InputError) as error:
        expand(sweep(grid, **others), run_mapping())
    assert "\n" not in str(error.value)
    for part in says:
        assert part in str(error.value)


def test_an_override_that_the_grid_would_undo_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    section = {"folder": "out", "grid": {"training.seed": [0, 1]}}
    path.write_text(dump_yaml({**run_mapping(), "sweep": section}))
    with pytest.raises(InputError, match=r"--training\.seed is given, but sweep\.grid varies training\.seed"):
        read_sweep(path, ["--training.seed=3"])
    config, base = read_sweep(path, ["--training.steps=5", "--sweep.folder=there"])
    assert [(point.config.training.steps, point.config.output.folder) for point in expand(config, base)] == [
        (5, "there/seed=0"),
        (5, "there/seed=1"),
    ]


@pytest.mark.parametrize(
    ("grid", "override", "says"),
    [
        ({"a": {"x": {"training.steps": 2}, "y": {}}}, "training.steps=5", "the choice x of sweep.grid.a sets"),
        ({"a": {"x": {}, "y": {"training": {"steps": 3}}}}, "training.steps=5", "the choice y of sweep.grid.a sets"),
        (
            {"a": {"x": {"selection.budget.fraction": 0.1}}},
            "selection.budget={fraction: 0.2}",
            "the choice x of sweep.grid.a",
        ),
        ({"a": {"x": {}, "y": {"extends": "steps.yaml"}}}, "training.steps=5", "the choice y of sweep.grid.a sets"),
        (
            {"a": {"x": {}, "y": {"without": ["selection"]}}},
            "selection.seed=5",
            "the choice y of sweep.grid.a takes out",
        ),
        ({"selection.budget": [{"fraction": 0.1}]}, "selection.budget.fraction=0.2", "sweep.grid varies"),
    ],
)
def test_an_override_that_a_choice_would_undo_is_refused(
    grid: dict[str, Any], override: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "steps.yaml").write_text("training: {steps: 7}\n")
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml({**run_mapping(), "sweep": {"folder": "out", "grid": grid}}))
    name = override.partition("=")[0]
    with pytest.raises(InputError, match=rf"^--{re.escape(name)} is given, but {re.escape(says)} .*: change it there"):
        read_sweep(path, [f"--{override}"])
    # What stands beside it is nobody's but the user's.
    _, base = read_sweep(path, ["--training.learning_rate=0.5", "--sweep.repeat_over=[]"])
    assert base["training"]["learning_rate"] == 0.5


def test_a_credential_is_not_told(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    secret = "hf_" + "a1b2" * 8
    path.write_text(dump_yaml({**run_mapping(), "sweep": {"folder": "out", "grid": {"data.train": [secret, "b"]}}}))
    with pytest.raises(InputError, match="token") as error:
        read_sweep(path, [])
    assert secret not in str(error.value)


def test_a_point_keeps_its_number_and_what_it_is_when_the_grid_changes(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "out")
    before = SweepConfig(folder=str(folder.path), grid={"training.seed": [0, 1], "training.epsilon": [0.1]})
    listed = list_points(read_list(folder), expand(before, run_mapping()))
    write_list(folder, listed)
    assert read_list(folder) == [type(each)(**{**vars(each), "point": None}) for each in listed]
    # One goes, two come, the order is another.
    after = SweepConfig(folder=str(folder.path), grid={"training.seed": [7, 1, 8], "training.epsilon": [0.1]})
    changed = list_points(read_list(folder), expand(after, run_mapping()))
    assert [(each.index, each.name, each.point is None) for each in changed] == [
        (0, "seed=0,epsilon=0.1", True),
        (1, "seed=1,epsilon=0.1", False),
        (2, "seed=7,epsilon=0.1", False),
        (3, "seed=8,epsilon=0.1", False),
    ]
    write_list(folder, changed)
    assert folder.config("seed=0,epsilon=0.1").is_file()
    assert find_listed(changed, "0", "--point").name == find_listed(changed, "seed=0,epsilon=0.1", "--point").name
    with pytest.raises(InputError, match=r"--point is 4, .* it has 0 to 3"):
        find_listed(changed, "4", "--point")
    assert find_config(after, run_mapping(), "seed=0,epsilon=0.1") is None
    assert find_config(after, run_mapping(), "seed=8,epsilon=0.1") == changed[3].point.config


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"format": "sparse_zero.sweep", "points": [{"name": "../x=1", "settings": {}}]}']
)
def test_a_damaged_list_is_refused(content: str, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    folder.points.write_text(content)
    with pytest.raises(InputError, match=r"points\.json.*restore"):
        read_list(folder)


def test_another_run_in_a_points_folder_is_refused_by_name(tmp_path: Path) -> None:
    (point,) = expand(SweepConfig(folder=str(tmp_path), grid={"training.seed": [0]}), run_mapping())
    folder = SweepFolder(tmp_path)
    run = folder.run(point.name)
    run.path.mkdir()
    run.config.write_text(resolved_yaml(point.config).replace("steps: 2", "steps: 3"))
    check_folders(folder, {point.name: point.config})  # Nothing was trained yet.
    run.summary.write_text("{}")
    with pytest.raises(InputError, match=r"the point seed=0 .*training\.steps was 3 and is now 2"):
        check_folders(folder, {point.name: point.config})


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"validation": "other.json"}},
        {"data": {"validation_split": "test"}},
        {"data": {"test": "test.json"}, "output": {"evaluate": True}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_finished_point_that_was_measured_otherwise_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    section = SweepConfig(folder=str(tmp_path), grid={"training.seed": [0]})
    mapping = run_mapping()
    mapping["data"] |= {"test": "test.json"} if "output" in changes else {}
    (point,) = expand(section, mapping)
    for name, settings in changes.items():
        mapping[name] = {**mapping[name], **settings}
    (changed,) = expand(section, mapping)
    folder = SweepFolder(tmp_path)
    run = folder.run(point.name)
    run.path.mkdir()
    run.config.write_text(resolved_yaml(point.config))
    check_folders(folder, {point.name: changed.config})  # A run that goes on may be measured otherwise.
    run.summary.write_text("{}")
    check_folders(folder, {point.name: point.config})
    with pytest.raises(InputError, match=r"the point seed=0 of the sweep is finished, and .* delete"):
        check_folders(folder, {point.name: changed.config})


HOSTILE = Path("/a $(b)'\nc")
QUOTED = "sparse-zero sweep --folder '/a $(b)'\"'\"'\nc' --point \"$SLURM_ARRAY_TASK_ID\""


def array(cluster: dict[str, Any], indices: list[int], at_once: int | None = None, **others: dict[str, Any]) -> str:
    grid = {"training.seed": list(range(len(indices))), **others}
    batch = {"time_limit_minutes": 30, "gpu_type": "a100", "cpus_per_rank": 3, "setup": ["module load x"]}
    mapping = {**run_mapping(), "cluster": cluster, "batch": {**batch, "slurm": {"partition": "gpu"}}}
    points = expand(sweep(grid), mapping)
    numbered = {point.name: (index, point.config) for point, index in zip(points, indices, strict=False)}
    return array_of_points(numbered, HOSTILE, Path("/x"), at_once)


def test_an_array_of_runs_that_one_task_starts() -> None:
    """It has all of the script of a run, and a task has what all ranks of a node need."""
    script = array({"launcher": "local", "ranks_per_node": 4}, [0, 1, 2, 5, 7, 8], 3)
    for option in (
        "array=0-2,5,7-8%3", "nodes=1", "ntasks-per-node=1", "cpus-per-task=12", "gpus-per-node=a100:4",
        "time=30", "partition=gpu", "signal=B:USR1@300", "requeue",
    ):  # fmt: skip
        assert re.search(rf"^#SBATCH --{option}$", script, re.MULTILINE), script
    assert "\nmodule load x\n" in script
    assert f"run=({QUOTED})\n" in script
    assert "#SBATCH --array=4\n" in array({"launcher": "local", "ranks_per_node": 4}, [4])
    with pytest.raises(InputError, match="--at-once is 0"):
        array({"launcher": "local"}, [1], 0)
    with pytest.raises(InputError, match=r"cluster\.ranks_per_node is missing"):
        array({"launcher": "local"}, [1])


@pytest.mark.parametrize(
    "cluster", [{"launcher": "torchrun", "num_nodes": 2, "master_address": "a"}, {"launcher": "pdsh", "hostfile": "h"}]
)
def test_no_task_starts_ranks_on_nodes_that_are_not_its_own(cluster: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"cluster\.launcher is {cluster['launcher']}, .* set it to slurm"):
        array({**cluster, "ranks_per_node": 2}, [0])


def test_points_that_start_through_slurm_get_the_script_of_a_run() -> None:
    slurm: dict[str, Any] = {"launcher": "slurm", "num_nodes": 2, "ranks_per_node": 4}
    script = array(slurm, [3, 4])
    for option in (
        "array=3-4",
        "nodes=2",
        "ntasks-per-node=4",
        "cpus-per-task=3",
        "time=30",
        "job-name=sparse-zero-sweep",
        "requeue",
    ):
        assert re.search(rf"^#SBATCH --{option}$", script, re.MULTILINE), script
    assert "#SBATCH --output=sparse-zero-%A_%a.out\n" in script
    assert f"run=({QUOTED})\n" in script
    assert "scontrol requeue" in script
    # Tasks of an array are all given the same.
    nodes: dict[str, Any] = {"two": {}, "one": {"cluster.num_nodes": 1}}
    with pytest.raises(
        InputError, match=r"the points seed=0,nodes=two and seed=0,nodes=one .* differ in cluster or batch"
    ):
        array(slurm, [0, 1], nodes=nodes)
    with pytest.raises(InputError, match="differ in cluster or batch"):
        array(slurm, [0, 1], launcher={"slurm": {}, "local": {"cluster.launcher": "local", "cluster.num_nodes": 1}})
