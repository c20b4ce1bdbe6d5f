"""Does a kernel study measure what it says, resume, write what it promises, and name what is wrong with its config?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import ntk_study
from scripts.ntk import measures
from scripts.ntk.functions import TextFunctions, fitted_head
from scripts.ntk.samples import LabelledText, few_shot, made_up_texts, read_texts
from scripts.ntk.study_config import FunctionConfig, SamplesConfig, StudyConfig
from scripts.ntk.study_points import Study, points_of
from scripts.ntk_study import load_study
from sparse_zero.errors import InputError
from tests.models.tiny import tiny_tokenizer, write_tiny_llama

SHIPPED = Path("configs/studies/ntk.yaml")


def kernel(size: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(size, rank, dtype=torch.float64, generator=generator)
    return factors @ factors.T


# --- measures ----------------------------------------------------------------------------------------------


def test_the_scaled_distance_is_the_least_over_scales() -> None:
    restricted, full = kernel(7, 3), kernel(7, 9, seed=1)
    tried = [measures.relative_distance(c * restricted, full, 2) for c in torch.linspace(0, 20, 20001).tolist()]
    assert measures.scaled_distance(restricted, full) == pytest.approx(min(tried), abs=1e-6)
    assert measures.scaled_distance(3.7 * full, full) == pytest.approx(0.0, abs=1e-7)
    assert measures.scaled_distance(torch.zeros_like(full), full) == 1.0
    assert measures.trace_distance(0.01 * full, full) == pytest.approx(0.0, abs=1e-12)
    assert measures.relative_distance(0.25 * full, full, 1) == pytest.approx(0.75)
    # What all samples have in common does not count in the centred one.
    assert measures.centred_alignment(full + 5.0, full) == pytest.approx(1.0)
    assert measures.alignment(full + 5.0, full) < 0.99


def test_leave_one_out_in_closed_form_is_leaving_one_out() -> None:
    gram = kernel(8, 20) + torch.eye(8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    fit = measures.ridge_fit(gram, labels, 3)
    targets = torch.nn.functional.one_hot(labels, 3).double()
    targets = targets - targets.mean(0)

    def error_of(ridge: float) -> float:
        total = 0.0
        for left in range(8):
            rest = [number for number in range(8) if number != left]
            system = gram[rest][:, rest] + ridge * gram.diagonal().mean() * torch.eye(7, dtype=torch.float64)
            predicted = gram[left, rest] @ torch.linalg.solve(system, targets[rest])
            total += float((predicted - targets[left]).square().mean()) / 8
        return total

    errors = {ridge: error_of(ridge) for ridge in measures.RIDGES}
    assert fit.ridge == min(errors, key=lambda ridge: errors[ridge])
    assert fit.loo_error == pytest.approx(errors[fit.ridge], rel=1e-6)
    solved = torch.linalg.solve(gram + fit.ridge * gram.diagonal().mean() * torch.eye(8, dtype=torch.float64), targets)
    torch.testing.assert_close(fit.weights, solved)


def test_a_fitted_head_separates_what_can_be_separated() -> None:
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 2
    features[:, 2] += 6.0 * labels
    weight = fitted_head(features, labels, 2)
    assert weight.shape == (1, 6)
    assert float(weight.norm()) == pytest.approx(1.0)
    assert int(weight.abs().argmax()) == 2
    outputs = features @ weight[0]
    assert outputs[labels == 1].min() > outputs[labels == 0].max()


# --- samples -----------------------------------------------------------------------------------------------


def test_samples_of_a_seed_are_disjoint_and_balanced(tmp_path: Path) -> None:
    train, test = made_up_texts()
    assert not {each.text for each in train} & {each.text for each in test}
    texts = read_texts(SamplesConfig())
    drawn, others = few_shot(texts, 4, 0)
    assert [each.label for each in drawn] == [0] * 4 + [1] * 4
    assert not {each.text for each in drawn} & {each.text for each in others}
    assert few_shot(texts, 4, 0)[0] == drawn
    assert few_shot(texts, 4, 1)[0] != drawn
    path = tmp_path / "train.tsv"
    path.write_text('sentence\tlabel\na "quoted film\t1\ndull\t0\n')
    read = read_texts(SamplesConfig(train=str(path), test=str(path)))
    assert read.train == (
        LabelledText(text='a "quoted film', second=None, label=1),
        LabelledText(text="dull", second=None, label=0),
    )
    with pytest.raises(InputError, match="shots has 1, and the class 0 1 training samples"):
        few_shot(read, 1, 0)
    with pytest.raises(InputError, match=r"data.text is 'text', which not every record"):
        read_texts(SamplesConfig(train=str(path), test=str(path), text="text"))
    with pytest.raises(InputError, match=r"data.train is .*: there is no such file"):
        read_texts(SamplesConfig(train=str(tmp_path / "no.tsv"), test=str(path)))


# --- the study ---------------------------------------------------------------------------------------------


def write_tiny_bert(folder: Path, kind: str = "BertModel", seed: int = 0) -> Path:
    import transformers

    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, kind)(config)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TINY = """
