"""Do the small bases load as models of their families, with tokenizers that frame texts as theirs do?"""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.small_bases import FAMILIES
from scripts.make_small_bases import main

# What stands around "a b" and around the pair ("a b", "c"), by token.
FRAMES = {
    "llama": ("<s> A", None),
    "bloom": ("A", None),
    "gpt_neox": ("A", None),
    "bert": ("[CLS] A [SEP]", "[CLS] A [SEP] B [SEP]"),
    "roberta": ("<s> A </s>", "<s> A </s> </s> B </s>"),
}


def frame(tokenizer: Any, *texts: str) -> str:
    """The special tokens, and a letter for each text."""
    found: list[str] = []
    ids = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in texts]
    given = tokenizer(*texts)["input_ids"]
    while given:
        if given[0] in tokenizer.all_special_ids:
            found.append(tokenizer.convert_ids_to_tokens(given.pop(0)))
            continue
        assert given[: len(ids[0])] == ids[0]
        given = given[len(ids.pop(0)) :]
        found.append("AB"[sum(each in "AB" for each in found)])
    return " ".join(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_of_each_family(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    for name in ("one", "two"):
        assert main(["--family", family, "--out", str(tmp_path / name), "--hidden", "32", "--positions", "24"]) == 0
    assert f"a random {family} of " in capsys.readouterr().out
    encodes = FAMILIES[family].encodes
    kind = AutoModelForMaskedLM if encodes else AutoModelForCausalLM
    model, same = (kind.from_pretrained(tmp_path / name).eval() for name in ("one", "two"))
    assert model.config.model_type == family
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), same.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0] == 512
    for token in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{token}_token_id") == getattr(model.config, f"{token}_token_id")
    text = "Là-bas, Tom has 12 apples.\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    single, pair = FRAMES[family]
    assert frame(tokenizer, "Tom has") == single
    if pair is not None:
        assert frame(tokenizer, "Tom has", "12 apples") == pair
        assert tokenizer.mask_token_id is not None
    # As many positions as it says, and every one of them.
    logits = model(input_ids=torch.arange(5, 29)[None]).logits
    assert logits.shape == (1, 24, 512)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "30"], "hidden is 30"),
        (["--hidden", "12", "--heads", "4"], "a head of 3"),
        (["--vocab", "100"], "vocab is 100"),
        (["--layers", "0"], "layers is 0"),
        (["--out", "full"], "is not empty"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert main(["--family", "llama", "--out", "new", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()
