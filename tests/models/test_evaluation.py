"""Are answers read, compared, chosen, shared over ranks and written as the documentation says?"""

from __future__ import annotations

import copy
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_zero as sz
from models import evaluation as evaluation_module
from models.answers import as_number, judge, numbers_in, options_in
from models.data import FieldConfig
from models.evaluation import EvaluationConfig, evaluate, evaluate_choice, evaluate_generate, write_result
from models.gather import gather_json
from models.problems import check_problems
from models.templates import encode_prompts, render
from sparse_zero.errors import InputError
from tests.distributed.spawn import run_ranks
from tests.models.tiny import tiny_llama, tiny_tokenizer

FIELDS = FieldConfig()


# -- answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "prediction", "correct"),
    [
        ("12 + 7 = 19", "19", "19", True),
        ("The answer is 19.", "19", "19", True),
        ("19 at first, then 20", "19", "20", False),
        ("3.0", "3", "3.0", True),
        ("so it costs $1,234.50.", "1234.5", "$1,234.50", True),
        ("1,000,000", "1000000", "1,000,000", True),
        ("the pair 3,4", "4", "4", True),
        ("minus: -5", "-5", "-5", True),
        ("minus: −5", "-5", "−5", True),
        ("10-3", "3", "3", True),
        ("it is 1/2", "0.5", "1/2", True),
        ("0.3333", "1/3", "0.3333", True),
        (r"\frac{3}{4}", "0.75", "3/4", True),
        ("about 33.3", "1/3", "33.3", False),
        # A dash is no sign.
        ("The answer - 42.", "42", "42", True),
        ("The answer − 42.", "-42", "42", False),
        ("- 7 apples", "7", "7", True),
        ("10 - 3", "3", "3", True),
        ("10 -3", "-3", "-3", True),
        ("it is -$5", "-5", "-$5", True),
        # A mixed number, and not two that stand beside each other.
        ("so 2 1/2.", "2.5", "2 1/2", True),
        ("-2 1/2", "-2.5", "-2 1/2", True),
        ("$1,000 1/2", "1000.5", "$1,000 1/2", True),
        (r"2\frac{1}{2}", "2.5", "2 1/2", True),
        ("2.5", "2 1/2", "2.5", True),
        ("4 6/3", "2", "6/3", True),
        ("1/3 1/2", "0.5", "1/2", True),
        ("2.5 1/2", "0.5", "1/2", True),
        ("2 -1/2", "-0.5", "-1/2", True),
        ("2, 1/2", "0.5", "1/2", True),
        ("2 .5/2", "0.25", ".5/2", True),
        ("3 5/0", "3", "3", True),
        (r"-\frac12", "-0.5", "-1/2", True),
        (r"\tfrac{1}4", "0.25", "1/4", True),
        (r"\frac123", "3", "3", True),
        ("0.5", r"\frac12", "0.5", True),
        ("1e3", "1000", "1e3", True),
        ("1.5E-3 m", "0.0015", "1.5E-3", True),
        ("1000", "1e3", "1000", True),
        ("1e3x", "3", "3", True),
        ("1e9999", "9999", "9999", True),
        ("5%", "5", "5", True),
        ("7", "$7.00", "7", True),
        ("no number", "3", "", False),
        ("", "3", "", False),
        ("5 / 0", "0", "", False),
        ("9" * 5000, "3", "", False),
        ("the correct answer is answer2", "answer2", "answer2", True),
        ("Answer2, not answer1", "answer2", "answer2", True),
        ("answer12", "answer1", "answer12", False),
        ("the correct answer is false, not true", "true", "false", False),
        ("the correct answer is true", "True", "true", True),
        ("option1 or option2", "option2", "option1", False),
        ("I cannot say", "solution1", "", False),
        ("A dog. The answer is (B).", "B", "B", True),
        ("none", "C", "", False),
        ("  The  Eiffel tower. ", "the eiffel tower", "The  Eiffel tower.", True),
        ("Paris", "London", "Paris", False),
    ],
)
def test_judge(text: str, answer: str, prediction: str, correct: bool) -> None:
    assert judge(text, answer) == (prediction, correct)


