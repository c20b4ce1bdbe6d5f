"""How do records of texts and labels become samples for a classifier, and which class is which label?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.data import ClassifiedSample, DataConfig, DataWarning, SampleSet, Split, load_records
from models.weight_files import read_json_object
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts tokenized in one call: what the tokenizer tells of each token (its place, its text) takes more than the token.
_CHUNK = 1024
# What GLUE has in the place of labels that it does not tell.
_HIDDEN = "-1"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the labels of a data set stand for."""

    # 1: numbers, which are predicted.
    num_labels: int
    # The word of each class; None: the records have the numbers of classes.
    names: tuple[str, ...] | None = None

    @property
    def is_regression(self) -> bool:
        """Whether a number is predicted."""
        return self.num_labels == 1

    def target(self, text: str, where: str) -> float:
        """The number of the class, or the number to predict, that a record's label stands for.

        Args:
            text: of the label.
            where: it stands, for the error: ``record 3 of data.train``.

        Raises:
            InputError: it stands for none.
        """
        text = text.strip()
        if self.is_regression:
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise InputError(
                    f"{where} has the label {text!r}, and model.num_labels is 1, which predicts numbers: correct the "
                    "record, or set model.num_labels to the number of classes"
                )
            return number
        if self.names is not None:
            if text not in self.names:
                raise InputError(
                    f"{where} has the label {text!r}, which is none of {', '.join(self.names)}: correct the record, or "
                    "name all classes in data.labels"
                )
            return float(self.names.index(text))
        number = float(text) if _is_whole(text) else math.nan
        if not 0 <= number < self.num_labels:
            hint = "it is hidden in GLUE's test data; use the development data" if text == _HIDDEN else "correct it"
            raise InputError(
                f"{where} has the label {text!r}, and model.num_labels is {self.num_labels}, for classes 0 to "
                f"{self.num_labels - 1}: {hint}, or set model.num_labels"
            )
        return number

    def name(self, label: int) -> str:
        """What a record calls a class."""
        return str(label) if self.names is None else self.names[label]


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and len(text) < 10


def stored_labels(folder: Path) -> tuple[str, ...] | None:
    """The words that a model folder has for its classes; None where it has only those that transformers makes up."""
    found = read_json_object(folder / "config.json").get("id2label")
    if not isinstance(found, Mapping) or not all(str(number) in found for number in range(len(found))):
        return None
    names = tuple(str(found[str(number)]) for number in range(len(found)))
    return None if names == tuple(f"LABEL_{number}" for number in range(len(names))) else names


def find_labels(
    config: DataConfig,
    num_labels: int,
    records: Sequence[Mapping[str, str]] | None = None,
    stored: tuple[str, ...] | None = None,
) -> Labels:
    """What labels mean: by ``data.labels``, else as they stand in the training records.

    Where all of those are whole numbers they are the numbers of classes. Else they are words, whose order is that of
    the model, if it was saved with these words, or the alphabet's.

    Args:
        config: of the data.
        num_labels: of the model.
        records: of data.train; None: they are read.
        stored: see :func:`stored_labels`.

    Raises:
        InputError: there are other labels than the model has classes, or data.train cannot be read.
    """
    if config.labels is not None and len(config.labels) != num_labels:
        raise InputError(
            f"data.labels has {len(config.labels)} words and model.num_labels is {num_labels}: give one for each class"
        )
    if num_labels == 1 or config.labels is not None:
        return Labels(num_labels=num_labels, names=config.labels if num_labels > 1 else None)
    label = config.fields.label
    assert label is not None
    found = sorted({record[label].strip() for record in records or load_records(config, "train")})
    if all(map(_is_whole, found)):
        return Labels(num_labels=num_labels)
    if stored is not None and len(stored) == num_labels and set(found) <= set(stored):
        return Labels(num_labels=num_labels, names=stored)
    if len(found) != num_labels:
        shown = ", ".join(map(repr, found[:6])) + (", ..." if len(found) > 6 else "")
        raise InputError(
            f"model.num_labels is {num_labels}, and data.train has {len(found)} different labels in field {label!r} "
            f"({shown}): set model.num_labels to that, or name all classes in data.labels"
        )
    return Labels(num_labels=num_labels, names=tuple(found))


