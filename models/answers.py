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
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus behind a number or a bracket subtracts; a sign in front of one belongs to it.
_NUMBER = re.compile(rf"(?P<sign>(?<![\w.)\]])[-−]\s?)?[$€£]?(?P<above>{_UNSIGNED})(?:\s?/\s?(?P<below>{_UNSIGNED}))?")
_LATEX_FRACTION = re.compile(r"\\d?frac\{([^{}]+)\}\{([^{}]+)\}")
_OPTIONS = re.compile(r"answer format:\s*([^\n]+)", re.IGNORECASE)


def numbers_in(text: str) -> list[tuple[str, Fraction]]:
    """Every number of a text, as written and as a value: ``$1,234.50``, ``-3``, ``1/2``, ``\\frac{1}{2}``."""
    found = []
    for match in _NUMBER.finditer(_LATEX_FRACTION.sub(r"\1/\2", text)):
        try:
            value = Fraction(match["above"].replace(",", ""))
            if match["below"] is not None:
                value /= Fraction(match["below"].replace(",", ""))
        except (ValueError, ZeroDivisionError):  # more digits than Python converts, or no fraction at all
            continue
        found.append((match[0].strip(), -value if match["sign"] else value))
    return found


def as_number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else but a unit sign or a full stop, else None."""
    stripped = text.strip().removesuffix(".").removesuffix("%").strip()
    found = numbers_in(stripped)
    if len(found) != 1 or found[0][0] != _LATEX_FRACTION.sub(r"\1/\2", stripped):
        return None
    return found[0][1]


def normalize(text: str) -> str:
    """Text without what does not change an answer: case, runs of space, quotes and a closing mark."""
    return " ".join(text.casefold().split()).strip(" \"'`.,;:!")


def judge(text: str, answer: str) -> tuple[str, bool]:
    """The answer that a text gives, read in the form of the right answer, and whether the two agree.

    - a number: the last number of the text, equal by value (``3.0`` is ``3``, ``1,000`` is ``1000``);
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
