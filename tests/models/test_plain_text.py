"""Is every token of a plain text predicted once, and is what cannot be read a named error?"""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from models import plain_text
from models.data import IGNORED, DataConfig, FieldConfig, load_records, load_samples
from sparse_zero.errors import InputError

WORDS = ("Tom has", "12 apples", "and 7 more.", "\n", "\n\n", "  ", "Là-bas,", "é", "\t", "19", "How many?", "\r\n")


def some_text(num_words: int = 400) -> str:
    draw = random.Random(3)
    return "Once. " + " ".join(draw.choice(WORDS) for _ in range(num_words)).replace("\n ", "\n", num_words // 10)


def write(folder: Path, text: str, name: str = "some.txt") -> str:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return str(folder / name)


def predicted(samples: Any) -> list[int]:
    return [label for sample in samples for label in sample.labels[1:] if label != IGNORED]


@pytest.mark.parametrize("kind", ["begins", "does not begin", "ends", "sentencepiece"])
@pytest.mark.parametrize("max_length", [2, 7, 64])
def test_every_token_is_predicted_once(
    tmp_path: Path, kind: str, max_length: int, train_tokenizer: Any, sentencepiece_tokenizer: Any
) -> None:
    tokenizer = {
        "begins": lambda: train_tokenizer(),
        "does not begin": lambda: train_tokenizer(adds_bos=False),
        "ends": lambda: train_tokenizer(adds_eos=True),
        "sentencepiece": lambda: sentencepiece_tokenizer,
    }[kind]()
    file = write(tmp_path, some_text())
    text = Path(file).read_text()
    assert text == some_text().replace("\r\n", "\n"), "line breaks of every system are one"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    front = tokenizer("a")["input_ids"][:1] if kind in ("begins", "ends") else []
    samples = load_samples(DataConfig(train=file, max_length=max_length), tokenizer, "train").samples
    assert predicted(samples) == (ids if front else ids[1:])
    assert all(len(sample.input_ids) == max_length for sample in samples[:-1])
    assert 2 <= len(samples[-1].input_ids) <= max_length
    for before, sample in pairwise(samples):
        # What is not predicted is the beginning of sequence, or else the token before.
        assert sample.input_ids[0] == (front[0] if front else before.input_ids[-1])
        assert sample.labels == [IGNORED, *sample.input_ids[1:]]


def test_a_long_text_is_tokenized_in_pieces_as_if_it_were_whole(
    tmp_path: Path, train_tokenizer: Any, sentencepiece_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pieces end behind lines that do not end in spaces, where a word follows.
    file = write(tmp_path, some_text(2000).replace("more. ", "more.\n"))
    config = DataConfig(train=file, max_length=50)
    for tokenizer in (train_tokenizer(), sentencepiece_tokenizer):
        whole = load_samples(config, tokenizer, "train")
        with monkeypatch.context() as patch:
            patch.setattr(plain_text, "_PIECE_CHARACTERS", 300)
            text = Path(file).read_text()
            assert len(list(plain_text._encode_pieces(text, tokenizer))) > 10
            assert load_samples(config, tokenizer, "train") == whole


def gpt2_like_tokenizer() -> Any:
    """Bytes, and what GPT-2's vocabulary has of spaces: two line breaks as one token, and a space with a break."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ċ"), ("Ġ", "Ġ")]
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("between", ["\n", "\n\n", "\n\n\n", " \n", "  \n", " \n\n", ".\n", "\n/", "\n "])
def test_breaks_that_a_tokenizer_joins_at_the_end_of_a_piece_are_no_seam(
    between: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = gpt2_like_tokenizer()
    # Every other time; single breaks are where pieces may end.
    text = "".join(f"line{between if number % 2 else chr(10)}" for number in range(40)) + "end"
    whole = tokenizer(text)["input_ids"]
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    assert len(tokenizer("\n\na")["input_ids"]) == 3
    monkeypatch.setattr(plain_text, "_PIECE_CHARACTERS", 7)
    pieces = list(plain_text._encode_pieces(text, tokenizer))
    assert len(pieces) > 5
    assert [token for piece in pieces for token in piece] == whole


def test_the_limits_are_of_samples_in_training_and_of_tokens_in_forgetting(tmp_path: Path, tiny_tokenizer: Any) -> None:
    file = write(tmp_path, some_text())
    config = DataConfig(train=file, validation=file, forgetting=file, limit=3, max_length=10, forgetting_tokens=23)
    train, validation, forgetting = (
        load_samples(config, tiny_tokenizer, split).samples for split in ("train", "validation", "forgetting")
    )
    assert len(train) == 3
    assert len(validation) > 3
    assert validation[:3] == train
    assert [len(predicted([each])) for each in forgetting] == [9, 9, 5]
    assert predicted(forgetting) == predicted(validation)[:23]
    # Without a beginning of sequence the first token counts for nothing.
    records = DataConfig(train="x", forgetting=write(tmp_path, '[{"b": "ab cd ef gh"}]', "r.json"), forgetting_tokens=3)
    (sample,) = load_samples(
        DataConfig(train="x", forgetting=records.forgetting, forgetting_tokens=3, fields=FieldConfig(text="b")),
        tiny_tokenizer,
        "forgetting",
    ).samples
    assert len(predicted([sample])) == 3


def test_folders_and_other_suffixes(tmp_path: Path, tiny_tokenizer: Any) -> None:
    text = some_text(30)
    write(tmp_path, text, "train.txt")
    other = write(tmp_path, text, "text.md")
    expected = load_samples(DataConfig(train=str(tmp_path / "train.txt")), tiny_tokenizer, "train")
    assert load_samples(DataConfig(train=str(tmp_path)), tiny_tokenizer, "train") == expected
    assert load_samples(DataConfig(train=other, format="text"), tiny_tokenizer, "train") == expected
    # Each split by its own suffix.
    write(tmp_path, '[{"instruction": "How many?", "output": "19"}]', "v.json")
    config = DataConfig(train=str(tmp_path), validation=str(tmp_path / "v.json"), test=str(tmp_path / "v.json"))
    assert len(load_samples(config, tiny_tokenizer, "validation").samples) == 1


def test_what_is_wrong_is_a_named_error(tmp_path: Path, tiny_tokenizer: Any, train_tokenizer: Any) -> None:
    file = write(tmp_path, "a")
    (tmp_path / "latin.txt").write_bytes(b"Caf\xe9")
    for content, name, message in (
        (" \n", "empty.txt", r"data\.train is '.*empty\.txt': it holds no text"),
        (None, "latin.txt", r"data\.train is '.*latin\.txt': it is not UTF-8 text"),
        (None, "gone.txt", r"data\.train is '.*gone\.txt': there is no such file"),
    ):
        path = str(tmp_path / name) if content is None else write(tmp_path, content, name)
        with pytest.raises(InputError, match=message):
            load_samples(DataConfig(train=path), tiny_tokenizer, "train")
    with pytest.raises(InputError, match=r"its text has no two tokens"):
        load_samples(DataConfig(train=file), train_tokenizer(adds_bos=False), "train")
    with pytest.raises(InputError, match=r"data\.test is '.*some\.txt': plain text has no records"):
        load_records(DataConfig(train=file, test=file), "test")
    with pytest.raises(InputError, match=r"data\.test is 't.json' but data\.format is 'text'"):
        DataConfig(train=file, test="t.json", format="text")
    with pytest.raises(InputError, match=r"data\.forgetting_tokens is 0"):
        DataConfig(train=file, forgetting=file, forgetting_tokens=0)
    with pytest.raises(InputError, match=r"data\.forgetting is ' '"):
        DataConfig(train=file, forgetting=" ")
    with pytest.raises(InputError, match=r"begins every text with 1 special tokens"):
        list(plain_text.cut_text("a", tiny_tokenizer, 1))
