"""Is a run's config read, composed, overridden and written out without losing or inventing anything?"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config import RunConfig, apply_override, load_config, parse_config, resolved_yaml
from launcher.yaml_files import dump_yaml, parse_yaml, read_mapping
from sparse_zero.errors import InputError

MINIMAL = """
model: {name_or_path: some/model}
data: {train: train.json}
selection:
  regions:
    - {kind: row, modules: ["*.q_proj"], per_matrix: 2}
    - {kind: block, modules: ["*.v_proj"], block_size: 64, per_matrix: 1}
training: {steps: 10}
zero: {}
output: {folder: out}
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def minimal() -> dict[str, Any]:
    mapping: dict[str, Any] = parse_yaml(MINIMAL, "minimal")
    return mapping


def test_minimal_config_gets_the_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.model.dtype == "float32"
    assert config.selection.regions[0].modules == ("*.q_proj",)
    assert config.zero.stage == 2
    assert config.checkpoint.resume == "auto"
    assert config.cluster.launcher == "local"


def test_resolved_yaml_says_everything_and_reads_back(tmp_path: Path) -> None:
    tricky = [
        "--model.revision='1e-4'",
        "--data.train='yes'",
        "--data.fields.input='2024-01-01'",
        "--data.template=chat",
        "--data.evaluation.options=['true', 'false', 'null']",
        "--output.folder='~/ü: #x'",
        "--training.learning_rate=1e-5",
        "--training.epsilon=3.5e-09",
        "--zero.options={reduce_bucket_size: 1e6, nested: {on: 'off'}}",
        "--zero.config={bf16: {enabled: auto}}",
    ]
    config = load_config(write(tmp_path, MINIMAL), tricky)
    text = resolved_yaml(config)
    again = load_config(write(tmp_path, text, "resolved.yaml"))
    assert again == config
    assert resolved_yaml(again) == text
    # Every field of every section stands there.
    mapping = parse_yaml(text, "resolved")
    assert set(mapping) == set(RunConfig.__dataclass_fields__)
    assert mapping["training"]["beta2"] == 0.999
    # Another reader of YAML, with the older rules, sees the same words.
    import yaml

    assert yaml.safe_load(text)["data"]["train"] == "yes"
    assert yaml.safe_load(text)["data"]["fields"]["input"] == "2024-01-01"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(JSON_VALUES)
def test_written_yaml_reads_back(value: Any) -> None:
    assert parse_yaml(dump_yaml(value), "text") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-2.5", -2.5), ("1.", 1.0), (".5", 0.5), ("10_000", 10_000), ("0", 0),
        (".inf", float("inf")), ("true", True), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("off", "off"), ("010", "010"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("0x10", "0x10"),
        ("1.2.3", "1.2.3"), ("e5", "e5"), ("[1, a]", [1, "a"]),
    ],
)  # fmt: skip
def test_scalars_mean_what_they_look_like(text: str, value: Any) -> None:
    read = parse_yaml(text, "text")
    assert read == value
    assert type(read) is type(value)


# --- overrides -------------------------------------------------------------------------------------------


def test_overrides_reach_every_depth_in_order(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL),
        [
            "--training.steps=5",
            "--training.steps=7",
            "training.learning_rate=2e-3",
            "--selection.regions.1.block_size=32",
            "--selection.regions.0.modules=['*.k_proj', '*.q_proj']",
            "--data.evaluation.kind=choice",
            "--checkpoint.every=3",
            "--zero.options.reduce_bucket_size=1000",
            "--model.revision=a=b",
            "--training.max_gradient_norm=null",
        ],
    )
    assert config.training.steps == 7
    assert config.training.learning_rate == 2e-3
    assert config.selection.regions[1].block_size == 32
    assert config.selection.regions[0].modules == ("*.k_proj", "*.q_proj")
    assert config.data.evaluation.kind == "choice"
    assert config.checkpoint.every == 3
    assert config.zero.options == {"reduce_bucket_size": 1000}
    assert config.model.revision == "a=b"
    assert config.training.max_gradient_norm is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--training.steps", "--section.key=value"),
        ("--steps=3", "--section.key=value"),
        ("--training..steps=3", "--section.key=value"),
        ("--selection.regions.2.kind=row", "selection.regions has 2 entries"),
        ("--selection.regions.-1.kind=row", "selection.regions has 2 entries"),
        ("--training.steps.x=3", "training.steps is 10, which has no 'x'"),
        ("--training.steps=[1", "the value of --training.steps, line 1"),
    ],
)
def test_wrong_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        apply_override(minimal(), override)
    assert message in str(error.value)


# --- composition -----------------------------------------------------------------------------------------


def test_extends_merges_in_order_and_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts" / "deep").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    write(tmp_path / "parts", MINIMAL, "base.yaml")
    write(tmp_path / "parts" / "deep", "extends: ../base.yaml\ntraining: {steps: 20, seed: 4}\n", "a.yaml")
    write(
        tmp_path / "parts",
        "training: {seed: 5}\nselection: {regions: [{kind: column, modules: [x], per_matrix: 1}]}\n",
        "b.yaml",
    )
    run = write(
        tmp_path / "runs",
        "extends: [../parts/deep/a.yaml, ../parts/b.yaml]\ntraining: {micro_batch_size: 2}\n",
    )
    monkeypatch.chdir(tmp_path / "parts")
    config = load_config(run)
    assert (config.training.steps, config.training.seed, config.training.micro_batch_size) == (20, 5, 2)
    assert [region.kind for region in config.selection.regions] == ["column"]  # lists are replaced, not mixed
    assert config.model.name_or_path == "some/model"


