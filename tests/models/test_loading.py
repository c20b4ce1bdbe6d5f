"""Do models and tokenizers load as they were saved, and does every bad source get one clear error?"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparse_zero as sz
from models import source as model_source
from models.loading import (
    ModelConfig,
    check_tokenizer_fits,
    checkpoint_activations,
    load_model,
    load_tokenizer,
    validate_model_source,
)
from models.weight_files import read_safetensors_header
from sparse_zero.errors import InputError
from tests.models.tiny import CORPUS, tiny_llama, tiny_tokenizer, write_tiny_llama
from tests.models.tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def template_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=2)


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "sharded", layers=2, max_shard_size="200KB")


@pytest.fixture
def folder(template_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template_folder, tmp_path / "tiny"))


@pytest.fixture
def sharded(sharded_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_folder, tmp_path / "sharded"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, and an empty cache of it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors") | {"model.layers.0.mlp.gate.weight": torch.ones(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# -- what loads ------------------------------------------------------------------------------------------------


def test_folder_loads_bit_for_bit(template_folder: Path) -> None:
    model = load_model(ModelConfig(name_or_path=str(template_folder)))
    expected = tiny_llama(layers=2).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_dtype_and_attention_are_as_asked(template_folder: Path) -> None:
    model = load_model(ModelConfig(name_or_path=str(template_folder), dtype="bfloat16", attention="eager"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_shards_and_tied_heads_load(sharded: Path, tmp_path: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 1
    load_model(ModelConfig(name_or_path=str(sharded)))
    tied = write_tiny_llama(tmp_path / "tied", tie=True, layers=1)
    model = load_model(ModelConfig(name_or_path=str(tied)))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tilde_is_the_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    validate_model_source(ModelConfig(name_or_path="~/tiny"))


def test_progress_bars_are_restored(template_folder: Path) -> None:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    for enabled in (True, False):
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
        load_model(ModelConfig(name_or_path=str(template_folder)))
        assert logging.is_progress_bar_enabled() is enabled
    (logging.enable_progress_bar if was_enabled else logging.disable_progress_bar)()


# -- what does not ---------------------------------------------------------------------------------------------

BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "has no config.json: it is not a transformers",
    ),
    "an adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "has no config.json: it is an adapter",
    ),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is no valid JSON",
    ),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "instead of a JSON object",
    ),
    "no model_type": (lambda folder: edit_config(folder, model_type=None), "has no model_type"),
    "not causal": (
        lambda folder: edit_config(folder, model_type="bert", architectures=["BertForMaskedLM"]),
        "is a BertForMaskedLM, not a causal language model",
    ),
    "unknown kind": (
        lambda folder: edit_config(folder, model_type="frob", architectures=None),
        "is a frob, not a causal language model",
    ),
    "own code": (
        lambda folder: edit_config(folder, model_type="frob", auto_map={"AutoModelForCausalLM": "frob.Frob"}),
        "needs its own Python code",
    ),
    "quantised": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}),
        r"quantised weights \(gptq\)",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "pickles": (as_pickle, "pickles only"),
    "GGUF not named": (
        lambda folder: (folder / "model.safetensors").rename(folder / "q4.gguf"),
        "set model.gguf_file, for example to 'q4.gguf'",
    ),
    "cut off": (cut_off, "is cut off or not a safetensors file .* bytes where its header needs"),
    "empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"cut off .* \(0 bytes\)"),
    "not safetensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"this is some text, not a model"),
        "cut off or not a safetensors file",
    ),
    "damaged header": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x04" + bytes(7) + b"{{{{"),
        "its header is damaged",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder_is_refused_before_anything_is_read(folder: Path, case: str) -> None:
    spoil, message = BAD_FOLDERS[case]
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        validate_model_source(ModelConfig(name_or_path=str(folder)))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        load_model(ModelConfig(name_or_path=str(folder)))


def test_missing_shard_is_refused_by_name(sharded: Path) -> None:
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=f"lacks {gone.name}"):
        validate_model_source(ModelConfig(name_or_path=str(sharded)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "not a safetensors file of its folder"),
    ],
)
def test_bad_index_is_refused(sharded: Path, content: str, message: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=message):
        validate_model_source(ModelConfig(name_or_path=str(sharded)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_a_weight, r"1 missing weights \(model.layers.1.mlp.up_proj.weight\)"),
        (add_a_weight, r"1 unexpected weights \(model.layers.0.mlp.gate.weight\)"),
        (lambda folder: edit_config(folder, intermediate_size=96), "mismatch|other shapes"),
        (lambda folder: edit_config(folder, hidden_size="many"), "cannot be loaded"),
    ],
    ids=["missing", "unexpected", "shape", "config value"],
)
def test_weights_that_do_not_fit_their_config_are_refused(
    folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_model(ModelConfig(name_or_path=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name_or_path": " "}, "model.name_or_path"),
        ({"name_or_path": "x", "dtype": "int8"}, "model.dtype is 'int8'"),
        ({"name_or_path": "x", "attention": "quick"}, "model.attention is 'quick'"),
        (
            {"name_or_path": "x", "attention": "flash_attention_2"},
            "with model.dtype float32, .* model.attention to sdpa",
        ),
        ({"name_or_path": "x", "gguf_file": "x.bin"}, "model.gguf_file"),
        ({"name_or_path": "x", "gguf_file": "../x.gguf"}, "model.gguf_file"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig(**settings)


def test_bad_places_are_refused(folder: Path) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"name_or_path": str(folder / "nothing")}, "there is no such folder, and a hub name has the form"),
        ({"name_or_path": str(folder / "config.json")}, "a file: name the folder that holds it"),
        ({"name_or_path": str(folder), "revision": "main"}, "model.revision is 'main', but .* is a folder"),
        (
            {"name_or_path": str(folder), "tokenizer": "/no/such/folder"},
            "model.tokenizer is '/no/such/folder'",
        ),
        ({"name_or_path": str(folder), "gguf_file": "no.gguf"}, "model.gguf_file is 'no.gguf', which"),
    )
    for settings, message in cases:
        with pytest.raises(InputError, match=message):
            validate_model_source(ModelConfig(**settings))


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(InputError, match=r"'flash_attention_2', which needs the package flash-attn: .* use sdpa"):
        validate_model_source(ModelConfig(name_or_path=str(folder), dtype="bfloat16", attention="flash_attention_2"))
    monkeypatch.setitem(sys.modules, "accelerate", None)
    (folder / "q.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"'q.gguf', which needs the package accelerate"):
        validate_model_source(ModelConfig(name_or_path=str(folder), gguf_file="q.gguf"))


@pytest.mark.parametrize(("quantized", "tolerance"), [(False, 0.0), (True, 1e-3)])
def test_gguf_loads_dense_and_saves_as_safetensors(tmp_path: Path, quantized: bool, tolerance: float) -> None:
    pytest.importorskip("gguf")
    expected = tiny_llama(layers=2)
    write_tiny_gguf(tmp_path / "tiny.gguf", expected, quantized=quantized)
    config = ModelConfig(name_or_path=str(tmp_path), gguf_file="tiny.gguf")
    model = load_model(config)
    for name, parameter in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[name], parameter, rtol=0.0, atol=tolerance), name
    tokenizer = load_tokenizer(config)
    assert tokenizer("Tom has").input_ids == tiny_tokenizer(bos=False)("Tom has").input_ids
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<pad>")
    model.save_pretrained(tmp_path / "plain")
    again = load_model(ModelConfig(name_or_path=str(tmp_path / "plain")))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_broken_gguf_is_refused(folder: Path) -> None:
    config = ModelConfig(name_or_path=str(folder), gguf_file="q.gguf")
    (folder / "q.gguf").write_bytes(b"not it at all")
    with pytest.raises(InputError, match="not a GGUF file"):
        validate_model_source(config)
    (folder / "q.gguf").write_bytes(b"GGUF\x03\x00\x00\x00cut off here")
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        load_model(config)


# -- the hub ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("offline")
def test_hub_name_offline_is_refused_with_a_remedy() -> None:
    config = ModelConfig(name_or_path="owner/model")
    validate_model_source(config)
    with pytest.raises(InputError, match=r"hub cannot be reached \(HF_HUB_OFFLINE is set\): name a folder"):
        load_model(config)
    with pytest.raises(InputError, match=r"model.tokenizer is 'owner/tokenizer'"):
        load_tokenizer(ModelConfig(name_or_path="owner/model", tokenizer="owner/tokenizer"))


@pytest.mark.usefixtures("offline")
def test_unreachable_hub_falls_back_to_its_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    class NoNetwork:
        def model_info(self, *_: Any, **__: Any) -> None:
            raise OSError("no route\nto the hub")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", NoNetwork)
    config = ModelConfig(name_or_path="owner/model")
    with pytest.raises(InputError, match=r"cannot be reached \(OSError: no route\)") as caught:
        load_model(config)
    assert "\n" not in str(caught.value)
    cached = tmp_path / "hub" / "models--owner--model"
    shutil.copytree(folder, cached / "snapshots" / "c0ffee")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("c0ffee")
    assert torch.equal(load_model(config).lm_head.weight, tiny_llama(layers=2).lm_head.weight)
    assert load_tokenizer(config).eos_token == "</s>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RepositoryNotFoundError", "hub has or shows no such model"),
        ("RevisionNotFoundError", "model.revision is 'v2', which owner/model does not have"),
        ("GatedRepoError", "which its owner gates"),
    ],
)
def test_hub_refusals_are_told_apart(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    import huggingface_hub
    from huggingface_hub import constants, errors

    refusal = getattr(errors, name)

    class Refuses:
        def model_info(self, *_: Any, **__: Any) -> None:
            raise refusal.__new__(refusal)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Refuses)
    with pytest.raises(InputError, match=message):
        load_model(ModelConfig(name_or_path="owner/model", revision="v2"))


def test_hub_names() -> None:
    assert model_source.is_hub_name("owner/model-7b_v1.2")
    assert model_source.is_hub_name("gpt2")
    for name in ("/abs/path", "./here", "../up", "a/b/c", "~/model", "owner/", "ow ner/x"):
        assert not model_source.is_hub_name(name)


def test_header_of_safetensors(template_folder: Path) -> None:
    header = read_safetensors_header(template_folder / "model.safetensors")
    assert header["lm_head.weight"]["shape"] == [384, 64]
    assert "__metadata__" not in header


# -- tokenizers ------------------------------------------------------------------------------------------------


def test_tokenizer_of_the_model_and_its_own_setting(template_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    tiny_tokenizer(bos=False).save_pretrained(other)
    own = load_tokenizer(ModelConfig(name_or_path=str(template_folder)))
    named = load_tokenizer(ModelConfig(name_or_path=str(template_folder), tokenizer=str(other)))
    assert own("Tom").input_ids == [1, *named("Tom").input_ids]
    assert own.decode(named("Tom has 12").input_ids) == "Tom has 12"


def test_tokenizer_without_pad_token_pads_with_unk_else_eos(folder: Path) -> None:
    tiny_tokenizer(pad=False).save_pretrained(folder)
    assert load_tokenizer(ModelConfig(name_or_path=str(folder))).pad_token == "<unk>"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings = json.loads((folder / name).read_text())
            settings.pop("unk_token", None)
            (folder / name).write_text(json.dumps(settings))
    assert load_tokenizer(ModelConfig(name_or_path=str(folder))).pad_token == "</s>"


def test_tokenizer_without_end_is_refused(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(InputError, match="no end-of-sequence token"):
        load_tokenizer(ModelConfig(name_or_path=str(folder)))


def test_missing_and_damaged_tokenizers_are_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match=r"the tokenizer of .* cannot be read"):
        load_tokenizer(ModelConfig(name_or_path=str(folder)))
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.json or tokenizer.model"):
        load_tokenizer(ModelConfig(name_or_path=str(folder)))


def test_tokenizer_larger_than_the_embedding_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    check_tokenizer_fits(tiny_llama(layers=1, vocab=len(tokenizer)), tokenizer)
    with pytest.raises(InputError, match=rf"has {len(tokenizer)} tokens, the model embeds {len(tokenizer) - 1}"):
        check_tokenizer_fits(tiny_llama(layers=1, vocab=len(tokenizer) - 1), tokenizer)


def train_sentencepiece(folder: Path, kind: str) -> Any:
    import sentencepiece

    corpus = folder.parent / "corpus.txt"
    corpus.write_text("\n".join(line.replace("\n", " ") for line in CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type=kind,
        byte_fallback=True,
        hard_vocab_limit=False,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture
def bare(folder: Path) -> Path:
    """A folder whose tokenizer is one SentencePiece file, as the first Llama's was."""
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink()
    return folder