def test_numbers() -> None:
    assert [value for _, value in numbers_in("a1 2.5 .5 -3 (4)-5 6,7 1,234,567.8")] == [
        Fraction(each) for each in ("1", "2.5", ".5", "-3", "4", "5", "6", "7", "1234567.8")
    ]
    assert as_number("12 apples") is None
    assert as_number("1 2") is None
    assert as_number(" 12. ") == 12
    assert as_number("50%") == 50


def test_options_of_a_text() -> None:
    assert options_in("Why?\n\nAnswer1: x\n\nAnswer format: answer1/answer2/answer3") == (
        "answer1",
        "answer2",
        "answer3",
    )
    assert options_in("Please answer.\nanswer format: true/false.\n") == ("true", "false")
    assert options_in("What is 1/2?") == ()


# -- a model that answers as told ------------------------------------------------------------------------------


def records_of(num_records: int) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"Tom has {number} apples" + " and a pear" * (number % 4) + ". How many?",
            "input": "",
            "output": f"The answer is {number}",
            "answer": str(number),
        }
        for number in range(10, 10 + num_records)
    ]


def choices_of(num_records: int) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"Question {number}\n\nAnswer format: answer1/answer2/answer3",
            "output": f"the correct answer is answer{1 + number % 3}",
            "answer": f"answer{1 + number % 3}",
        }
        for number in range(num_records)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(layers=2, vocab=384)


def test_batched_generation_equals_one_by_one(model: Any, tokenizer: Any) -> None:
    """Left padding, sorting and batching change no text; every stop comes from greedy decoding by hand."""
    records = records_of(7)
    config = EvaluationConfig(batch_size=3, max_new_tokens=6)
    result = evaluate_generate(model, tokenizer, records, config, template="alpaca", fields=FIELDS)
    assert [each.index for each in result.predictions] == list(range(7))
    for record, found in zip(records, result.predictions, strict=True):
        prompt, _ = render("alpaca", record, tokenizer, FIELDS)
        ids = encode_prompts(tokenizer, [prompt], "alpaca")[0]
        new: list[int] = []
        with torch.inference_mode():
            while len(new) < 6:
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
                if new[-1] == tokenizer.eos_token_id:
                    break
        assert found.text == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert (found.instruction, found.answer) == (record["instruction"], record["answer"])
        assert (found.prediction, found.correct) == judge(found.text, record["answer"])


