"""What is a small Llama pre-trained on, with which tokenizer, and as which samples?"""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.data import IGNORED, TokenizedSample
from models.generated_text import generate_text
from models.records import read_text
from models.templates import encode_responses
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of the documents, at the end of the text: for the validation loss, and later for what tuning forgets.
_VALIDATION_SHARE = 0.01
_MIN_VALIDATION_DOCUMENTS = 2
# A tokenizer is trained on documents spread over the text, of so many characters together: more change nothing.
_TOKENIZER_CHARACTERS = 2_000_000
_CHUNK = 1024
# Between documents. A line of spaces is empty, too: WikiText separates its paragraphs so.
_EMPTY_LINES = re.compile(r"\n\s*\n")
UNKNOWN, BEGIN, END = range(3)


def read_documents(files: Sequence[Path], num_characters: int, seed: int) -> tuple[list[str], str]:
    """Documents, and the hash of their text: of files, or generated where there are none.

    A document is what stands between empty lines.

    Raises:
        InputError: a file cannot be read, or there are too few documents.
    """
    text = (
        "\n\n".join(read_text(file, field="--text") for file in files) if files else generate_text(num_characters, seed)
    )
    documents = [stripped for part in _EMPTY_LINES.split(text) if (stripped := part.strip())]
    if len(documents) <= _MIN_VALIDATION_DOCUMENTS:
        raise InputError(
            f"--text has {len(documents)} documents (paragraphs between empty lines): give text with more of them"
        )
    return documents, hashlib.sha256("\n\n".join(documents).encode()).hexdigest()


def split_documents(documents: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Those for training, and those at the end for validation: without the ones that training has, too.

    Raises:
        InputError: training has all of them.
    """
    held_out = max(_MIN_VALIDATION_DOCUMENTS, round(_VALIDATION_SHARE * len(documents)))
    training = documents[:-held_out]
    known = set(training)
    validation = [each for each in documents[-held_out:] if each not in known]
    if not validation:
        raise InputError(
            f"--text ends with {held_out} documents that all stand before, too: give text whose end is its own"
        )
    return training, validation


def train_tokenizer(documents: Sequence[str], vocab: int) -> PreTrainedTokenizerBase:
    """A SentencePiece tokenizer in Llama's form: BPE, bytes for what is rare, single digits, a BOS before every text.

    Args:
        documents: trained on; equal ones give equal tokenizers.
        vocab: tokens at most; a text of few words gives fewer.

    Raises:
        InputError: SentencePiece cannot make a tokenizer of this text.
    """
    import sentencepiece
    from transformers import AutoTokenizer, LlamaTokenizer

    stride = max(1, sum(map(len, documents)) // _TOKENIZER_CHARACTERS)
    lines = (line for document in documents[::stride] for line in document.split("\n") if line.strip())
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=vocab, hard_vocab_limit=False,
            byte_fallback=True, split_digits=True, character_coverage=0.9995, normalization_rule_name="identity",
            remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
            unk_id=UNKNOWN, bos_id=BEGIN, eos_id=END, pad_id=-1,
        )  # fmt: skip
    except RuntimeError as error:
        raise InputError(f"--text gives no tokenizer of {vocab} tokens ({str(error)[:200]}): give more text") from error
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model.getvalue())
        tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
        tokenizer.pad_token = tokenizer.unk_token
        again = Path(folder) / "saved"
        tokenizer.save_pretrained(again)
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(again)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    # A special token's name in a text (WikiText has <unk> for rare words) is that token; SentencePiece spells it out.
    probe = re.sub("|".join(map(re.escape, loaded.all_special_tokens)), "", documents[0])[:1000]
    if loaded(probe)["input_ids"] != [BEGIN, *reference.encode(probe)]:
        raise InputError("transformers reads the tokenizer of this text otherwise than SentencePiece: give other text")
    return loaded


def make_samples(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[list[TokenizedSample], int]:
    """Samples of ``length`` tokens, a beginning of sequence and then the text, and how many tokens that are in all.

    A document ends with the end of sequence or with an empty line, in turn: the model meets both in what it is tuned on
    and measured with. The last sample is left out if it is shorter.
    """
    ids = [token for part in _encode(documents, tokenizer) for token in part]
    room = length - 1
    samples = [
        TokenizedSample([BEGIN, *ids[start : start + room]], [IGNORED, *ids[start : start + room]])
        for start in range(0, len(ids) - room + 1, room)
    ]
    if not samples:
        raise InputError(f"--text has {len(ids)} tokens, fewer than a sample of --length {length}: give more text")
    return samples, len(ids)


def _encode(documents: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    (line_break,) = encode_responses(tokenizer, ["\n\n"])
    for start in range(0, len(documents), _CHUNK):
        # As in the middle of a text: SentencePiece would begin each with a space of its own.
        for number, ids in enumerate(encode_responses(tokenizer, documents[start : start + _CHUNK])):
            yield ids + ([END] if (start + number) % 2 else line_break)
