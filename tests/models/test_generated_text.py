"""Is the generated text true, the same for equal seeds, and without the problems that a model is tuned on?"""

import re

import pytest

from models.generated_text import DAYS, generate_documents, generate_text
from models.word_problems import generate_word_problems
from sparse_zero.errors import InputError

TEXT = generate_text(200_000, 5)


def test_sums_and_counts_are_right() -> None:
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    sums = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", TEXT)
    assert len(sums) > 500
    assert all(operations[sign](int(a), int(b)) == int(c) for a, sign, b, c in sums)
    changes = re.findall(
        r"has (\d+) (\w+)\. (\w+) (buys|sells|gives|takes|brings|finds) (\d+)[^.]*\. Now \w+ has (\d+) \2", TEXT
    )
    assert len(changes) > 200
    for before, _, _, verb, change, after in changes:
        assert int(after) == int(before) + int(change) * (1 if verb in ("buys", "brings", "finds") else -1)
    for first, second in re.findall(r"After (\w+) comes (\w+)\.", TEXT):
        assert DAYS[(DAYS.index(first) + 1) % 7] == second


def test_equal_seeds_give_equal_text_and_more_characters_more_of_it() -> None:
    assert generate_text(20_000, 5) == generate_text(20_000, 5)
    assert generate_text(20_000, 6) != generate_text(20_000, 5)
    documents = list(generate_documents(20_000, 5))
    assert documents == list(generate_documents(200_000, 5))[: len(documents)]
    assert 20_000 <= sum(map(len, documents)) < 21_000
    assert not any("\n" in each or each != each.strip() for each in documents)


def test_no_word_problem_is_in_it() -> None:
    problems = generate_word_problems(300, 20, 20, 0)
    assert not any(each["instruction"] in TEXT or each["output"] in TEXT for part in problems.values() for each in part)
    assert "How many" not in TEXT
    assert "answer" not in TEXT


@pytest.mark.parametrize(("number", "seed", "message"), [(0, 0, "num_characters is 0"), (5, -1, "seed is -1")])
def test_bad_arguments_are_named(number: int, seed: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate_text(number, seed)