def train_to_answer(model: Any, tokenizer: Any, records: list[dict[str, str]], steps: int) -> None:
    """Teach the outputs of a few records by heart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    samples = []
    for record in records:
        prompt, response = render("plain", record, tokenizer, FIELDS)
        prompt_ids = encode_prompts(tokenizer, [prompt], "plain")[0]
        samples.append((prompt_ids, tokenizer(response, add_special_tokens=False).input_ids))
    longest = max(len(prompt) + len(response) for prompt, response in samples)
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    mask: list[list[int]] = []
    for prompt_ids, response_ids in samples:
        padding = longest - len(prompt_ids) - len(response_ids)
        ids.append(prompt_ids + response_ids + [3] * padding)
        labels.append([-100] * len(prompt_ids) + response_ids + [-100] * padding)
        mask.append([1] * (longest - padding) + [0] * padding)
    batch = {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
    }
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def taught(tokenizer: Any) -> Any:
    """A model that knows the answers of eight problems, and of six choices."""
    model = tiny_llama(layers=2, vocab=384, seed=1)
    torch.manual_seed(0)
    train_to_answer(model, tokenizer, records_of(8) + choices_of(6), steps=150)
    return model


def test_taught_model_is_right_and_stops(taught: Any, tokenizer: Any, tmp_path: Path) -> None:
    records = [*records_of(8), {"instruction": "Who?", "answer": "nobody at all"}]
    config = EvaluationConfig(batch_size=4, max_new_tokens=40)
    seen: list[tuple[int, int]] = []
    result = evaluate(
        taught,
        tokenizer,
        records,
        config,
        template="plain",
        fields=FIELDS,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 9), (8, 9), (9, 9)]
    assert [each.text for each in result.predictions[:8]] == [record["output"] for record in records[:8]]
    assert [each.correct for each in result.predictions] == [True] * 8 + [False]
    assert (result.correct, result.num_problems, result.accuracy) == (8, 9, 8 / 9)

    write_result(tmp_path / "evaluation" / "tuned.json", result)
    written = json.loads((tmp_path / "evaluation" / "tuned.json").read_text())
    assert (written["kind"], written["correct"], written["num_problems"]) == ("generate", 8, 9)
    assert written["accuracy"] == pytest.approx(8 / 9)
    assert written["predictions"][3] == {
        "index": 3,
        "instruction": records[3]["instruction"],
        "answer": "13",
        "prediction": "13",
        "text": "The answer is 13",
        "correct": True,
    }


def test_taught_model_chooses_right(taught: Any, tokenizer: Any) -> None:
    records = choices_of(6)
    config = EvaluationConfig(kind="choice", batch_size=4)
    result = evaluate(taught, tokenizer, records, config, template="plain", fields=FIELDS)
    assert result.accuracy == 1.0
    assert [each.prediction for each in result.predictions] == [record["answer"] for record in records]
    assert result.predictions[0].text == "the correct answer is answer1"


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_choice_is_the_likeliest_response(model: Any, tokenizer: Any, batch_size: int) -> None:
    records: list[dict[str, str]] = [*choices_of(4), {"instruction": "Is it so?", "answer": "no"}]
    config = EvaluationConfig(kind="choice", batch_size=batch_size)
    with pytest.raises(InputError, match=r"record 5 of data.test offers no options .* data\.evaluation\.kind"):
        evaluate_choice(model, tokenizer, records, config, template="alpaca", fields=FIELDS)
    records[4]["instruction"] += " Answer format: yes, of course/no"
    result = evaluate_choice(model, tokenizer, records, config, template="alpaca", fields=FIELDS)
    for record, found in zip(records, result.predictions, strict=True):
        scores = {}
        for option in options_in(record["instruction"]):
            response = record.get("output", record["answer"]).replace(record["answer"], option)
            prompt, text = render("alpaca", record | {"output": response}, tokenizer, FIELDS)
            prompt_ids = encode_prompts(tokenizer, [prompt], "alpaca")[0]
            response_ids = tokenizer(text, add_special_tokens=False).input_ids
            with torch.inference_mode():
                logits = model(torch.tensor([prompt_ids + response_ids])).logits[0, len(prompt_ids) - 1 : -1]
            picked = logits.log_softmax(-1)[range(len(response_ids)), response_ids]
            scores[option] = float(picked.sum())
        assert found.prediction == max(scores, key=scores.__getitem__)
        assert found.correct == (found.prediction == record["answer"])


def test_a_model_that_diverged_chooses_nothing(tokenizer: Any) -> None:
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    config = EvaluationConfig(kind="choice", batch_size=2)
    found = evaluate_choice(model, tokenizer, choices_of(3), config, template="plain", fields=FIELDS)
    assert [(each.prediction, each.correct) for each in found.predictions] == [("", False)] * 3


def test_given_options_replace_those_of_the_record(model: Any, tokenizer: Any) -> None:
    config = EvaluationConfig(kind="choice", options=("answer1", "answer9"))
    found = evaluate_choice(model, tokenizer, choices_of(1), config, template="plain", fields=FIELDS)
    assert found.predictions[0].prediction in ("answer1", "answer9")
    with pytest.raises(InputError, match=r"record 2 of data.test has the answer 'answer2', .* \(answer1, answer9\)"):
        evaluate_choice(model, tokenizer, choices_of(2), config, template="plain", fields=FIELDS)


@pytest.mark.parametrize("placement", ["inplace", "delta"])
def test_sparse_layers_answer_like_the_model_that_they_replace(taught: Any, tokenizer: Any, placement: Any) -> None:
    records = records_of(4)
    config = EvaluationConfig(max_new_tokens=12)
    expected = evaluate_generate(taught, tokenizer, records, config, template="plain", fields=FIELDS)
    sparse = copy.deepcopy(taught)
    region = sz.RegionConfig(kind="row", modules=("*.{q,k,v}_proj",), per_matrix=2, score="first")
    selection = sz.select(sparse, None, sz.SelectionConfig(regions=(region,)))
    sz.sparsify(sparse, selection, placement=placement)
    sparse.train()
    assert evaluate_generate(sparse, tokenizer, records, config, template="plain", fields=FIELDS) == expected
    assert sparse.training, "the mode is as it was"


# -- what must not leak in -------------------------------------------------------------------------------------


def test_own_generation_settings_are_ignored_and_kept(model: Any, tokenizer: Any) -> None:
    config = EvaluationConfig(max_new_tokens=8)
    expected = evaluate_generate(model, tokenizer, records_of(3), config, template="plain", fields=FIELDS)
    talkative = copy.deepcopy(model)
    talkative.config.use_cache = False
    talkative.generation_config.repetition_penalty = 5.0
    talkative.generation_config.do_sample = True
    talkative.generation_config.temperature = 9.0
    talkative.generation_config.min_new_tokens = 8
    found = evaluate_generate(talkative, tokenizer, records_of(3), config, template="plain", fields=FIELDS)
    assert found == expected
    assert talkative.generation_config.repetition_penalty == 5.0


def test_all_stop_tokens_of_the_model_stop(taught: Any, tokenizer: Any) -> None:
    config = EvaluationConfig(max_new_tokens=30)
    free = evaluate_generate(taught, tokenizer, records_of(1), config, template="plain", fields=FIELDS)
    assert free.predictions[0].text == "The answer is 10"
    stopping = copy.deepcopy(taught)
    stopping.generation_config.eos_token_id = [
        2,
        tokenizer(" answer", add_special_tokens=False).input_ids[-1],
    ]
    stopped = evaluate_generate(stopping, tokenizer, records_of(1), config, template="plain", fields=FIELDS)
    assert stopped.predictions[0].text == "The answer"


# -- input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "guess"}, "data.evaluation.kind is 'guess'"),
        ({"batch_size": 0}, "data.evaluation.batch_size is 0"),
        ({"max_new_tokens": 0}, "data.evaluation.max_new_tokens is 0"),
        ({"limit": 0}, "data.evaluation.limit is 0"),
        ({"options": ("a", "a")}, "data.evaluation.options"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvaluationConfig(**settings)


def test_an_empty_answer_to_choose_is_named_and_matters_only_where_it_is_asked(model: Any, tokenizer: Any) -> None:
    records = [*choices_of(3), choices_of(1)[0] | {"answer": ""}]
    config = EvaluationConfig(kind="choice")
    for check in (evaluate, check_problems):
        with pytest.raises(InputError, match=r"record 4 of data.test has the answer '', which is none of its options"):
            check(model, tokenizer, records, config, template="plain", fields=FIELDS)
    first = EvaluationConfig(kind="choice", limit=3)
    check_problems(model, tokenizer, records, first, template="plain", fields=FIELDS)
    found = evaluate(model, tokenizer, records, first, template="plain", fields=FIELDS)
    assert found == evaluate(model, tokenizer, choices_of(3), config, template="plain", fields=FIELDS)


@pytest.mark.parametrize("kind", ["generate", "choice"])
def test_problems_are_checked_without_an_answer(model: Any, tokenizer: Any, kind: Any) -> None:
    """What evaluate refuses, and nothing else, up to the limit."""
    long = {"instruction": "and so on " * 2000 + "\nAnswer format: answer1/answer2", "answer": "answer1"}
    records = [*choices_of(2), long]
    config = EvaluationConfig(kind=kind, limit=2)
    check_problems(model, tokenizer, records, config, template="plain", fields=FIELDS)
    for check in (evaluate, check_problems):
        with pytest.raises(InputError, match=r"a problem of data.test needs .* tokens.* has room for 1024: .*leave"):
            check(model, tokenizer, records, EvaluationConfig(kind=kind), template="plain", fields=FIELDS)


def test_bad_problems_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"data.test has no problems"):
        evaluate(model, tokenizer, [], EvaluationConfig(), template="plain", fields=FIELDS)
    with pytest.raises(InputError, match=r"needs .* tokens, .* has room for 1024"):
        evaluate(
            model,
            tokenizer,
            records_of(2),
            EvaluationConfig(max_new_tokens=1020),
            template="plain",
            fields=FIELDS,
        )


# -- ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize(("num_problems", "world_size", "batch_size"), [(7, 1, 3), (7, 2, 3), (2, 3, 4), (9, 4, 1)])
def test_ranks_share_every_problem_once(num_problems: int, world_size: int, batch_size: int, lockstep: bool) -> None:
    lengths = [(5 * index) % 7 + 1 for index in range(num_problems)]
    per_rank = [
        evaluation_module.batches_of_rank(lengths, batch_size, rank, world_size, lockstep) for rank in range(world_size)
    ]
    real = [index for batches in per_rank for batch, is_real in batches if is_real for index in batch]
    assert sorted(real) == list(range(num_problems))
    assert all(batch for batches in per_rank for batch, _ in batches)
    if lockstep:
        assert len({len(batches) for batches in per_rank}) == 1
    for batches in per_rank:
        own = [lengths[index] for batch, is_real in batches if is_real for index in batch]
        assert own == sorted(own, reverse=True)


def test_gather_alone() -> None:
    assert gather_json({"text": "żółw", "pair": (1, 2)}) == [{"text": "żółw", "pair": [1, 2]}]


def evaluate_on_this_rank(kind: str) -> list[Any]:
    """What one rank finds, as JSON; the ranks of a world compare it."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, tokenizer = tiny_llama(layers=1, vocab=384), tiny_tokenizer()
    records = records_of(5) if kind == "generate" else choices_of(5)
    config = EvaluationConfig(kind=kind, batch_size=2, max_new_tokens=4)  # type: ignore[arg-type]
    found = []
    for lockstep in (False, True):
        result = evaluate(
            model,
            tokenizer,
            records,
            config,
            template="plain",
            fields=FIELDS,
            rank=rank,
            world_size=world_size,
            lockstep=lockstep,
        )
        found.append([[each.index, each.text] for each in result.predictions])
    return found


def both_kinds_on_all_ranks() -> Any:
    """Run by every rank: the results of all ranks."""
    return gather_json({kind: evaluate_on_this_rank(kind) for kind in ("generate", "choice")})


def test_two_ranks_find_what_one_finds(tokenizer: Any) -> None:
    of_ranks = run_ranks("tests.models.test_evaluation:both_kinds_on_all_ranks", 2)
    assert of_ranks[0] == of_ranks[1]
    model = tiny_llama(layers=1, vocab=384)
    for kind, records in (("generate", records_of(5)), ("choice", choices_of(5))):
        config = EvaluationConfig(kind=kind, batch_size=2, max_new_tokens=4)  # type: ignore[arg-type]
        alone = evaluate(model, tokenizer, records, config, template="plain", fields=FIELDS)
        expected = [[each.index, each.text] for each in alone.predictions]
        assert of_ranks[0][kind] == [expected, expected]