def test_the_same_part_may_be_extended_twice(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "base.yaml")
    write(tmp_path, "extends: base.yaml\n", "a.yaml")
    assert load_config(write(tmp_path, "extends: [a.yaml, base.yaml]\n")).training.steps == 10


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"run.yaml": "extends: run.yaml"}, "goes in a circle: "),
        ({"run.yaml": "extends: a.yaml", "a.yaml": "extends: [run.yaml]"}, "goes in a circle: "),
        ({"run.yaml": "extends: gone.yaml"}, "gone.yaml does not exist"),
        ({"run.yaml": "extends: 3"}, "extends is 3"),
        ({"run.yaml": "extends: [a.yaml]", "a.yaml": "- 1"}, "a.yaml holds a list at its top level"),
        ({"run.yaml": "extends: [a.yaml]", "a.yaml": "# nothing"}, "a.yaml is empty"),
    ],
)
def test_wrong_extends_is_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        write(tmp_path, text, name)
    with pytest.raises(InputError) as error:
        read_mapping(tmp_path / "run.yaml")
    assert message in str(error.value)


def test_aliases_may_share_but_not_contain_themselves() -> None:
    assert parse_yaml("a: &x [1]\nb: *x\n", "text") == {"a": [1], "b": [1]}
    assert parse_yaml("a: &x {k: 1}\nb: {<<: *x, m: 2}\n", "text") == {"a": {"k": 1}, "b": {"k": 1, "m": 2}}
    with pytest.raises(InputError, match="contains itself"):
        parse_yaml("a: &x [*x]\n", "text")


# --- keys, types, values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=3", "unknown key training.stepz in the file: did you mean training.steps?"),
        ("trainig.steps=3", "unknown key trainig in the file: did you mean training?"),
        ("selection.regions.0.blocksize=3", "selection.regions.0.blocksize in the file: did you mean selection.regions.0.block_size?"),
        ("data.evaluation.batchsize=3", "did you mean data.evaluation.batch_size?"),
        ("model.learning_rate=3", "unknown key model.learning_rate in the file: did you mean training.learning_rate?"),
        ("model.qqq=3", "known are name_or_path, "),
    ],
)  # fmt: skip
def test_unknown_key_names_the_nearest(override: str, message: str) -> None:
    mapping = minimal()
    apply_override(mapping, override)
    with pytest.raises(InputError) as error:
        parse_config(mapping, source="the file")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=ten", "training.steps is 'ten': expected an integer"),
        ("training.steps=3.0", "training.steps is 3.0: expected an integer"),
        ("training.steps=true", "training.steps is True: expected an integer"),
        ("training.learning_rate='1e-4'", "training.learning_rate is '1e-4': expected a number"),
        ("training.gradient_checkpointing=yes", "training.gradient_checkpointing is 'yes': expected true or false"),
        ("training.gradient_checkpointing=1", "training.gradient_checkpointing is 1: expected true or false"),
        ("model.revision=1234567", "model.revision is 1234567: expected a text"),
        ("model.name_or_path=null", "model.name_or_path is None: expected a text"),
        ("selection.regions.1.modules='*.q'", "selection.regions.1.modules is '*.q': expected a list"),
        ("selection.regions.0.modules=[1]", "selection.regions.0.modules.0 is 1: expected a text"),
        ("selection.regions.0=3", "selection.regions.0 is 3: expected a mapping"),
        ("zero.config=3", "zero.config is 3: expected a text (in quotes where it looks like something else) or a mapping"),
        ("zero.options=3", "zero.options is 3: expected a mapping"),
        ("zero.stage=true", "zero.stage is True: it may be 0, 1, 2, 3"),
        ("zero.stage='2'", "zero.stage is '2': it may be 0, 1, 2, 3; did you mean 2?"),
        ("training.schedule=cosin", "training.schedule is 'cosin': it may be constant, linear, cosine; did you mean cosine?"),
        ("selection.regions.0.pick=best", "selection.regions.0.pick is 'best': it may be max, "),
    ],
)  # fmt: skip
def test_wrong_type_names_field_value_and_expectation(override: str, message: str) -> None:
    mapping = minimal()
    apply_override(mapping, override)
    with pytest.raises(InputError) as error:
        parse_config(mapping)
    assert message in str(error.value)


def test_values_are_checked_by_their_owner_and_told_in_its_words() -> None:
    mapping = minimal()
    mapping["zero"] = {"stage": 3, "offload_base": "nvme"}
    with pytest.raises(InputError, match=r"^zero\.offload_base is 'nvme': set zero\.nvme_path"):
        parse_config(mapping)


@pytest.mark.parametrize("section", ["model", "data", "selection", "training", "zero", "output"])
def test_required_sections(section: str) -> None:
    mapping = minimal()
    del mapping[section]
    with pytest.raises(InputError, match=rf"^{section} is missing in the config: it has no default$"):
        parse_config(mapping)


def test_sections_must_fit_together() -> None:
    for override, message in (
        ("output.evaluate=true", "output.evaluate is true but data.test is missing"),
        ("training.validation_every=5", "training.validation_every is 5 but data.validation is missing"),
    ):
        mapping = minimal()
        apply_override(mapping, override)
        with pytest.raises(InputError, match=message):
            parse_config(mapping)


def test_home_is_expanded_where_a_path_may_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    mapping = minimal()
    for override in ("model.name_or_path=~/m", "output.folder=~/o", "data.train=~/d", "zero.config=~/z.json"):
        apply_override(mapping, override)
    config = parse_config(mapping)
    assert config.model.name_or_path == "/somewhere/m"
    assert config.output.folder == "/somewhere/o"
    assert config.data.train == "/somewhere/d"
    assert config.zero.config == "/somewhere/z.json"
    assert mapping["output"]["folder"] == "~/o"  # the caller's mapping is left alone