def texts_of(config: DataConfig, record: Mapping[str, str]) -> tuple[str, str | None]:
    """The text of a record, and the second one of a pair."""
    first, second = config.fields.text, config.fields.second_text
    assert first is not None
    return record[first], None if second is None else record[second]


def encode_texts(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping[str, str]]
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """(Token ids, token type ids) of every record with the tokenizer's own special tokens, and how many were cut.

    What is longer than ``data.max_length`` loses tokens at the end, of a pair those of the longer text. The token type
    ids are empty where the tokenizer gives none.

    Raises:
        InputError: ``data.max_length`` leaves no room behind the special tokens.
    """
    encoded: list[tuple[list[int], list[int]]] = []
    num_cut = 0
    for start in range(0, len(records), _CHUNK):
        found, num_cut_here = _encode_chunk(config, tokenizer, records[start : start + _CHUNK])
        encoded += found
        num_cut += num_cut_here
    return encoded, num_cut


def _encode_chunk(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, records: Sequence[Mapping[str, str]]
) -> tuple[list[tuple[list[int], list[int]]], int]:
    texts, seconds = zip(*(texts_of(config, record) for record in records), strict=True)
    pairs: dict[str, Any] = {} if config.fields.second_text is None else {"text_pair": list(seconds)}
    # Without the warning of samples longer than the tokenizer's own limit: they are cut below.
    whole = tokenizer(list(texts), **pairs, truncation=False, verbose=False)
    is_cut = [len(ids) > config.max_length for ids in whole["input_ids"]]
    encoded = whole
    if any(is_cut):
        encoded = tokenizer(list(texts), **pairs, truncation="longest_first", max_length=config.max_length)
        if any(len(ids) > config.max_length for ids in encoded["input_ids"]):
            raise InputError(
                f"data.max_length is {config.max_length}, and the tokenizer's special tokens alone are more: raise it"
            )
    types = encoded.get("token_type_ids") or [[] for _ in texts]
    return list(zip(encoded["input_ids"], types, strict=True)), sum(is_cut)


def load_classified(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: Literal["train", "validation", "test", "calibration"],
    labels: Labels,
    records: Sequence[Mapping[str, str]] | None = None,
) -> SampleSet:
    """Read and tokenize the texts of a split, and look up their labels.

    Args:
        config: of the data.
        tokenizer: of the model.
        split: which records.
        labels: see :func:`find_labels`.
        records: of the split; None: they are read.

    Raises:
        InputError: the records cannot be read, a label stands for no class, or a text has no token.
    """
    records = load_records(config, split) if records is None else records
    targets = targets_of(config, records, split, labels)
    encoded, num_cut = encode_texts(config, tokenizer, records)
    samples = []
    for number, ((ids, types), target) in enumerate(zip(encoded, targets, strict=True), start=1):
        if not ids:
            raise InputError(f"record {number} of data.{split} has an empty text: correct or remove it")
        samples.append(ClassifiedSample(ids, target, types))
    if num_cut:
        warnings.warn(
            f"data.{split}: of {len(records)} texts, {num_cut} were cut at data.max_length {config.max_length}",
            DataWarning,
            stacklevel=2,
        )
    return SampleSet(tuple(samples), num_cut, 0)


def targets_of(config: DataConfig, records: Sequence[Mapping[str, str]], split: Split, labels: Labels) -> list[float]:
    """What the labels of the records stand for.

    Raises:
        InputError: one stands for nothing; names the record, counted from 1.
    """
    label = config.fields.label
    assert label is not None
    return [labels.target(each[label], f"record {at} of data.{split}") for at, each in enumerate(records, start=1)]
