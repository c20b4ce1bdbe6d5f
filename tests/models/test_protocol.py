"""Does an evaluation ever show the model a part of the answer, or another prompt than training had?

RoCoFT's published notebooks give the model the right response but for its last tokens (arXiv 2410.10075, the authors'
repository). Here what a model reads follows from the instruction and its input alone.
"""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from models.classified_data import find_labels, load_classified
from models.classified_evaluation import evaluate_classify
from models.data import IGNORED, DataConfig, FieldConfig, load_samples
from models.evaluation import KINDS, EvaluationConfig, evaluate
from models.templates import TEMPLATES, Template
from tests.models.tiny import tiny_llama, tiny_tokenizer

FIELDS = FieldConfig()
# Of prompts; classify has none, and its own test below.
PROMPTED = ("generate", "choice")
# Words that stand nowhere else, so that each of them would be seen.
SOLUTIONS = ("Quaggas eat 31 lemons", "Herons fold 47 kites", "Wizards melt 58 jugs", "Foxes paint 69 yawls")
ANSWERS = ("answer2", "answer1", "answer3", "answer2")
FORM = "\n\nAnswer format: answer1/answer2/answer3"


def records_of(outputs: Sequence[str], answers: Sequence[str] = ANSWERS) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"Which is it, case {number}?{FORM}",
            "input": f"hint {number}",
            "output": output,
            "answer": answer,
        }
        for number, (output, answer) in enumerate(zip(outputs, answers, strict=True))
    ]


def solved(answers: Sequence[str] = ANSWERS) -> list[dict[str, str]]:
    """Records whose output is a solution, as in AQuA and GSM8K."""
    outputs = [f"{how}. The answer is {answer}." for how, answer in zip(SOLUTIONS, answers, strict=True)]
    return records_of(outputs, answers)


def worded(answers: Sequence[str] = ANSWERS) -> list[dict[str, str]]:
    """Records whose output is one form for all, as in LLM-Adapters' commonsense sets."""
    return records_of([f"the correct answer is {answer}" for answer in answers], answers)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(layers=1)


def inputs_of(
    model: Any, tokenizer: Any, records: list[dict[str, str]], template: Template, kind: Any
) -> list[list[int]]:
    """All that the model reads before it has said anything, in the order of its reading, without padding."""
    read: list[list[int]] = []

    def listen(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1:  # Later steps of decoding read what the model wrote.
            read.extend(row[row != tokenizer.pad_token_id].tolist() for row in ids)

    handle = model.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        config = EvaluationConfig(kind=kind, batch_size=3, max_new_tokens=3)
        evaluate(model, tokenizer, records, config, template=template, fields=FIELDS)
    finally:
        handle.remove()
    assert len(read) >= len(records)
    return read


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", PROMPTED)
def test_no_evaluation_shows_a_part_of_the_solution(model: Any, tokenizer: Any, template: Template, kind: str) -> None:
    records = solved()
    read = inputs_of(model, tokenizer, records, template, kind)
    texts = [tokenizer.decode(ids) for ids in read]
    assert any("case 3" in text for text in texts)
    for solution in SOLUTIONS:
        for word in solution.split():
            assert not [text for text in texts if word in text], word
    # Nor does anything else depend on what is right: other answers and solutions, or none, are read the same.
    others = [f"Nothing at all {number}, so answer1" for number in range(4)]
    assert inputs_of(model, tokenizer, records_of(others, ["answer1"] * 4), template, kind) == read
    bare = [{key: value for key, value in record.items() if key != "output"} for record in records]
    assert inputs_of(model, tokenizer, bare, template, kind) == read


@pytest.mark.parametrize("kind", PROMPTED)
def test_a_wording_that_all_records_share_does_not_tell_the_answer(model: Any, tokenizer: Any, kind: str) -> None:
    read = inputs_of(model, tokenizer, worded(), "alpaca", kind)
    assert inputs_of(model, tokenizer, worded(["answer3", "answer3", "answer1", "answer1"]), "alpaca", kind) == read
    texts = [tokenizer.decode(ids) for ids in read]
    if kind == "choice":
        # Each option of each problem, in the words of training.
        for option in ("answer1", "answer2", "answer3"):
            assert sum(text.endswith(f"the correct answer is {option}</s>") for text in texts) == 4
    else:
        assert not [text for text in texts if "the correct answer" in text]


def test_of_mixed_data_only_the_common_wording_is_used(model: Any, tokenizer: Any) -> None:
    records = [*worded(), *solved()[:1]]
    texts = [tokenizer.decode(ids) for ids in inputs_of(model, tokenizer, records, "plain", "choice")]
    assert sum("the correct answer is" in text for text in texts) == 3 * 4
    assert not [text for text in texts if "Quaggas" in text]
    # A single record has no wording that could be told from a solution.
    texts = [tokenizer.decode(ids) for ids in inputs_of(model, tokenizer, worded()[:1], "plain", "choice")]
    assert [text.rpartition("Answer:")[2] for text in texts] == [f" answer{number}</s>" for number in (1, 2, 3)]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", PROMPTED)
def test_training_and_evaluation_have_the_same_prompts(
    model: Any, tokenizer: Any, tmp_path: Any, template: Template, kind: str
) -> None:
    records = worded()
    file = tmp_path / "train.json"
    file.write_text(json.dumps(records))
    trained = load_samples(DataConfig(train=str(file), template=template), tokenizer, "train").samples
    read = inputs_of(model, tokenizer, records, template, kind)
    for sample in trained:
        prompt = [token for token, label in zip(sample.input_ids, sample.labels, strict=True) if label == IGNORED]
        assert sample.input_ids[: len(prompt)] == prompt
        if kind == "choice":
            # The right option is read as the sample that training would have.
            assert sum(ids[: len(prompt)] == prompt for ids in read) == 3
            assert sample.input_ids in read
        else:
            assert read.count(prompt) == 1


def test_every_kind_is_tested_here() -> None:
    assert set(KINDS) == {*PROMPTED, "classify"}


def test_a_classifier_reads_the_texts_as_in_training_and_no_label(tokenizer: Any, tmp_path: Any) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    fields = FieldConfig(text="one", second_text="two", label="class")
    file = tmp_path / "data.json"
    data = DataConfig(train=str(file), test=str(file), fields=fields)

    def read(labels: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        records = [{"one": how, "two": f"case {at}", "class": labels[at]} for at, how in enumerate(SOLUTIONS)]
        file.write_text(json.dumps(records))
        known = find_labels(data, 2)
        seen: list[list[int]] = []
        handle = model.register_forward_pre_hook(
            lambda _, __, kwargs: seen.extend(
                row[mask.bool()].tolist()
                for row, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
            ),
            with_kwargs=True,
        )
        evaluate_classify(model, tokenizer, records, data, known)
        handle.remove()
        return sorted(seen), sorted(
            sample.input_ids for sample in load_classified(data, tokenizer, "train", known).samples
        )

    evaluated, trained = read(["yes", "no", "yes", "no"])
    assert len(evaluated) == 4
    assert evaluated == trained
    assert (evaluated, trained) == read(["no", "yes", "no", "yes"])
    assert not [ids for ids in evaluated if "yes" in tokenizer.decode(ids) or "no" in tokenizer.decode(ids).split()]
