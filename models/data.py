"""Which data is trained on, and how do records and plain text become samples of token ids and labels?"""

import warnings
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Literal, cast, get_args

from models.evaluation import EvaluationConfig
from models.plain_text import cut_text
from models.records import DataFormat, read_records, read_text, text_file, to_text_records
from models.templates import TEMPLATES, Template, encode_prompts, encode_responses, render
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Label of a position that the loss skips (the default of torch's cross entropy).
IGNORED = -100
# Records tokenized in one call: amortises the call of fast tokenizers, keeps the working set small.
_CHUNK = 1024

Split = Literal["train", "validation", "test", "calibration", "forgetting"]


class DataWarning(UserWarning):
    """Some of the data is used in part or not at all; the message counts it."""


@dataclass(frozen=True, kw_only=True)
class FieldConfig:
    """What the fields of a record are called. The defaults are the LLM-Adapters (and Alpaca) form."""

    # The question or task; needed, unless text is set.
    instruction: str = "instruction"
    # Context for the instruction; a record may lack it or leave it empty.
    input: str = "input"
    # The response trained on; needed in training and validation records, unless text is set.
    output: str = "output"
    # The bare answer that an evaluation compares with; needed in test records.
    answer: str = "answer"
    # Train on this field as plain text, loss on all of its tokens, without a template; None: instruction
    # records. With model.task sequence_classification: the text (of two, the first) that is classified.
    text: str | None = None
    # The second of two texts that are classified as a pair; None: there is one only.
    second_text: str | None = None
    # What the text is classified as: a word, the number of a class, or a number (regression); None: nothing is
    # classified.
    label: str | None = None

    def __post_init__(self) -> None:
        for name in ("instruction", "input", "output", "answer", "text", "second_text", "label"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and not (
                name in ("text", "second_text", "label") and value is None
            ):
                raise InputError(f"data.fields.{name} is {value!r}: give the name of a field of the records")
        if self.text is None and self.label is not None:
            raise InputError(
                f"data.fields.label is {self.label!r} without data.fields.text: name the field of the text too"
            )
        if self.second_text is not None and self.label is None:
            raise InputError(
                f"data.fields.second_text is {self.second_text!r} without data.fields.label: only a text that is "
                "classified has a second one; name the label's field, or leave it out"
            )

    @property
    def classifies(self) -> bool:
        """Whether a record is a text and its label."""
        return self.label is not None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the records or texts are, and how they become batches.

    ``train``, ``validation``, ``test``, ``calibration`` and ``forgetting`` each name a file, a folder that holds
    ``<split>.json`` (or .jsonl, .csv, .tsv, .parquet, .txt), or a hub data set ``owner/name`` or ``owner/name:subset``.
    Relative paths start at the current directory; ``~`` is expanded. A ``.txt`` file is plain text: it is cut into
    consecutive samples of ``max_length`` tokens, each of which is predicted once.
    """

    # Training records, or plain text.
    train: str
    # File name stem in a folder, or split of a hub data set, for the training records. A single file has no
    # splits.
    train_split: str = "train"
    # Records whose loss is measured during training; None: no validation.
    validation: str | None = None
    # As train_split, of validation.
    validation_split: str = "validation"
    # Problems answered before and after training; None: no evaluation. Not with plain text, which has no prompts.
    test: str | None = None
    # As train_split, of test.
    test_split: str = "test"
    # Records, or plain text, whose gradients and activations choose what is trained; None: the training data. Read only
    # where scores need data.
    calibration: str | None = None
    # As train_split, of calibration.
    calibration_split: str = "train"
    # Text, or records, of another kind than the training data: the mean loss per token on it is measured before and
    # after training, which tells what the model has forgotten. None: it is not.
    forgetting: str | None = None
    # As train_split, of forgetting.
    forgetting_split: str = "test"
    # Tokens of it that are predicted at most, over all ranks, from its start. Base and tuned model predict the same
    # ones, so that their difference is much surer than either loss; more of them cost two forward passes each.
    forgetting_tokens: int = 16384
    # How files are parsed. auto goes by the suffix, and takes owner/name for a hub name if no such path
    # exists. text is plain text, whatever the suffix.
    format: DataFormat = "auto"
    # How a record becomes prompt and response. chat uses the template that comes with the tokenizer.
    template: Template = "alpaca"
    # Tokens of prompt and response together. Longer responses are cut (counted); longer prompts are never
    # cut: the sample is dropped (counted). 512 holds nearly every record of the usual instruction sets. Plain text is
    # cut into samples of so many tokens; the last one has what is left.
    max_length: int = 512
    # pad: every sample a row, filled up to the longest of the micro-batch; pack: one row of all samples, only of model
    # families that are known to keep them apart (models.families.PACKABLE_FAMILIES).
    batching: Literal["pad", "pack"] = "pad"
    # Put samples of like length into the same micro-batch of a step: less padding, the same result.
    group_by_length: bool = True
    # Training records used, or samples of plain text, from the start of the data; None: all.
    limit: int | None = None
    # Of a classifier whose labels are words: the words in the order of the classes. None: those of a model that has
    # been saved with words, else the words of data.train in alphabetical order.
    labels: tuple[str, ...] | None = None
    # Names of the fields of a record.
    fields: FieldConfig = field(default_factory=FieldConfig)
    # How the test problems are answered.
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        sources = get_args(Split)
        for name in (*sources, *(f"{each}_split" for each in sources)):
            value = getattr(self, name)
            if value is None and name in sources[1:]:
                continue
            if not isinstance(value, str) or not value.strip():
                wanted = "a split" if name.endswith("_split") else "a file, a folder or a hub data set"
                raise InputError(f"data.{name} is {value!r}: give the name of {wanted}")
        choices = {"format": get_args(DataFormat), "template": TEMPLATES, "batching": ("pad", "pack")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"data.{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.labels is not None and not self.fields.classifies:
            raise InputError(
                f"data.labels is {', '.join(self.labels)} without data.fields.label: name the label's field, or leave "
                "data.labels out"
            )
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise InputError(f"data.labels is {', '.join(self.labels)}: name every class once")
        if self.fields.text is not None and self.test is not None and not self.fields.classifies:
            raise InputError(
                f"data.test is {self.test!r} but data.fields.text is {self.fields.text!r}: a model of plain text has "
                "no prompt to answer; leave data.test out"
            )
        if self.format == "text" and self.test is not None:
            raise InputError(
                f"data.test is {self.test!r} but data.format is 'text': plain text has no problems to answer; leave "
                "data.test out, or data.format as auto"
            )
        if self.forgetting_tokens < 1:
            raise InputError(f"data.forgetting_tokens is {self.forgetting_tokens}: it must be at least 1")
        if self.max_length < 2:
            raise InputError(f"data.max_length is {self.max_length}: a prompt and a response need at least 2 tokens")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"data.limit is {self.limit}: it must be at least 1, or left out for all records")


@dataclass(frozen=True)
class TokenizedSample:
    """One training sample: prompt and response, and which of its tokens the loss counts."""

    input_ids: list[int]  # [length]
    labels: list[int]  # [length] IGNORED on the prompt, the token ids on the response and its end of sequence

    @property
    def num_targets(self) -> int:
        """Tokens that the loss sums over; never the first one, which nothing before it predicts."""
        return sum(label != IGNORED for label in self.labels[1:])

    def numbers(self) -> bytes:
        """Everything in it: equal of equal samples only."""
        return array("q", [len(self.input_ids), *self.input_ids, *self.labels]).tobytes()


@dataclass(frozen=True)
class ClassifiedSample:
    """One text, or a pair of texts, and what it is classified as."""

    input_ids: list[int]  # [length]
    target: float | None  # number of the class, or the number to predict; None: the loss ignores the sample
    token_type_ids: list[int]  # [length] 0 on the first text, 1 on the second; empty where the tokenizer gives none

    @property
    def num_targets(self) -> int:
        """Samples that the loss sums over."""
        return int(self.target is not None)

    def numbers(self) -> bytes:
        """Everything in it: equal of equal samples only."""
        whole = array("q", [len(self.input_ids), *self.input_ids, *self.token_type_ids]).tobytes()
        return whole + array("d", [] if self.target is None else [self.target]).tobytes()


Sample = TokenizedSample | ClassifiedSample


@dataclass(frozen=True)
class SampleSet:
    """The samples of one split in the order of the data, and what the maximum length cost."""

    samples: Sequence[Sample]
    num_truncated_responses: int  # samples whose response (of classified ones: whose text) was cut
    num_dropped: int  # records without a sample: no room for a response token

    @property
    def texts(self) -> Sequence[TokenizedSample]:
        """The samples, of what is no classifier's data."""
        return cast(Sequence[TokenizedSample], self.samples)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every sample."""
        return tuple(len(sample.input_ids) for sample in self.samples)


def load_records(config: DataConfig, split: Split) -> list[dict[str, str]]:
    """Read the records of a split under their own field names, scalars as text.

    Training and validation records have ``instruction`` and ``output`` (or ``text``), test records
    ``instruction`` and ``answer``, each under the name that ``config.fields`` gives; of a classifier, all have
    ``text``, ``label`` and, if it is named, ``second_text``. All else a record holds is optional.

    Raises:
        InputError: the split is not configured, cannot be read or is empty, or a record lacks a needed field.
    """
    source, split_name, setting = _source(config, split)
    raw = read_records(source, field=setting, split=split_name, data_format=config.format)
    if split == "train" and config.limit is not None:
        raw = raw[: config.limit]
    names = config.fields
    if names.classifies:
        needed = [name for name in (names.text, names.second_text, names.label) if name is not None]
    elif split == "test":
        needed = [names.instruction, names.answer]
    else:
        needed = [names.instruction, names.output] if names.text is None else [names.text]
    records = to_text_records(raw, field=setting, needed=needed, source=source)
    if names.input != FieldConfig.input and names.text is None and not any(names.input in each for each in records):
        raise InputError(f"data.fields.input is {names.input!r}: no record of {setting} ({source!r}) has that field")
    return records


def _source(config: DataConfig, split: Split) -> tuple[str, str, str]:
    """Where a split is, what it is called there, and the name of the setting that says so."""
    setting, source = f"data.{split}", getattr(config, split)
    if source is None:
        raise InputError(f"{setting} is missing: name the file, folder or hub data set to read")
    return source, getattr(config, f"{split}_split"), setting


def load_samples(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    split: Literal["train", "validation", "calibration", "forgetting"],
) -> SampleSet:
    """Read, render and tokenize the records of a split; or cut its plain text.

    A sample longer than ``config.max_length`` loses the end of its response; if not one response token would
    stay that the model can be asked to predict, the record is dropped. Both are counted, and warned of. Of
    ``forgetting`` no more is tokenized than ``config.forgetting_tokens`` needs.

    Raises:
        InputError: as :func:`load_records`; or the tokenizer cannot render the template; or no sample
            remains.
    """
    source, split_name, setting = _source(config, split)
    file = text_file(source, field=setting, split=split_name, data_format=config.format)
    records: list[dict[str, str]] = []
    if file is not None:
        pairs = cut_text(read_text(file, field=setting), tokenizer, config.max_length)
        if split == "train":
            pairs = islice(pairs, config.limit)
    else:
        records = load_records(config, split)
        pairs = _tokenize(config, tokenizer, records)
    samples: list[TokenizedSample] = []
    num_truncated = num_dropped = 0
    num_left = config.forgetting_tokens if split == "forgetting" else None
    for prompt_ids, response_ids in pairs:
        room = config.max_length - len(prompt_ids)
        kept = response_ids[: max(room, 0)]
        # The first token of a sample has nothing before it that could predict it.
        if not kept or len(prompt_ids) + len(kept) < 2:
            num_dropped += 1
            continue
        num_truncated += len(kept) < len(response_ids)
        if num_left is not None:
            num_unpredicted = 0 if prompt_ids else 1
            kept = kept[: num_left + num_unpredicted]
            num_left -= len(kept) - num_unpredicted
        samples.append(TokenizedSample(prompt_ids + kept, [IGNORED] * len(prompt_ids) + kept))
        if num_left == 0:
            break
    if not samples and file is not None:
        raise InputError(f"{setting} is {str(file)!r}: its text has no two tokens; give a longer one")
    if not samples:
        raise InputError(
            f"data.max_length is {config.max_length}: not one of the {len(records)} records of "
            f"data.{split} leaves room for a response after its prompt; raise it"
        )
    if num_truncated or num_dropped:
        warnings.warn(
            f"data.{split}: of {len(records)} records, {num_truncated} responses were cut and "
            f"{num_dropped} records dropped at data.max_length {config.max_length}",
            DataWarning,
            stacklevel=2,
        )
    return SampleSet(tuple(samples), num_truncated, num_dropped)


def _tokenize(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", records: Sequence[dict[str, str]]
) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt ids and response ids of every record, tokenized in chunks."""
    for start in range(0, len(records), _CHUNK):
        texts = [
            render(config.template, record, tokenizer, config.fields) for record in records[start : start + _CHUNK]
        ]
        prompts, responses = [prompt for prompt, _ in texts], [response for _, response in texts]
        yield from zip(
            encode_prompts(tokenizer, prompts, config.template),
            encode_responses(tokenizer, responses, follows_prompt=config.fields.text is None),
            strict=True,
        )
