"""Which arithmetic word problems does the quickstart train and test on?

A problem is one of a number of story templates with names, things and numbers drawn at random. The response
shows the calculation and ends with "The answer is N.". The numbers are small (sums and differences below 100,
products up to 12 x 12), so that a model of 135M parameters can learn the form and most of the arithmetic in
minutes.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

from sparse_zero.errors import InputError

_T = TypeVar("_T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ada Amir Anna Ben Carla Chen Clara David Ella Emil Eva Farid Finn Grace Hana Hugo Ida Ivan Jack Jana "
    "Kira Leo Lena Liam Lucy Maria Max Mia Nina Noah Omar Oscar Paul Rosa Sam Sara Theo Tina Tom Zoe"
)
THINGS = _words(
    "apples oranges pears plums lemons cherries eggs nuts cookies muffins candies pencils pens crayons books "
    "cards coins stamps stickers marbles beads buttons shells stones flowers balloons balls blocks ribbons"
)
PLACES = _words("boxes bags baskets jars trays drawers bowls crates")
PRICED = (
    ("a ticket", "tickets"),
    ("a book", "books"),
    ("a sandwich", "sandwiches"),
    ("a notebook", "notebooks"),
    ("a mug", "mugs"),
    ("a poster", "posters"),
    ("a plant", "plants"),
    ("a lamp", "lamps"),
)
# Draws of one template in a row that may repeat known problems before it counts as exhausted.
_MAX_REPEATS = 1000
_FILE_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Story:
    """The numbers of one problem: what the text is filled with, and the calculation."""

    numbers: dict[str, int]  # by placeholder
    steps: tuple[tuple[int, str, int], ...]  # (left, operator, right); a later step may use an earlier result


@dataclass(frozen=True)
class ProblemTemplate:
    """A kind of story with its wordings and the distribution of its numbers."""

    name: str
    texts: tuple[str, ...]
    draw: Callable[[Random], Story]


def _between(random: Random, low: int, high: int) -> int:
    """A whole number, both ends included. Random.random alone has a sequence that Python promises to keep."""
    return low + int(random.random() * (high - low + 1))


def _pick(random: Random, items: Sequence[_T]) -> _T:
    return items[_between(random, 0, len(items) - 1)]


def _sum(random: Random) -> Story:
    a, b = _between(random, 2, 60), _between(random, 2, 39)
    return Story({"a": a, "b": b}, ((a, "+", b),))


def _difference(random: Random) -> Story:
    a = _between(random, 10, 99)
    b = _between(random, 2, a - 1)
    return Story({"a": a, "b": b}, ((a, "-", b),))


def _product(random: Random) -> Story:
    a, b = _between(random, 2, 12), _between(random, 2, 12)
    return Story({"a": a, "b": b}, ((a, "*", b),))


def _quotient(random: Random) -> Story:
    a, b = _between(random, 2, 12), _between(random, 2, 12)
    return Story({"n": a * b, "a": a}, ((a * b, "/", a),))


def _sum_then_difference(random: Random) -> Story:
    a, b = _between(random, 5, 40), _between(random, 2, 30)
    c = _between(random, 2, a + b - 1)
    return Story({"a": a, "b": b, "c": c}, ((a, "+", b), (a + b, "-", c)))


def _difference_twice(random: Random) -> Story:
    a = _between(random, 20, 90)
    b = _between(random, 2, a // 2)
    c = _between(random, 2, a // 2 - 1)
    return Story({"a": a, "b": b, "c": c}, ((a, "-", b), (a - b, "-", c)))


def _product_then_sum(random: Random) -> Story:
    a, b, c = _between(random, 2, 9), _between(random, 2, 9), _between(random, 2, 18)
    return Story({"a": a, "b": b, "c": c}, ((a, "*", b), (a * b, "+", c)))


def _product_then_difference(random: Random) -> Story:
    a, b = _between(random, 2, 9), _between(random, 2, 9)
    c = _between(random, 2, a * b - 1)
    return Story({"a": a, "b": b, "c": c}, ((a, "*", b), (a * b, "-", c)))


def _quotient_then_sum(random: Random) -> Story:
    a, b, c = _between(random, 2, 9), _between(random, 2, 9), _between(random, 2, 18)
    return Story({"n": a * b, "a": a, "c": c}, ((a * b, "/", a), (b, "+", c)))


def _change(random: Random) -> Story:
    a, b = _between(random, 2, 9), _between(random, 2, 9)
    paid = -(-(a * b + 1) // 10) * 10
    return Story({"a": a, "b": b, "c": paid}, ((a, "*", b), (paid, "-", a * b)))


def _times_as_many(random: Random) -> Story:
    a, b = _between(random, 2, 12), _between(random, 2, 6)
    return Story({"a": a, "b": b}, ((a, "*", b), (a, "+", a * b)))


PROBLEM_TEMPLATES: tuple[ProblemTemplate, ...] = (
    ProblemTemplate(
        "gain",
        (
            "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
            "There are {a} {things} on a table. {name} puts {b} more there. How many {things} are on the table?",
        ),
        _sum,
    ),
    ProblemTemplate(
        "together",
        (
            "{name} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?",
            "{name} finds {a} {things} and {other} finds {b}. How many {things} do they find in all?",
        ),
        _sum,
    ),
    ProblemTemplate(
        "loss",
        (
            "{name} has {a} {things} and gives {b} of them to {other}. How many {things} does {name} have left?",
            "There are {a} {things} in a shop. {name} buys {b} of them. How many {things} are left in the shop?",
        ),
        _difference,
    ),
    ProblemTemplate(
        "comparison",
        (
            "{name} has {a} {things}. {other} has {b} {things}. How many more {things} does {name} have than {other}?",
            "{name} needs {a} {things} and has {b}. How many {things} are still missing?",
        ),
        _difference,
    ),
    ProblemTemplate(
        "groups",
        (
            "{name} has {a} {places} with {b} {things} in each. How many {things} does {name} have?",
            "There are {b} {things} in each of {a} {places}. How many {things} are there in all?",
        ),
        _product,
    ),
    ProblemTemplate(
        "price",
        (
            "The price of {item} is {b} dollars. How many dollars do {a} {items} cost?",
            "{name} buys {a} {items} for {b} dollars each. How many dollars does {name} pay?",
        ),
        _product,
    ),
    ProblemTemplate(
        "sharing",
        (
            "{name} shares {n} {things} equally among {a} children. How many {things} does each child get?",
            "{a} friends split {n} {things} equally. How many {things} does each friend get?",
        ),
        _quotient,
    ),
    ProblemTemplate(
        "packing",
        (
            "{name} packs {n} {things} into {places} of {a}. How many {places} does {name} fill?",
            "{n} {things} are put away, {a} to each of the {places}. How many {places} are needed?",
        ),
        _quotient,
    ),
    ProblemTemplate(
        "gain then loss",
        (
            "{name} has {a} {things}, gets {b} more and loses {c}. How many {things} does {name} have now?",
            "A bus has {a} passengers. {b} get on and {c} get off. How many passengers are on the bus?",
        ),
        _sum_then_difference,
    ),
    ProblemTemplate(
        "two losses",
        (
            "{name} has {a} {things}, sells {b} and gives {c} to {other}. How many {things} does {name} have left?",
            "Of {a} {things}, {name} takes {b} and {other} takes {c}. How many {things} remain?",
        ),
        _difference_twice,
    ),
    ProblemTemplate(
        "groups and more",
        (
            "{name} has {a} {places} with {b} {things} each and {c} more {things}. How many {things} is that?",
            "{name} fills {a} {places} with {b} {things} each, and {c} {things} remain. How many {things} are there?",
        ),
        _product_then_sum,
    ),
    ProblemTemplate(
        "groups and fewer",
        (
            "{name} has {a} {places} with {b} {things} each and gives away {c} {things}. How many {things} are left?",
            "There are {a} {places} of {b} {things}, but {c} {things} are broken. How many {things} are fine?",
        ),
        _product_then_difference,
    ),
    ProblemTemplate(
        "share and more",
        (
            "{n} {things} are shared equally by {a} friends. {name}, one of them, had {c} before. "
            "How many does {name} have now?",
            "{name} and friends, {a} in all, split {n} {things} equally. {name} then gets {c} more. "
            "How many does {name} have?",
        ),
        _quotient_then_sum,
    ),
    ProblemTemplate(
        "change",
        (
            "{name} buys {a} {items} for {b} dollars each and pays with {c} dollars. How much change does {name} get?",
            "{name} has {c} dollars and buys {a} {items} at {b} dollars each. How many dollars are left?",
        ),
        _change,
    ),
    ProblemTemplate(
        "times as many",
        (
            "{name} has {a} {things}. {other} has {b} times as many. How many {things} do they have together?",
            "{name} reads {a} pages. {other} reads {b} times as many. How many pages do they read in all?",
        ),
        _times_as_many,
    ),
)


def solve(steps: tuple[tuple[int, str, int], ...]) -> list[int]:
    """The result of every step; the last one is the answer."""
    operations: dict[str, Callable[[int, int], int]] = {
        "+": lambda left, right: left + right,
        "-": lambda left, right: left - right,
        "*": lambda left, right: left * right,
        "/": lambda left, right: left // right,
    }
    return [operations[operator](left, right) for left, operator, right in steps]


def draw_problem(template: ProblemTemplate, random: Random) -> dict[str, str]:
    """One problem of a template as a record ``instruction``, ``input`` (empty), ``output``, ``answer``."""
    story = template.draw(random)
    text = _pick(random, template.texts)
    name = _pick(random, NAMES)
    other = _pick(random, [each for each in NAMES if each != name])
    item, items = _pick(random, PRICED)
    words = {"name": name, "other": other, "item": item, "items": items}
    words |= {"things": _pick(random, THINGS), "places": _pick(random, PLACES)}
    results = solve(story.steps)
    shown = [f"{a} {op} {b} = {result}." for (a, op, b), result in zip(story.steps, results, strict=True)]
    return {
        "instruction": text.format(**words, **story.numbers),
        "input": "",
        "output": f"{' '.join(shown)} The answer is {results[-1]}.",
        "answer": str(results[-1]),
    }


def generate_word_problems(
    num_train: int, num_validation: int, num_test: int, seed: int
) -> dict[str, list[dict[str, str]]]:
    """Draw the splits ``train``, ``validation`` and ``test``.

    All splits have the same distribution: the same number of problems of every template (within one), in
    random order. No problem text occurs twice, within or across splits. The test problems depend on
    ``num_test`` and ``seed`` only, so that runs on more training data are measured on the same problems.

    Raises:
        InputError: a number is out of range, or larger than the number of different problems.
    """
    for name, value in (("num_train", num_train), ("num_validation", num_validation), ("num_test", num_test)):
        if value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    if seed < 0:
        raise InputError(f"seed is {seed}: it must not be negative")
    random = Random(seed)
    known: set[str] = set()
    splits = {}
    for split, number in (("test", num_test), ("validation", num_validation), ("train", num_train)):
        problems = [
            _draw_new(PROBLEM_TEMPLATES[index % len(PROBLEM_TEMPLATES)], random, known) for index in range(number)
        ]
        keyed = [(random.random(), problem) for problem in problems]
        splits[split] = [problem for _, problem in sorted(keyed, key=lambda pair: pair[0])]
    return splits


def _draw_new(template: ProblemTemplate, random: Random, known: set[str]) -> dict[str, str]:
    for _ in range(_MAX_REPEATS):
        problem = draw_problem(template, random)
        if problem["instruction"] not in known:
            known.add(problem["instruction"])
            return problem
    raise InputError(f"there are no {len(known) + 1} different word problems to be had: ask for fewer")


def write_word_problems(folder: str | Path, num_train: int, num_validation: int, num_test: int, seed: int) -> Path:
    """Write ``train.json``, ``validation.json`` and ``test.json`` in the LLM-Adapters form; equal for equal
    arguments.

    Every file appears complete or not at all, and replaces one that is there.

    Returns:
        The folder, created if needed.

    Raises:
        InputError: as :func:`generate_word_problems`, before anything is written; or the folder cannot be
            written.
    """
    splits = generate_word_problems(num_train, num_validation, num_test, seed)
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        for split in _FILE_SPLITS:
            _write_atomically(path / f"{split}.json", json.dumps(splits[split], indent=1) + "\n")
    except OSError as error:
        raise InputError(f"folder is {str(folder)!r}: it cannot be written ({error.strerror}); name another") from error
    return path


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
