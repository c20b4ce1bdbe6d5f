"""How does a record become the text, and the token ids, of a prompt and a response?

Prompt and response are tokenized separately and then concatenated. Generation, which sees the prompt alone,
thus starts from exactly the ids that training had before the response, whatever the tokenizer would have
merged across the seam.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from models.data import FieldConfig

Template = Literal["alpaca", "chat", "plain"]
TEMPLATES: tuple[Template, ...] = get_args(Template)

# The prompts of instruction-tuned models are only of use letter by letter: this is the Alpaca form.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def render(
    template: Template, record: Mapping[str, str], tokenizer: "PreTrainedTokenizerBase", fields: "FieldConfig"
) -> tuple[str, str]:
    """Write a record as prompt and response.

    The response ends with the tokenizer's end-of-sequence token, so that the tuned model stops. With
    ``fields.text`` the prompt is empty and the response is that field. A record without an output (a test
    problem) has the response that an empty output has.

    Raises:
        InputError: the tokenizer has no end-of-sequence token; for ``chat``, it has no usable chat template.
    """
    eos = tokenizer.eos_token
    if not isinstance(eos, str) or not eos:
        raise InputError(
            "model.tokenizer has no end-of-sequence token, so a tuned model would never stop: "
            "set eos_token in its tokenizer_config.json"
        )
    if fields.text is not None:
        return "", record[fields.text] + eos
    instruction, context = record[fields.instruction], record.get(fields.input, "")
    output = record.get(fields.output, "")
    if template == "alpaca":
        form = _ALPACA_WITH_INPUT if context else _ALPACA
        # One replacement each: str.format would trip over braces in the record.
        head, tail = form.split("{instruction}")
        return head + instruction + tail.replace("{input}", context), output + eos
    question = f"{instruction}\n{context}" if context else instruction
    if template == "plain":
        return f"Question: {question}\nAnswer:", f" {output}{eos}"
    if template == "chat":
        return _render_chat(f"{instruction}\n\n{context}" if context else instruction, output, tokenizer, eos)
    raise InputError(f"data.template is {template!r}: choose one of {', '.join(TEMPLATES)}")


def _render_chat(question: str, output: str, tokenizer: "PreTrainedTokenizerBase", eos: str) -> tuple[str, str]:
    import jinja2

    if not tokenizer.chat_template:
        raise InputError(
            "data.template is 'chat', and the tokenizer has no chat template: use the tokenizer of a chat "
            "model (model.tokenizer), or the template alpaca or plain"
        )
    messages = [{"role": "user", "content": question}]
    answered = [*messages, {"role": "assistant", "content": output}]
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(answered, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"data.template is 'chat', and the tokenizer's chat template fails ({error}): use alpaca or plain"
        ) from error
    assert isinstance(prompt, str)
    assert isinstance(full, str)
    if not full.startswith(prompt):
        raise InputError(
            "data.template is 'chat', and the tokenizer's chat template does not begin an answered "
            "conversation with its generation prompt, so prompt and response cannot be told "
            "apart: use alpaca or plain"
        )
    response = full[len(prompt) :]
    # What a template writes after the end-of-sequence token belongs to the next turn. A template that closes
    # a turn with another token leaves generation without a stop: the end of sequence follows it.
    body, found, rest = response.rpartition(eos)
    return prompt, body + eos if found and not rest.strip() else response + eos


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], template: Template) -> list[list[int]]:
    """Token ids of prompts, as training and generation both see them.

    Special tokens are those that the tokenizer adds in front (a beginning of sequence); one that it would add
    behind is taken off, since the response follows. Chat prompts already contain theirs.
    """
    if not prompts:
        return []
    if template == "chat":
        return _encode(tokenizer, prompts)
    num_behind = _num_specials_behind(tokenizer)
    return [ids[: len(ids) - num_behind] for ids in _encode(tokenizer, prompts, special=True)]


def encode_responses(
    tokenizer: "PreTrainedTokenizerBase", responses: Sequence[str], *, follows_prompt: bool = True
) -> list[list[int]]:
    """Token ids of responses, without added special tokens.

    A SentencePiece tokenizer begins every text with a space of its own. A response is not a beginning: it is
    tokenized behind a line break, whose ids are then taken off, which leaves the ids that the response has in
    the middle of a text. Where the tokenizer merges the line break with the response, its ids alone are
    taken.

    Args:
        tokenizer: any tokenizer of transformers.
        responses: texts, including the end of sequence.
        follows_prompt: False where nothing comes before, as with plain text.
    """
    if not responses:
        return []
    alone = _encode(tokenizer, responses)
    if not follows_prompt:
        return alone
    (anchor,) = _encode(tokenizer, ["\n"])
    anchored = _encode(tokenizer, [f"\n{response}" for response in responses])
    return [
        after[len(anchor) :] if after[: len(anchor)] == anchor else by_itself
        for after, by_itself in zip(anchored, alone, strict=True)
    ]


def specials_in_front(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of the special tokens that the tokenizer puts before a text: a beginning of sequence, or nothing."""
    (bare,), (full,) = _encode(tokenizer, ["a"]), _encode(tokenizer, ["a"], special=True)
    return full[: len(full) - len(bare) - _num_specials_behind(tokenizer)] if bare else []


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    # verbose: no advice about the model's maximum length, which data.max_length takes care of.
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _num_specials_behind(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Special tokens that the tokenizer adds behind a text."""
    (bare,), (full,) = _encode(tokenizer, ["a"]), _encode(tokenizer, ["a"], special=True)
    num_added = len(full) - len(bare)
    starts = (start for start in range(num_added + 1) if full[start : start + len(bare)] == bare)
    return num_added - next(starts, num_added) if bare else 0
