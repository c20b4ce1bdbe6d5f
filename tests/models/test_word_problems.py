"""Are the word problems right, different in every split, balanced, and the same for the same seed?"""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from models.data import DataConfig, load_records
from models.word_problems import PROBLEM_TEMPLATES, draw_problem, generate_word_problems, write_word_problems
from sparse_zero.errors import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_word_problems.py"


@pytest.fixture(scope="module")
def splits():
    return generate_word_problems(num_train=4000, num_validation=100, num_test=200, seed=0)


def compute(left: int, operator: str, right: int) -> int:
    if operator == "/":
        assert left % right == 0, (left, right)
        return left // right
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def test_every_calculation_is_right_and_uses_the_numbers_of_the_text(splits):
    for problem in (problem for split in splits.values() for problem in split):
        assert list(problem) == ["instruction", "input", "output", "answer"]
        assert problem["input"] == ""
        calculation, _, last = problem["output"].partition(" The answer is ")
        assert last == f"{problem['answer']}."
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", calculation)
        assert " ".join("{} {} {} = {}.".format(*step) for step in steps) == calculation
        assert 1 <= len(steps) <= 2
        known = Counter(re.findall(r"\d+", problem["instruction"]))
        for left, operator, right, result in steps:
            assert compute(int(left), operator, int(right)) == int(result)
            assert {left, right} <= set(known)
            known[result] += 1
        assert result == problem["answer"]
        assert 1 <= int(result) <= 150
        # Every number of the question is needed.
        used = {number for left, _, right, _ in steps for number in (left, right)}
        assert set(re.findall(r"\d+", problem["instruction"])) <= used


def test_no_question_occurs_twice_in_or_across_splits(splits):
    assert {name: len(split) for name, split in splits.items()} == {
        "test": 200,
        "validation": 100,
        "train": 4000,
    }
    texts = [problem["instruction"] for split in splits.values() for problem in split]
    assert len(set(texts)) == 4300


def operations(problems):
    return Counter("".join(re.findall(r" ([-+*/]) ", problem["output"])) for problem in problems)


def test_splits_are_balanced_over_templates_in_random_order(splits):
    assert len(PROBLEM_TEMPLATES) >= 8
    assert {"+", "-", "*", "/", "+-", "--", "*+", "*-", "/+"} == set(operations(splits["train"]))
    share = {name: operations(split) for name, split in splits.items()}
    for kind, number in share["train"].items():
        for name, split in splits.items():
            expected = number / len(splits["train"])
            assert share[name][kind] / len(split) == pytest.approx(expected, abs=3 / len(split))
    halves = operations(splits["train"][:2000]), operations(splits["train"][2000:])
    for kind in halves[0]:
        assert halves[0][kind] == pytest.approx(halves[1][kind], rel=0.35)


@pytest.mark.parametrize("template", PROBLEM_TEMPLATES, ids=lambda template: template.name)
def test_templates_are_filled_short_and_name_different_people(template):
    random = Random(3)
    problems = [draw_problem(template, random) for _ in range(200)]
    assert len({problem["instruction"] for problem in problems}) > 150
    assert len({problem["answer"] for problem in problems}) > 5
    for problem in problems:
        assert not re.search(r"[{}]", problem["instruction"])
        assert len(problem["instruction"].split()) <= 24
        assert len(problem["output"].split()) <= 14
    two_people = [text for text in template.texts if "{other}" in text]
    for text in two_people:
        found = re.compile(re.sub(r"\\\{\w+\\\}", r"(\\w+)", re.escape(text)))
        names = re.findall(r"\{(\w+)\}", text)
        for match in filter(None, (found.fullmatch(problem["instruction"]) for problem in problems)):
            values = dict(zip(names, match.groups(), strict=True))
            assert values["name"] != values["other"]


def test_same_seed_same_problems_and_test_set_independent_of_training_size(splits):
    assert generate_word_problems(num_train=4000, num_validation=100, num_test=200, seed=0) == splits
    assert generate_word_problems(num_train=10, num_validation=5, num_test=200, seed=0)["test"] == splits["test"]
    assert generate_word_problems(num_train=10, num_validation=5, num_test=200, seed=1)["test"] != splits["test"]


def test_files_are_complete_and_readable_as_data(tmp_path, splits):
    folder = write_word_problems(tmp_path / "a" / "b", num_train=30, num_validation=5, num_test=8, seed=4)
    assert sorted(path.name for path in folder.iterdir()) == ["test.json", "train.json", "validation.json"]
    config = DataConfig(train=str(folder), validation=str(folder), test=str(folder))
    expected = generate_word_problems(num_train=30, num_validation=5, num_test=8, seed=4)
    for split in ("train", "validation", "test"):
        assert load_records(config, split) == expected[split]
    before = (folder / "train.json").read_bytes()
    write_word_problems(folder, num_train=30, num_validation=5, num_test=8, seed=4)
    assert (folder / "train.json").read_bytes() == before


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    folder = write_word_problems(tmp_path, num_train=3, num_validation=2, num_test=2, seed=0)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        write_word_problems(tmp_path, num_train=3, num_validation=2, num_test=2, seed=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_bad_numbers_are_named_errors_before_anything_is_written(tmp_path):
    for name in ("num_train", "num_validation", "num_test"):
        numbers = {"num_train": 1, "num_validation": 1, "num_test": 1, name: 0}
        with pytest.raises(InputError, match=f"{name} is 0"):
            write_word_problems(tmp_path / "new", **numbers, seed=0)
    with pytest.raises(InputError, match="seed is -1"):
        write_word_problems(tmp_path / "new", 1, 1, 1, seed=-1)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_word_problems(tmp_path / "file", 1, 1, 1, seed=0)


def test_more_problems_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr("models.word_problems.NAMES", ("Ada", "Ben"))
    monkeypatch.setattr("models.word_problems.THINGS", ("nuts",))
    monkeypatch.setattr("models.word_problems.PROBLEM_TEMPLATES", PROBLEM_TEMPLATES[4:5])
    with pytest.raises(InputError, match=r"different word problems.*ask for fewer"):
        generate_word_problems(num_train=5000, num_validation=1, num_test=1, seed=0)


def test_script_writes_the_files_or_says_why_not(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("make_word_problems", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = ["--train", "20", "--validation", "4", "--test", "6", "--seed", "2"]
    assert script.main(["--folder", str(tmp_path), *sizes]) == 0
    assert "20 training, 4 validation and 6 test problems" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "test.json").read_text())) == 6
    assert script.main(["--folder", str(tmp_path / "new"), "--train", "0"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "make_word_problems: num_train is 0: it must be at least 1\n"
