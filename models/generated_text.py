"""What text can a model of a few million parameters learn from in minutes, without any corpus?

A small language: people, things, places, colours, weather and days, and what happens to them, in documents of a few
sentences that hang together. Who has how many of what is kept count of, so that to predict a number a model must add
and subtract; sums also stand by themselves. The words are those of :mod:`models.word_problems`, but none of its
problems, nor a question about a number: whoever is tuned on those has not seen the task before.
"""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TypeVar

from models.word_problems import NAMES, PLACES, PRICED, THINGS
from sparse_zero.errors import InputError

_T = TypeVar("_T")

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
SIZES = ("small", "large", "old", "new", "heavy", "light", "round", "plain")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SITES = ("garden", "kitchen", "market", "school", "harbour", "forest", "library", "station", "village", "workshop")
WEATHER = {
    "rains": ("takes an umbrella", "stays inside", "gets wet"),
    "snows": ("puts on a coat", "builds a snowman", "feels the cold"),
    "is sunny": ("sits outside", "looks for shade", "goes for a walk"),
    "is windy": ("flies a kite", "holds the hat", "closes the window"),
}
# What animals eat and where they live: the same in every document.
ANIMALS = {
    "cat": ("fish", "house"), "dog": ("meat", "yard"), "horse": ("hay", "stable"), "cow": ("grass", "field"),
    "hen": ("corn", "barn"), "rabbit": ("carrots", "burrow"), "bear": ("honey", "cave"), "duck": ("bread", "pond"),
    "mouse": ("cheese", "wall"), "bird": ("seeds", "nest"),
}  # fmt: skip
ORDER = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip


def generate_documents(num_characters: int, seed: int) -> Iterator[str]:
    """Documents of one paragraph each, until they have so many characters together.

    Args:
        num_characters: at least 1.
        seed: not negative; equal seeds give equal documents, and more characters the same ones and more.

    Raises:
        InputError: a number is out of range.
    """
    if num_characters < 1:
        raise InputError(f"num_characters is {num_characters}: it must be at least 1")
    if seed < 0:
        raise InputError(f"seed is {seed}: it must not be negative")
    random = Random(seed)
    while num_characters > 0:
        text = _pick(random, _KINDS)(random)
        yield text
        num_characters -= len(text)


def generate_text(num_characters: int, seed: int) -> str:
    """The documents of :func:`generate_documents`, an empty line between any two."""
    return "\n\n".join(generate_documents(num_characters, seed)) + "\n"


def _between(random: Random, low: int, high: int) -> int:
    # Random.random alone has a sequence that Python promises to keep.
    return low + int(random.random() * (high - low + 1))


def _pick(random: Random, items: Sequence[_T]) -> _T:
    return items[_between(random, 0, len(items) - 1)]


def _two(random: Random, items: Sequence[_T]) -> tuple[_T, _T]:
    first = _between(random, 0, len(items) - 1)
    second = _between(random, 0, len(items) - 2)
    return items[first], items[second + (second >= first)]


def _counted(random: Random) -> str:
    """Somebody gets and gives away things; how many there are is told after every change."""
    (name, other), things = _two(random, NAMES), _pick(random, THINGS)
    number = _between(random, 5, 60)
    parts = [f"{name} has {number} {things}."]
    for _ in range(_between(random, 2, 4)):
        change = _between(random, 2, 30)
        if number - change >= 2 and random.random() < 0.5:
            number -= change
            how = (
                f"{name} gives {change} {things} to {other}",
                f"{name} sells {change} {things}",
                f"{other} takes {change} of them",
            )
        else:
            number += change
            how = (
                f"{name} buys {change} more {things}",
                f"{other} brings {change} {things}",
                f"{name} finds {change} more",
            )
        parts.append(f"{_pick(random, how)}. Now {name} has {number} {things}.")
    return " ".join(parts)


def _grouped(random: Random) -> str:
    """Equal groups and what they hold together."""
    name, things, places = _pick(random, NAMES), _pick(random, THINGS), _pick(random, PLACES)
    a, b = _between(random, 2, 12), _between(random, 2, 12)
    site = _pick(random, SITES)
    ways = (
        f"In the {site} there are {a} {places} with {b} {things} in each. That makes {a * b} {things}.",
        f"{name} carries {a} {places} of {b} {things} to the {site}. Together they hold {a * b} {things}.",
        f"{a * b} {things} lie in the {site}. {name} puts them into {a} {places}, and each of them gets {b} {things}.",
    )
    return _pick(random, ways)


