"""How does running text become samples, so that a model is asked for each of its tokens once?

A sample begins with what the tokenizer puts before a text (a beginning of sequence); where that is nothing, with the
last token of the sample before. The loss counts all that follows. So every token of the text is predicted once, but for
the very first one of a tokenizer without a beginning of sequence.
"""

import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

from models.templates import encode_responses, specials_in_front
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters tokenized at once, at least: a tokenizer's offsets of a whole book would take more than the book.
_PIECE_CHARACTERS = 1 << 16
# Between a line break and the word that begins a line: no tokenizer joins the two, so that the ids are those of the
# whole text. Only a break behind a line's last mark: at the end of a piece, tokenizers like GPT-2's join all spaces and
# breaks that stand there, of which they leave the last one apart before a word.
_SEAM = re.compile(r"(?<=\S\n)(?=\w)")


def cut_text(text: str, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a text into consecutive samples, tokenizing as much of it as is asked for.

    Args:
        text: not empty.
        tokenizer: any tokenizer of transformers. No end of sequence is added.
        max_length: tokens of a sample; the last one may have fewer.

    Yields:
        The ids that a sample begins with, which are not predicted, and those that are.

    Raises:
        InputError: ``max_length`` leaves no room behind the special tokens in front.
    """
    front = specials_in_front(tokenizer)
    if len(front) >= max_length:
        raise InputError(
            f"data.max_length is {max_length}, and the tokenizer begins every text with {len(front)} special tokens: "
            "raise it"
        )
    tokens, before = chain.from_iterable(_encode_pieces(text, tokenizer)), front
    while ids := list(islice(tokens, max_length - len(before))):
        yield before, ids
        before = front or ids[-1:]


def _encode_pieces(text: str, tokenizer: "PreTrainedTokenizerBase") -> Iterator[list[int]]:
    """Ids of piece after piece of the text; together, those of the whole of it."""
    start = 0
    while start < len(text):
        seam = _SEAM.search(text, start + _PIECE_CHARACTERS)
        end = len(text) if seam is None else seam.start()
        (ids,) = encode_responses(tokenizer, [text[start:end]], follows_prompt=start > 0)
        yield ids
        start = end
