"""What is a model asked in the test problems, in which tokens, and is there room for it?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.answers import normalize, options_in
from models.templates import Template, encode_prompts, encode_responses, render
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from models.data import FieldConfig
    from models.evaluation import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class Option:
    """One of the answers that a problem lets choose from."""

    option: str
    response: str  # as the model would word it
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]


def check_problems(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, str]],
    config: EvaluationConfig,
    *,
    template: Template,
    fields: FieldConfig,
) -> None:
    """Raise what :func:`models.evaluation.evaluate` would, before anything is trained.

    Raises:
        InputError: there is no problem, one exceeds the model's context, or a choice lacks its options.
    """
    if config.kind == "choice":
        choices = choices_of(records, tokenizer, config, template=template, fields=fields)
        check_room(model, max(map(longest_of, choices)))
    else:
        prompts = prompts_of(records, tokenizer, config, template=template, fields=fields)
        check_room(model, max(map(len, prompts)), config.max_new_tokens)


def first_problems(records: Sequence[Mapping[str, str]], config: EvaluationConfig) -> Sequence[Mapping[str, str]]:
    """The records that are evaluated.

    Raises:
        InputError: there are none.
    """
    if not records:
        raise InputError("data.test has no problems: name a file with some")
    return records[: config.limit]


def prompts_of(
    records: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    *,
    template: Template,
    fields: FieldConfig,
) -> list[list[int]]:
    """Token ids of the prompt of every problem that is evaluated."""
    prompts = [render(template, record, tokenizer, fields)[0] for record in first_problems(records, config)]
    return encode_prompts(tokenizer, prompts, template)


def choices_of(
    records: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    *,
    template: Template,
    fields: FieldConfig,
) -> list[list[Option]]:
    """The options of every problem that is evaluated, worded as most outputs of all records are.

    Raises:
        InputError: a problem offers no options, or its answer is none of them.
    """
    problems = first_problems(records, config)
    offered = [_options(index, record, config, fields) for index, record in enumerate(problems)]
    wording = _common_wording(records, fields)
    choices = []
    for record, options in zip(problems, offered, strict=True):
        before, after = wording if _wording(record, fields) == wording else ("", "")
        responses = [before + option + after for option in options]
        texts = [render(template, {**record, fields.output: each}, tokenizer, fields) for each in responses]
        prompt_ids = encode_prompts(tokenizer, [prompt for prompt, _ in texts], template)
        response_ids = encode_responses(tokenizer, [response for _, response in texts])
        choices.append(
            [
                Option(option=option, response=response, prompt_ids=prompt, response_ids=ids)
                for option, response, prompt, ids in zip(options, responses, prompt_ids, response_ids, strict=True)
            ]
        )
    return choices


def longest_of(choice: Sequence[Option]) -> int:
    """Tokens of the longest prompt and response of a problem."""
    return max(len(option.prompt_ids) + len(option.response_ids) for option in choice)


def check_room(model: PreTrainedModel, num_tokens: int, max_new_tokens: int = 0) -> None:
    """Raise unless the model has room for a problem of ``num_tokens``, and what it may generate behind it.

    Raises:
        InputError: names both numbers.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and num_tokens + max_new_tokens > context:
        included, remedy = (
            (", data.evaluation.max_new_tokens included,", "lower that setting, or leave the problem out")
            if max_new_tokens
            else ("", "leave the problem out")
        )
        raise InputError(
            f"a problem of data.test needs {num_tokens + max_new_tokens} tokens{included} and the model has room for "
            f"{context}: {remedy}"
        )


def _options(index: int, record: Mapping[str, str], config: EvaluationConfig, fields: FieldConfig) -> tuple[str, ...]:
    question = record[fields.instruction] + "\n" + record.get(fields.input, "")
    options = config.options or options_in(question)
    if len(options) < 2:
        raise InputError(
            f"record {index + 1} of data.test offers no options ('Answer format: a/b'), which data.evaluation.kind "
            "choice needs: set data.evaluation.options, or data.evaluation.kind to generate"
        )
    if normalize(record[fields.answer]) not in map(normalize, options):
        raise InputError(
            f"record {index + 1} of data.test has the answer {record[fields.answer]!r}, which is none of its "
            f"options ({', '.join(options)}): correct the record or data.evaluation.options, or set "
            "data.evaluation.kind to generate"
        )
    return options


def _wording(record: Mapping[str, str], fields: FieldConfig) -> tuple[str, str]:
    """What the output says before the answer and after it; nothing where it does not have the answer."""
    answer = record[fields.answer]
    before, found, after = record.get(fields.output, "").rpartition(answer) if answer else ("", "", "")
    return (before, after) if found else ("", "")


def _common_wording(records: Sequence[Mapping[str, str]], fields: FieldConfig) -> tuple[str, str]:
    """The wording of more than half of the records, and of two at least: no single record decides it."""
    (wording, number), *_ = Counter(_wording(record, fields) for record in records).most_common(1)
    return wording if number >= 2 and 2 * number > len(records) else ("", "")