def _sums(random: Random) -> str:
    """Sums, differences, products and quotients, as a table in a school book has them."""
    lines = []
    for _ in range(_between(random, 4, 8)):
        kind, a, b = _pick(random, "++--*/"), _between(random, 2, 60), _between(random, 2, 39)
        if kind in "*/":
            a, b = _between(random, 2, 12), _between(random, 2, 12)
        lines.append(
            {
                "+": f"{a} + {b} = {a + b}.",
                "-": f"{a + b} - {b} = {a}.",
                "*": f"{a} * {b} = {a * b}.",
                "/": f"{a * b} / {a} = {b}.",
            }[kind]
        )
    return " ".join(lines)


def _sequence(random: Random) -> str:
    """Counting up or down in equal steps; in words, too."""
    step, length = _between(random, 1, 10), _between(random, 5, 9)
    start = _between(random, 0, 40)
    numbers = [start + step * place for place in range(length)]
    if random.random() < 0.5:
        numbers.reverse()
    text = f"{_pick(random, NAMES)} counts: {', '.join(map(str, numbers))}."
    number = _between(random, 0, 12)
    return f"{text} The word for {number} is {NUMBER_WORDS[number]}."


def _described(random: Random) -> str:
    """A thing with its colour and size, told again in other words."""
    name, things, site = _pick(random, NAMES), _pick(random, THINGS), _pick(random, SITES)
    (colour, other), size = _two(random, COLOURS), _pick(random, SIZES)
    ways = (
        f"The {things} of {name} are {colour}. They are not {other}. {name} keeps the {size} {colour} {things} in the "
        f"{site}.",
        f"{name} looks for {size} {things} in the {site}. There are {other} ones, but {name} takes the {colour} "
        f"{things}.",
        f"What colour are the {things}? They are {colour}, says {name}. And where are they? They are in the {site}.",
    )
    return _pick(random, ways)


def _weathered(random: Random) -> str:
    """A day, its weather and what people do then; the day after."""
    day = _between(random, 0, 6)
    weather, tomorrow = _two(random, tuple(WEATHER))
    (name, other), site = _two(random, NAMES), _pick(random, SITES)
    return (
        f"On {DAYS[day]} it {weather}. {name} {_pick(random, WEATHER[weather])}. After {DAYS[day]} comes "
        f"{DAYS[(day + 1) % 7]}. Then it {tomorrow}, and {other}, who is at the {site}, "
        f"{_pick(random, WEATHER[tomorrow])}."
    )


def _animal(random: Random) -> str:
    """What an animal eats and where it lives."""
    (animal, other), (name, friend) = _two(random, tuple(ANIMALS)), _two(random, NAMES)
    food, home = ANIMALS[animal]
    ways = (
        f"{name} has a {animal}. The {animal} eats {food} and lives in the {home}. {friend} has a {other}, which eats "
        f"{ANIMALS[other][0]}.",
        f"Where does the {animal} live? It lives in the {home}. What does the {other} eat? It eats "
        f"{ANIMALS[other][0]}.",
        f"{name} brings {food} for the {animal} to the {home}. The {other} gets {ANIMALS[other][0]} from {friend}.",
    )
    return _pick(random, ways)


def _shop(random: Random) -> str:
    """What is bought where, and what it costs together."""
    (name, other), (item, items), site = _two(random, NAMES), _pick(random, PRICED), _pick(random, SITES)
    price, number = _between(random, 2, 12), _between(random, 2, 9)
    return (
        f"At the {site} {item} costs {price} dollars. {name} wants {number} {items} and pays {price * number} dollars. "
        f"{other} wants one and pays {price} dollars."
    )


def _queue(random: Random) -> str:
    """People in a row, and who stands where."""
    people: list[str] = []
    while len(people) < _between(random, 3, 6):
        name = _pick(random, NAMES)
        if name not in people:
            people.append(name)
    place = _between(random, 1, len(people) - 1)
    return (
        f"{', '.join(people[:-1])} and {people[-1]} stand in a row at the {_pick(random, SITES)}. The first is "
        f"{people[0]}. The {ORDER[place]} is {people[place]}, behind {people[place - 1]}. The last is {people[-1]}."
    )


def _compared(random: Random) -> str:
    """Who has more."""
    (name, other), things = _two(random, NAMES), _pick(random, THINGS)
    a, b = _between(random, 2, 60), _between(random, 2, 60)
    if a == b:
        return f"{name} has {a} {things} and {other} has {b} {things}. They have the same number of {things}."
    more, fewer = (name, other) if a > b else (other, name)
    return (
        f"{name} has {a} {things} and {other} has {b} {things}. {more} has more {things} than {fewer}, since "
        f"{max(a, b)} is more than {min(a, b)}. The difference is {abs(a - b)}."
    )


# Those with numbers twice: they are what is hard.
_KINDS: tuple[Callable[[Random], str], ...] = (
    _counted, _counted, _grouped, _sums, _sums, _sequence, _described, _weathered, _animal, _shop, _queue, _compared,
)  # fmt: skip