model: {{name_or_path: {model}, max_length: 32}}
data: {{num_test: 6}}
heads: [fitted, random]
shots: [3]
seeds: [1]
subsets: {{per_matrix: [1, 2], scores: [abs_of_mean], block_size: 6, lora_ranks: [1]}}
kernel: {{max_memory_gib: 0.5}}
"""


def test_a_study_resumes_and_writes_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "study.yaml", tmp_path / "out"
    config.write_text(TINY.format(model=write_tiny_bert(tmp_path / "model")))
    arguments = ["--config", str(config), "--out", str(out)]
    assert ntk_study.main(arguments) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    names = ["full", "matrices", "vectors"]
    names += [f"{kind}-{r}-abs_of_mean" for kind in ("rows", "columns", "blocks") for r in (1, 2)]
    names += ["lora-1", "head"]
    for head in ("fitted", "random"):
        own = [row for row in results["rows"] if row["head"] == head]
        assert [row["subset"] for row in own] == names
        full = own[0]
        assert full["distance_2"] == 0.0
        assert full["scaled_distance"] == pytest.approx(0.0, abs=1e-6)
        assert full["agreement"] == 1.0
        for row in own:
            assert row["scaled_distance"] == pytest.approx((1 - row["alignment"] ** 2) ** 0.5, abs=1e-6)
            same = [a == b for a, b in zip(row["predictions"], full["predictions"], strict=True)]
            assert row["agreement"] == pytest.approx(sum(same) / 6)
        # A part of the parameters is a part of the trace: nearer without scale, the more there are.
        by_name = {row["subset"]: row for row in own}
        assert by_name["rows-1-abs_of_mean"]["distance_2"] > by_name["rows-2-abs_of_mean"]["distance_2"]
        assert by_name["matrices"]["distance_2"] < by_name["rows-2-abs_of_mean"]["distance_2"]
        assert by_name["rows-2-abs_of_mean"]["num_parameters"] == 2 * by_name["columns-1-abs_of_mean"]["num_parameters"]
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 4
    assert "http" not in page.replace("http-equiv", "")
    for picture in ("distance", "accuracy", "kernels-fitted", "kernels-random"):
        assert 3000 < (out / "pictures" / f"{picture}.png").stat().st_size < 400_000
    # A rerun computes nothing; another subset is computed by itself, and is what it would have been at first.
    files = {path: path.stat().st_mtime_ns for path in (out / "points").glob("*.safetensors")}
    assert len(files) == 2
    assert ntk_study.main([*arguments, "--until=kernels"]) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    more = load_study(config, ["--heads=[fitted]", "--subsets.lora_ranks=[1,2]"])
    study = Study(more, out)
    (point,) = points_of(more)
    assert [named.name for named in study.missing(point)] == ["lora-2"]
    study.compute(point)
    before = [row for row in results["rows"] if row["head"] == "fitted"]
    after = {row["subset"]: row for row in study.rows()}
    assert set(after) == {row["subset"] for row in before} | {"lora-2"}
    assert [after[row["subset"]]["scaled_distance"] for row in before] == [row["scaled_distance"] for row in before]
    fewer = load_study(config, ["--heads=[fitted]", "--subsets.lora_ranks=[2]", "--subsets.per_matrix=[1]"])
    alone = Study(fewer, tmp_path / "alone")
    alone.compute(point)
    expected = next(row for row in alone.rows() if row["subset"] == "lora-2")
    assert after["lora-2"]["scaled_distance"] == pytest.approx(expected["scaled_distance"], rel=1e-5)
    # Kernels of another function are not taken for these.
    assert ntk_study.main([*arguments, "--model.max_length=16"]) == 2
    assert "is of another model, data or setting" in capsys.readouterr().err


def test_a_causal_model_answers_a_prompt_and_is_sketched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "study.yaml", tmp_path / "out"
    model = write_tiny_llama(tmp_path / "model", hidden=32, layers=2, intermediate=48)
    config.write_text(
        f"model: {{name_or_path: {model}, function: causal_lm, template: '{{text}} :', answers: [a, b], max_length: 40}}\n"
        "data: {num_test: 4}\nshots: [2]\nseeds: [0]\n"
        "subsets: {per_matrix: [1], scores: [abs_of_mean], block_size: 8, lora_ranks: []}\nkernel: {sketch: 8}\n"
    )
    assert ntk_study.main(["--config", str(config), "--out", str(out)]) == 0, capsys.readouterr().err
    rows = {row["subset"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert "head" not in rows
    assert 0 < rows["full"]["sketch_error_bound"] < 1
    assert rows["rows-1-abs_of_mean"]["sketch_error"] is None
    assert "What the sketch adds" in (out / "report.md").read_text()


def test_a_masked_model_answers_at_its_mask(tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path / "model", "BertForMaskedLM")
    config = FunctionConfig(
        name_or_path=str(folder), function="masked_lm", template="{text} is {mask}.", answers=("a", "b"), max_length=32
    )
    functions = TextFunctions(config, folder, 2, "float64")
    inputs = functions.inputs(LabelledText(text="the film " * 40, second=None, label=0))
    ids = inputs["input_ids"][0]
    assert len(ids) <= 32
    place = ids.tolist().index(functions.mask_token)
    function = functions.function(None, [], torch.zeros(0), 0)
    logits = functions.base(**inputs).logits[0, place]
    first, second = (functions.tokenizer.encode(word, add_special_tokens=False)[0] for word in "ab")
    torch.testing.assert_close(function(inputs), (logits[second] - logits[first]).reshape(1))
    with pytest.raises(InputError, match=r"model.function is sequence_classification: .* has no bert.pooler"):
        TextFunctions(
            FunctionConfig(name_or_path=str(folder), function="sequence_classification"), folder, 2, "float32"
        )


def test_the_shipped_study_asks_for_what_docs_promise() -> None:
    config = load_study(SHIPPED)
    assert config.subsets.per_matrix == (1, 3, 8)
    assert config.subsets.kinds == ("row", "column", "block")
    assert len(config.seeds) == 3
    assert config.kernel.sketch == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("modell: {name_or_path: a}", "unknown key modell in .*: did you mean model"),
        ("model: {name_or_path: a, function: proble}", "model.function is 'proble'.*did you mean probe"),
        ("model: {name_or_path: a, function: causal_lm}", r"model.answers is \[\] for causal_lm: give the word"),
        ("model: {name_or_path: a, answers: [x, y]}", "model.function is probe, which has no prompt"),
        ("model: {name_or_path: a, function: masked_lm, answers: [x, y]}", "masked_lm needs {mask} in it"),
        ("model: {name_or_path: a}\nshots: [1]", "shots has 1: it must be at least 2"),
        ("model: {name_or_path: a}\nseeds: []", "seeds is empty"),
        ("model: {name_or_path: a}\nkernel: {sketch: 3}", "kernel.sketch is 3"),
        ("model: {name_or_path: a}\nkernel: {max_memory_gib: 0}", "kernel.max_memory_gib is 0"),
        ("model: {name_or_path: a}\ndata: {train: a.tsv}", "data.train is a.tsv and data.test is None: set both"),
        ("model: {name_or_path: a}\nsubsets: {per_matrix: [0]}", "subsets.per_matrix has 0"),
    ],
)
def test_wrong_configs_are_named(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=named):
        load_study(path)


def test_wrong_command_lines_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[Any] = ["--config", str(SHIPPED), "--out", str(tmp_path / "out")]
    for extra, named in (
        (["nonsense"], "nonsense is no option and no override"),
        (["--model.name_or_path=/no/such/folder"], "model.name_or_path is '/no/such/folder'"),
        (["--data.num_test=100000"], "data.num_test is 100000: there are"),
    ):
        assert ntk_study.main([*arguments, *extra]) == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert isinstance(load_study(SHIPPED, ["--shots=[16,64]"]), StudyConfig)