# Importing protobuf's and SentencePiece's extension modules warns under Python 3.12 and newer.
@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
@pytest.mark.parametrize("declared", [False, True])
def test_bare_sentencepiece_is_read_as_sentencepiece_reads_it(bare: Path, declared: bool) -> None:
    reference = train_sentencepiece(bare, "bpe")
    if declared:
        (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(bare)))
    for text in ("Tom has 12 apples.", "two  spaces ", "żółw\n\nend", "3,456.5"):
        assert tokenizer(text).input_ids == [reference.bos_id(), *reference.encode(text)]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (reference.eos_id(), reference.unk_id())


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
def test_bare_sentencepiece_heeds_its_settings(bare: Path) -> None:
    reference = train_sentencepiece(bare, "bpe")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(bare)))
    assert tokenizer("Tom has 12").input_ids == reference.encode("Tom has 12")


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
def test_sentencepiece_that_transformers_misreads_is_refused(bare: Path) -> None:
    train_sentencepiece(bare, "unigram")
    with pytest.raises(InputError, match="SentencePiece model that transformers reads differently"):
        load_tokenizer(ModelConfig(name_or_path=str(bare)))


def test_damaged_sentencepiece_is_refused(bare: Path) -> None:
    (bare / "tokenizer.model").write_bytes(b"\x00\x01 nothing")
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(ModelConfig(name_or_path=str(bare)))


def test_nothing_is_recomputed_below_the_lowest_trained_layer() -> None:
    model = tiny_llama(layers=3).train()
    checkpoint_activations(model)
    weight = "model.layers.1.self_attn.q_proj.weight"
    shape = tuple(model.get_parameter(weight).shape)
    sz.sparsify(model, sz.Selection({weight: sz.WeightSelection(shape=shape, rows=[1, 2])}))
    calls = [0, 0, 0]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, at=number: calls.__setitem__(at, calls[at] + 1))
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert calls == [1, 2, 2]
    assert all(values.grad is not None for values in sz.trainable_parameters(model).values())
