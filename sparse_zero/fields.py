"""Is a JSON object from a file what it must be, field by field?

Whoever reads a header takes every field by its type and range, and ends with :meth:`Fields.end`: what is missing,
unknown, or of another type raises :class:`FieldError`, which says where and what.
"""

import re
from collections.abc import Collection
from typing import Any, NoReturn

# Steps, sizes: what a double holds exactly, so that no reader rounds it.
MAX_WHOLE = 2**53
# Characters of a value that an error shows.
_MAX_SHOWN = 80
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FieldError(ValueError):
    """A field that is missing, unknown, or not what it must be; the reader adds the file and the remedy."""


def shown(value: object) -> str:
    """``value`` for an error: quoted, in one line, and not long."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def is_whole(value: object, low: int = 0, high: int = MAX_WHOLE) -> bool:
    """Whether ``value`` is an integer from ``low`` to ``high``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


class Fields:
    """The fields of one JSON object, each taken once; what is left at the end is refused.

    Args:
        content: what must be an object.
        where: what it is, for errors: "the header".

    Raises:
        FieldError: ``content`` is no object; all methods raise it as well.
    """

    def __init__(self, content: object, where: str) -> None:
        self._where = where
        if not isinstance(content, dict):
            raise FieldError(f"{where} is {shown(content)} instead of an object with fields")
        self._left: dict[str, Any] = dict(content)

    def refuse(self, name: str, value: object, expected: str) -> NoReturn:
        """Raise for a field that has another value than ``expected`` says."""
        raise FieldError(f"{self._where} has {name} {shown(value)} instead of {expected}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not taken yet."""
        return name in self._left

    def anything(self, name: str) -> Any:
        """The field as it is, which must be there."""
        if name not in self._left:
            raise FieldError(f"{self._where} has no {name}")
        return self._left.pop(name)

    def text(self, name: str, pattern: re.Pattern[str] | None = None, expected: str = "a text") -> str:
        """A text, which ``pattern`` matches from end to end."""
        value = self.anything(name)
        if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
            self.refuse(name, value, expected)
        return value

    def sha256(self, name: str) -> str:
        """A SHA-256 in lower-case hexadecimal digits."""
        return self.text(name, _SHA256, "64 hexadecimal digits")

    def choice(self, name: str, choices: Collection[str]) -> str:
        """One of some texts."""
        value = self.anything(name)
        if not isinstance(value, str) or value not in choices:
            self.refuse(name, value, f"one of {', '.join(choices)}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.anything(name)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return value

    def whole(self, name: str, low: int = 0, high: int = MAX_WHOLE) -> int:
        """An integer in a range, both ends included."""
        value = self.anything(name)
        if not is_whole(value, low, high):
            self.refuse(name, value, f"a whole number from {low} to {high}")
        number: int = value
        return number

    def whole_or_none(self, name: str, low: int = 0, high: int = MAX_WHOLE) -> int | None:
        """An integer in a range, or null."""
        return self.anything(name) if self._left.get(name) is None else self.whole(name, low, high)

    def wholes(self, name: str, length: int, low: int = 0, high: int = MAX_WHOLE) -> tuple[int, ...]:
        """A list of ``length`` integers in a range."""
        value = self.anything(name)
        if not isinstance(value, list) or len(value) != length or not all(is_whole(each, low, high) for each in value):
            self.refuse(name, value, f"{length} whole numbers from {low} to {high}")
        return tuple(value)

    def number(self, name: str, low: float, high: float) -> float:
        """A number in a range, both ends included."""
        value = self.anything(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(name, value, f"a number from {low:g} to {high:g}")
        return value

    def texts(self, name: str, pattern: re.Pattern[str] | None = None, expected: str = "a list of texts") -> list[str]:
        """A list of texts."""
        value = self.anything(name)
        is_fine = isinstance(value, list) and all(
            isinstance(each, str) and (pattern is None or pattern.fullmatch(each)) for each in value
        )
        if not is_fine:
            self.refuse(name, value, expected)
        found: list[str] = value
        return found

    def listed(self, name: str) -> list[Any]:
        """A list of anything."""
        value = self.anything(name)
        if not isinstance(value, list):
            self.refuse(name, value, "a list")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object."""
        value = self.anything(name)
        if not isinstance(value, dict):
            self.refuse(name, value, "an object")
        return value

    def mapping_or_none(self, name: str) -> dict[str, Any] | None:
        """An object, or null."""
        return self.anything(name) if self._left.get(name) is None else self.mapping(name)

    def end(self) -> None:
        """Refuse what has not been taken."""
        if self._left:
            raise FieldError(f"{self._where} has a field {shown(next(iter(self._left)))}, which is unknown")
