"""Which labelled texts are trained and tested on: from a file, or made up?"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from scripts.ntk.study_config import SamplesConfig
from sparse_zero.errors import InputError

_SUBJECTS = (
    "the film", "the plot", "the cast", "the music", "the script", "the ending", "the humour", "the direction",
    "the dialogue", "the opening scene", "the second half", "the camera work",
)  # fmt: skip
_ADVERBS = ("", "simply ", "often ", "at times ", "from start to end ", "as expected ", "really ", "in every way ")
_WORDS = {
    0: ("dull", "clumsy", "boring", "lifeless", "painful to watch", "a waste of time", "tired", "badly made", "ugly"),
    1: ("moving", "clever", "charming", "full of life", "a joy to watch", "a small wonder", "fresh", "well made"),
}
_ENDS = (".", " , and that is all .", " , said a friend .", " , whatever the reviews say .")


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """One sample; the label is a class number from 0 on."""

    text: str
    second: str | None
    label: int


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Training samples to draw from, test samples, and the names of the classes."""

    train: tuple[LabelledText, ...]
    test: tuple[LabelledText, ...]
    classes: tuple[str, ...]


def made_up_texts(seed: int = 0) -> tuple[list[LabelledText], list[LabelledText]]:
    """Short verdicts on films, half of them good, without one that is in both parts."""
    texts = [
        LabelledText(text=f"{subject} is {adverb}{word}{end}", second=None, label=label)
        for label, words in _WORDS.items()
        for subject, adverb, word, end in product(_SUBJECTS, _ADVERBS, words, _ENDS)
    ]
    Random(seed).shuffle(texts)
    return texts[: len(texts) // 2], texts[len(texts) // 2 :]


def _read(source: str, name: str) -> list[dict[str, Any]]:
    path = Path(source).expanduser()
    if path.suffix.lower() != ".tsv":
        from models.records import read_records

        return [dict(record) for record in read_records(source, field=f"data.{name}", split=name)]
    if not path.is_file():
        raise InputError(f"data.{name} is {source!r}: there is no such file; correct the path")
    # Quotation marks are part of the text in GLUE's files.
    with path.open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not records:
        raise InputError(f"data.{name} is {source!r}: it holds no records")
    return records


def _column(records: Sequence[dict[str, Any]], column: str, setting: str, source: str) -> list[str]:
    values = [record.get(column) for record in records]
    if any(value is None for value in values):
        found = ", ".join(map(str, records[0]))
        raise InputError(f"data.{setting} is {column!r}, which not every record of {source} has: it has {found}")
    return [str(value) for value in values]


def read_texts(config: SamplesConfig) -> LabelledTexts:
    """The texts of both files, or made up ones.

    Raises:
        InputError: a file or a column is missing, or there are less than two classes.
    """
    if config.train is None or config.test is None:
        train, test = made_up_texts()
        return LabelledTexts(train=tuple(train), test=tuple(test), classes=("negative", "positive"))
    parts = {}
    for name, source in (("train", config.train), ("test", config.test)):
        records = _read(source, name)
        texts = _column(records, config.text, "text", source)
        labels = _column(records, config.label, "label", source)
        seconds: Sequence[str | None] = [None] * len(texts)
        if config.second_text is not None:
            seconds = _column(records, config.second_text, "second_text", source)
        parts[name] = list(zip(texts, seconds, labels, strict=True))
    classes = sorted({label for _, _, label in parts["train"]})
    if not 2 <= len(classes) <= 20:
        raise InputError(f"data.label is {config.label!r}, with {len(classes)} classes: give data with 2 to 20")
    unknown = {label for _, _, label in parts["test"]} - set(classes)
    if unknown:
        raise InputError(f"data.test is {config.test!r}: its label {sorted(unknown)[0]!r} is not in the training data")
    found = {
        name: tuple(LabelledText(text=text, second=second, label=classes.index(label)) for text, second, label in part)
        for name, part in parts.items()
    }
    return LabelledTexts(**found, classes=tuple(classes))


def few_shot(texts: LabelledTexts, shots: int, seed: int) -> tuple[list[LabelledText], list[LabelledText]]:
    """``shots`` training samples of each class, ordered by class, and as many others for a head.

    Raises:
        InputError: a class has less than both together.
    """
    by_class: dict[int, list[LabelledText]] = defaultdict(list)
    for sample in texts.train:
        by_class[sample.label].append(sample)
    drawn, others = [], []
    for label, name in enumerate(texts.classes):
        if len(by_class[label]) < 2 * shots:
            raise InputError(
                f"shots has {shots}, and the class {name} {len(by_class[label])} training samples, of which "
                "twice as many are drawn (the others for the head); lower it"
            )
        both = Random(f"{seed}/{label}").sample(by_class[label], 2 * shots)
        drawn += both[:shots]
        others += both[shots:]
    return drawn, others


def test_samples(texts: LabelledTexts, number: int) -> list[LabelledText]:
    """The same for every seed of the study.

    Raises:
        InputError: there are less.
    """
    if len(texts.test) < number:
        raise InputError(f"data.num_test is {number}: there are {len(texts.test)} test samples; lower it")
    return Random(0).sample(list(texts.test), number)
