"""Which answer does a generated text give, and is it the right one?"""

from __future__ import annotations

import re
from fractions import Fraction

# Numbers closer than this are equal, as in the evaluation code of LLM-Adapters (arXiv 2304.01933).
NUMBER_TOLERANCE = Fraction(1, 1000)
# The labels of LLM-Adapters' commonsense sets: each set numbers one of these words, or says true or false.
LABEL_FAMILIES = (
    re.compile(r"\b(?:answer|option|solution|ending)[1-9]\d?\b", re.IGNORECASE),
    re.compile(r"\b(?:true|false)\b", re.IGNORECASE),
)
_LETTER = re.compile(r"(?<![A-Za-z'’])([A-E])(?![A-Za-z'’])")
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
# More digits of an exponent than these are no number that anybody answers, but one that fills the memory.
_UNSIGNED = rf"(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,3}}(?!\w))?"
# A minus behind a number or a bracket subtracts, one before a space is a dash; a sign that touches a number is its own.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])[-−])?[$€£]?"
    rf"(?P<above>{_UNSIGNED})(?:\s?/\s?(?P<below>{_UNSIGNED}))?"
)
# \frac takes what is in braces, or a single digit. A number before it is the whole part of a mixed one.
_LATEX_FRACTION = re.compile(
    r"(?P<whole>(?<=\d)\s*)?\\[dt]?frac(?:\{([^{}]+)\}|(\d))(?:\{([^{}]+)\}|(\d))(?P<more>(?=\d))?"
)
_INTEGER = re.compile(rf"[-−]?[$€£]?{_WHOLE}")
_OPTIONS = re.compile(r"answer format:\s*([^\n]+)", re.IGNORECASE)


def numbers_in(text: str) -> list[tuple[str, Fraction]]:
    """Every number of a text, as written and as a value.

    Such as ``$1,234.50``, ``-3``, ``1/2``, ``2 1/2``, ``1e3``, ``\\frac{1}{2}`` and ``\\frac12``.
    """
    plain = _plain_fractions(text)
    found: list[tuple[str, Fraction]] = []
    end = -1
    for match in _NUMBER.finditer(plain):
        try:
            value = Fraction(match["above"].replace(",", ""))
            if match["below"] is not None:
                value /= Fraction(match["below"].replace(",", ""))
        except (ValueError, ZeroDivisionError):  # more digits than Python converts, or no fraction at all
            continue
        written = match[0].strip()
        is_part = match["below"] is not None and written[0].isdigit() and value < 1
        if is_part and match.start() == end + 1 and plain[end] == " " and _INTEGER.fullmatch(found[-1][0]):
            whole, number = found.pop()
            found.append((f"{whole} {written}", number - value if whole[0] in "-−" else number + value))
        else:
            found.append((written, -value if match["sign"] else value))
        end = match.end()
    return found


def as_number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else but a unit sign or a full stop, else None."""
    stripped = text.strip().removesuffix(".").removesuffix("%").strip()
    found = numbers_in(stripped)
    if len(found) != 1 or found[0][0] != _plain_fractions(stripped):
        return None
    return found[0][1]


def _plain_fractions(text: str) -> str:
    """A text whose LaTeX fractions are written with a slash."""

    def plain(match: re.Match[str]) -> str:
        space = "" if match["whole"] is None else " "
        behind = "" if match["more"] is None else " "
        return f"{space}{match[2] or match[3]}/{match[4] or match[5]}{behind}"

    return _LATEX_FRACTION.sub(plain, text)


def normalize(text: str) -> str:
    """Text without what does not change an answer: case, runs of space, quotes and a closing mark."""
    return " ".join(text.casefold().split()).strip(" \"'`.,;:!")


def judge(text: str, answer: str) -> tuple[str, bool]:
    """The answer that a text gives, read in the form of the right answer, and whether the two agree.

    - a number: the last number of the text, equal by value (``3.0`` is ``3``, ``1,000`` is ``1000``, ``2 1/2`` is
      ``2.5``);
    - a label of a multiple choice (``answer2``, ``true``): the first label of the same family;
    - a letter A to E: the last one that stands alone;
    - anything else: the whole text, normalised.
    """
    wanted = as_number(answer)
    if wanted is not None:
        numbers = numbers_in(text)
        if not numbers:
            return "", False
        written, value = numbers[-1]
        return written, abs(value - wanted) <= NUMBER_TOLERANCE
    stripped = answer.strip()
    for family in LABEL_FAMILIES:
        if family.fullmatch(stripped):
            first = family.search(text)
            given = first[0].lower() if first else ""
            return given, given == stripped.lower()
    if _LETTER.fullmatch(stripped):
        letters = _LETTER.findall(text)
        return (letters[-1], letters[-1] == stripped) if letters else ("", False)
    return text.strip(), normalize(text) == normalize(answer)


def options_in(text: str) -> tuple[str, ...]:
    """The options that a text offers as ``Answer format: answer1/answer2``; empty where it offers none."""
    found = _OPTIONS.findall(text)
    options = [option.strip() for option in found[-1].split("/")] if found else []
    return tuple(option.rstrip(".") for option in options if option)
