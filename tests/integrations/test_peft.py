"""Does an adapter do under PEFT what it does here, and does PEFT's way of training one make an adapter of ours?"""

import copy
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_zero as sz
from sparse_zero.checkpoint.adapter import read_adapter
from sparse_zero.errors import InputError
from sparse_zero.integrations.peft import register_peft
from sparse_zero.integrations.peft_adapters import ReadyAdapters
from sparse_zero.layers.retired import Retired, RetiredEntries
from sparse_zero.zero.config import PLACEMENTS, Placement
from tests.models.tiny import tiny_llama, write_tiny_llama
from tests.models.tiny_families import FAMILIES, hand_made_selection

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'sparse-zero[peft]'")
# PEFT 0.21 asks transformers 5.23 for what that has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = torch.arange(3, 39).reshape(4, 9)
# Embeddings and heads that are tied, biases, norms, transposed weights, experts in one parameter, and a classifier.
LAYOUTS = ("llama", "llama_tied", "qwen2", "gpt2", "qwen2_moe", "gpt_oss", "dbrx", "bert")


@pytest.fixture(scope="module")
def Config() -> Any:
    return register_peft()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=TOKENS).logits
    return logits


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of the state dict, byte by byte."""
    return {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def retired_of(model: nn.Module, selection: sz.Selection) -> Retired:
    """Entries of the first weight that the selection leaves out."""
    name = next(iter(selection.weights)).partition("[")[0]
    taken = torch.zeros(model.get_parameter(name).numel(), dtype=torch.bool)
    sz.sparsify(copied := copy.deepcopy(model), selection)
    carrier: Any = next(
        each for each in copied.modules() if getattr(each, "originals", None) and each.parameter.numel() == len(taken)
    )
    for kind in carrier.values():
        taken[carrier.positions(kind)] = True
    positions = (~taken).nonzero().squeeze(1)[::7].contiguous()
    numbers = torch.randn(len(positions), generator=torch.Generator().manual_seed(8)) * 0.1
    return Retired(placement="delta", entries={name: RetiredEntries(positions=positions, numbers=numbers)})


def save_random(
    base: nn.Module, selection: sz.Selection, placement: Any, folder: Path, *, retired: bool = False, seed: int = 0
) -> None:
    """An adapter with random values."""
    model = copy.deepcopy(base)
    sz.sparsify(model, selection, placement, retired=retired_of(base, selection) if retired else None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in sz.trainable_parameters(model).values():
            values.add_(torch.randn(values.shape, generator=generator) * 0.1)
    sz.write_back(model)
    sz.save_adapter(model, folder)


def rows_of(model: nn.Module, ending: str = "v_proj.weight") -> sz.Selection:
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters() if name.endswith(ending)}
    return sz.Selection(
        {
            name: sz.WeightSelection(shape=(shape[0], shape[1]), block_size=8, blocks=[[0, 1]], rows=[9])
            for name, shape in shapes.items()
        }
    )


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_adapter_acts_merges_and_leaves_bit_for_bit(Config, name, placement, tmp_path):
    family = FAMILIES[name]
    base = family.make()
    selection = hand_made_selection(family, base, "mixed")
    save_random(base, selection, placement, tmp_path, retired=True)
    ours = copy.deepcopy(base)
    sz.load_adapter(ours, tmp_path, placement=placement)
    expected = logits_of(ours)
    assert not torch.equal(expected, logits_of(base))

    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert isinstance(model, peft.PeftModelForCausalLM) != family.classifies
    assert torch.equal(logits_of(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(base))
        assert bits(model.get_base_model()) == bits(base)
    assert torch.equal(logits_of(model), expected)
    # Stored again, it is the same adapter.
    model.save_pretrained(tmp_path / "again")
    for file in ("adapter_model.safetensors", "retired.safetensors", "adapter.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes(), file
    assert read_adapter(tmp_path / "again").selection == selection

    merged = model.merge_and_unload()
    sz.merge(ours)
    assert bits(merged) == bits(ours)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    unloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).unload()
    assert bits(unloaded) == bits(base)
    assert [type(module) for module in unloaded.modules()] == [type(module) for module in base.modules()]
    assert not hasattr(unloaded, "peft_config")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_in_bfloat16_it_merges_as_here(Config, placement, tmp_path):
    base = tiny_llama(layers=2).to(torch.bfloat16)
    save_random(base.float(), rows_of(base), placement, tmp_path)
    base = base.to(torch.bfloat16)
    for acting in PLACEMENTS:
        ours = copy.deepcopy(base)
        sz.load_adapter(ours, tmp_path, placement=acting)
        config = Config.from_pretrained(tmp_path)
        config.placement = acting
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config)
        assert torch.equal(logits_of(model), logits_of(ours))
        assert {values.dtype for name, values in ours.named_parameters() if "values_" in name} == {torch.float32}
        sz.merge(ours)
        assert bits(model.merge_and_unload()) == bits(ours)


def test_inplace_values_that_peft_read_to_a_device_wait_on_the_host(Config, tmp_path):
    """The weights show them on the device."""

    class OnDevice:
        """In the place of a tensor there."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def cpu(self) -> Tensor:
            return self.tensor

    base = tiny_llama(layers=2)
    save_random(base, rows_of(base), "inplace", tmp_path)
    adapter = read_adapter(tmp_path)
    adapters = ReadyAdapters(base)
    adapters.add("default", adapter, is_trained=False)
    ready = adapters["default"]
    read: Any = {name: OnDevice(values) for name, values in adapter.values.items()}
    ready.take_values(read, "inplace")
    assert all(ready.adapter.values[name] is values for name, values in adapter.values.items())


def test_adapters_on_one_base_are_exchanged_bit_for_bit(Config, tmp_path):
    family = FAMILIES["llama_tied"]
    base = family.make()
    selection = hand_made_selection(family, base, "mixed")
    expected: dict[Any, Tensor] = {}
    adapters: tuple[tuple[str, sz.Selection, Placement], ...] = (
        ("default", selection, "inplace"),
        ("delta", selection, "delta"),
        ("rows", rows_of(base), "inplace"),
    )
    for name, chosen, placement in adapters:
        save_random(base, chosen, placement, tmp_path / name, retired=name != "rows", seed=len(name))
        ours = copy.deepcopy(base)
        sz.load_adapter(ours, tmp_path / name, placement=placement)
        expected[name] = logits_of(ours)

    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "default")
    for name in ("delta", "rows"):
        # Added while another acts, which goes on.
        model.load_adapter(tmp_path / name, name)
        assert torch.equal(logits_of(model), expected["default"])
    for name in ("rows", "default", "delta", "rows", "delta", "default"):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert torch.equal(logits_of(model), expected[name]), name
        with model.disable_adapter():
            assert bits(model.get_base_model()) == bits(base)
    status = model.get_model_status()
    assert (status.enabled, status.available_adapters) == (True, ["default", "delta", "rows"])

    # Folded for a while, also one that does not act.
    for name in ("delta", "rows"):
        model.merge_adapter([name], safe_merge=True)
        torch.testing.assert_close(logits_of(model), expected[name], rtol=1e-4, atol=1e-5)
        assert model.get_model_status().merged_adapters == [name]
        model.unmerge_adapter()
        assert torch.equal(logits_of(model), expected["default"])

    clone = copy.deepcopy(model)
    clone.set_adapter("delta")
    assert torch.equal(logits_of(clone), expected["delta"])
    assert torch.equal(logits_of(model), expected["default"])
    # Modules that wait outside of the model go where the model goes.
    clone.to(torch.float64).to(torch.float32).set_adapter("rows")
    assert torch.equal(logits_of(clone), expected["rows"])

    model.set_adapter("delta")
    model.delete_adapter("delta")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits_of(model), expected["default"])
    assert bits(model.merge_and_unload(adapter_names=["rows"])) == bits(merged_here(base, tmp_path / "rows"))


def merged_here(base: nn.Module, folder: Path) -> nn.Module:
    model = copy.deepcopy(base)
    sz.load_adapter(model, folder)
    sz.merge(model)
    return model


def test_a_quantized_base(Config, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'sparse-zero[quant]'")
    from tests.sparse_zero.quantizing import quantize

    base = tiny_llama(layers=2)
    quantize(base, "nf4", "q_proj")
    save_random(copy.deepcopy(base), rows_of(base, "v_proj.weight"), "delta", tmp_path / "dense")
    shape = (base.model.layers[0].self_attn.q_proj.out_features, base.model.layers[0].self_attn.q_proj.in_features)
    chosen = sz.WeightSelection(shape=shape, block_size=16, blocks=[[0, 1]])
    selection = sz.Selection({f"model.layers.{layer}.self_attn.q_proj.weight": chosen for layer in (0, 1)})
    save_random(copy.deepcopy(base), selection, "delta", tmp_path / "codes")
    ours = copy.deepcopy(base)
    sz.load_adapter(ours, tmp_path / "codes", placement="delta")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "codes")
    assert torch.equal(logits_of(model), logits_of(ours))
    with pytest.raises(InputError, match="nothing can be merged into its codes"):
        model.merge_adapter()
    model.load_adapter(tmp_path / "dense", "dense")
    assert torch.equal(logits_of(model), logits_of(ours))
    sz.merge(ours)
    assert bits(model.merge_and_unload()) == bits(ours)
    left = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "codes").unload()
    assert [type(module) for module in left.modules()] == [type(module) for module in base.modules()]


def test_from_the_hub_s_cache(Config, tmp_path):
    """As the hub's client lays it out: links in a snapshot to files elsewhere."""
    base = tiny_llama(layers=2)
    save_random(base, rows_of(base), "inplace", tmp_path / "adapter")
    root, commit = tmp_path / "cache" / "models--somebody--adapter", "ab" * 20
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "adapter").iterdir())):
        shutil.copy(file, root / "blobs" / f"{number:040}")
        (root / "snapshots" / commit / file.name).symlink_to(Path("..", "..", "blobs", f"{number:040}"))
    expected = logits_of(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter"))
    shutil.rmtree(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), "somebody/adapter", cache_dir=str(tmp_path / "cache"))
    assert torch.equal(logits_of(model), expected)


def test_transformers_own_adapters(Config, tmp_path):
    base = tiny_llama(layers=2)
    save_random(base, rows_of(base), "inplace", tmp_path)
    expected = logits_of(merged_here(base, tmp_path))
    model = copy.deepcopy(base)
    with pytest.raises(InputError, match=r"transformers' load_adapter hands over adapter_config.json alone"):
        model.load_adapter(tmp_path)
    assert bits(model) == bits(base)
    model = copy.deepcopy(base)
    model.add_adapter(Config.from_pretrained(tmp_path))
    assert torch.equal(logits_of(model), expected)
    model.disable_adapters()
    assert torch.equal(logits_of(model), logits_of(base))
    model.enable_adapters()
    assert torch.equal(logits_of(model), expected)
    # One config for two models.
    config, models = Config.from_pretrained(tmp_path), [copy.deepcopy(base) for _ in range(2)]
    for each in models:
        each.add_adapter(config)
        assert torch.equal(logits_of(each), expected)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_new_adapter_trains_and_is_one_of_ours(Config, tmp_path, capsys):
    write_tiny_llama(tmp_path / "base", layers=2, tie=True)
    base = tiny_llama(layers=2, tie=True)
    base.name_or_path = str(tmp_path / "base")
    shape = tuple(base.model.embed_tokens.weight.shape)
    embedding = {"model.embed_tokens.weight": sz.WeightSelection(shape=(shape[0], shape[1]), rows=[5, 7])}
    selection = sz.Selection({**rows_of(base).weights, **embedding}, {"made by": "the test"})
    selection.save(tmp_path / "selection.safetensors")

    def train(model: Any, parameters: Any) -> list[float]:
        model.train()
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses = []
        for _ in range(3):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    ours = copy.deepcopy(base)
    sz.sparsify(ours, selection, "delta")
    expected = train(ours, sz.trainable_parameters(ours).values())

    config = Config(selection=tmp_path / "selection.safetensors", task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.print_trainable_parameters()
    count = selection.num_parameters
    assert (
        f"trainable params: {count:,d} || all params: {base.num_parameters() + count:,d} ||" in capsys.readouterr().out
    )
    assert torch.equal(logits_of(model), logits_of(base)), "values start at zero"
    model.activation_checkpointing_enable({"use_reentrant": False})
    held = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert train(model, held) == expected, "bit for bit"
    assert torch.equal(logits_of(model), logits_of(ours))
    model.save_pretrained(tmp_path / "trained")
    assert read_adapter(tmp_path / "trained").selection.metadata == {"made by": "the test"}
    loaded = copy.deepcopy(base)
    sz.load_adapter(loaded, tmp_path / "trained", placement="delta")
    assert torch.equal(logits_of(loaded), logits_of(ours))
    with model.disable_adapter():
        assert bits(model.get_base_model()) == bits(base)

    # Another adapter acts for a while: what is trained stays what the optimizer holds.
    model.add_adapter("other", Config(selection=rows_of(base, "q_proj.weight")))
    assert [parameter for parameter in model.parameters() if parameter.requires_grad] == held
    model.set_adapter("other")
    assert not any(parameter.requires_grad for parameter in held)
    model.set_adapter("default")
    assert all(
        mine is theirs for mine, theirs in zip((p for p in model.parameters() if p.requires_grad), held, strict=True)
    )
    assert torch.equal(logits_of(model), logits_of(ours))
    # Both are saved, the one that does not act in a folder of its name.
    model.save_pretrained(tmp_path / "both")
    assert read_adapter(tmp_path / "both" / "other").selection == rows_of(base, "q_proj.weight")
    # Into an adapter that is there already: values of the same entries only.
    again = peft.get_peft_model(copy.deepcopy(base), Config(selection=selection))
    again.load_adapter(tmp_path / "trained", "default", is_trainable=True)
    assert torch.equal(logits_of(again), logits_of(ours))
    with pytest.raises(InputError, match="values of another selection, placement or retired entries"):
        again.load_adapter(tmp_path / "both" / "other", "default")


def test_a_loaded_adapter_is_trained_further_by_delta(Config, tmp_path):
    base = tiny_llama(layers=2)
    save_random(base, rows_of(base), "inplace", tmp_path, retired=True)
    frozen = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    frozen.set_adapter("default")
    assert frozen.get_nb_trainable_parameters()[0] == 0, "its values stand in the weights"
    with pytest.raises(InputError, match="load the adapter with is_trainable=True"):
        frozen.set_requires_grad("default")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert model.get_nb_trainable_parameters()[0] == rows_of(base).num_parameters
    torch.testing.assert_close(logits_of(model), logits_of(frozen), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "delta", save_embedding_layers=False)
    stored = read_adapter(tmp_path / "delta")
    assert (stored.placement, stored.retired.placement) == ("delta", "delta")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "delta")
    assert torch.equal(logits_of(again), logits_of(model))


def test_the_trainer_s_plain_flow_trains_stores_and_continues(Config, tmp_path):
    from transformers import Trainer, TrainingArguments

    folder = write_tiny_llama(tmp_path / "base", layers=2)
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS.repeat(2, 1)]

    def trained(out: str, steps: int, resume: bool = False) -> Any:
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folder)
        model = peft.get_peft_model(base, Config(selection=rows_of(base), task_type="CAUSAL_LM"))
        arguments = TrainingArguments(
            str(tmp_path / out),
            max_steps=steps,
            save_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = trained("whole", 2)
    trained("parts", 1)
    continued = trained("parts", 2, resume=True)
    assert torch.equal(logits_of(continued), logits_of(whole))
    base = tiny_llama(layers=2)
    sz.load_adapter(base, tmp_path / "parts" / "checkpoint-2", placement="delta")
    assert torch.equal(logits_of(base), logits_of(whole))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_refused_is_named(Config, tmp_path):
    base = tiny_llama(layers=2)
    save_random(base, rows_of(base), "inplace", tmp_path / "adapter")
    load = peft.PeftModel.from_pretrained
    with pytest.raises(InputError, match="low_cpu_mem_usage is true"):
        load(copy.deepcopy(base), tmp_path / "adapter", low_cpu_mem_usage=True)
    with pytest.raises(InputError, match="task_type is SEQ_CLS, for which PEFT trains a copy of the head"):
        Config(task_type="SEQ_CLS")
    with pytest.raises(InputError, match="placement is 'outside': choose one of inplace, delta"):
        Config(placement="outside")
    with pytest.raises(InputError, match=r"selection is a dict: give a sz\.Selection"):
        Config(selection={})
    with pytest.raises(InputError, match="the config has no selection"):
        peft.get_peft_model(copy.deepcopy(base), Config())
    with pytest.raises(InputError, match="'inplace' needs values written back"):
        peft.get_peft_model(copy.deepcopy(base), Config(selection=rows_of(base), placement="inplace"))
    with pytest.raises(InputError, match="Sequential, which iterates over its modules"):
        weights = {"0.weight": sz.WeightSelection(shape=(4, 4), rows=[1])}
        peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), Config(selection=sz.Selection(weights)))
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[0].self_attn.v_proj.weight[9, 3] += 1e-3
    before = bits(other)
    with pytest.raises(InputError, match="was trained on another base"):
        load(other, tmp_path / "adapter")
    assert bits(other) == before
    assert not hasattr(other, "peft_config")

    model = load(copy.deepcopy(base), tmp_path / "adapter")
    expected = logits_of(model)
    with pytest.raises(InputError, match="was trained on another base"):
        save_random(other, rows_of(other), "delta", tmp_path / "other")
        model.load_adapter(tmp_path / "other", "other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits_of(model), expected), "the one before goes on acting"
    model.load_adapter(tmp_path / "adapter", "second")
    for call, message in (
        (lambda: model.base_model.set_adapter(["default", "second"]), "asked for at once"),
        (lambda: model.merge_and_unload(adapter_names=["default", "second"]), "asked for at once"),
        (lambda: model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum"), "is not supported"),
        (lambda: model(input_ids=TOKENS, adapter_names=["second"] * 4), "one adapter acts at a time"),
        (lambda: sz.load_adapter(model, tmp_path / "adapter"), "this is a PeftModel"),
        (lambda: sz.save_adapter(model, tmp_path / "out"), "this is a PeftModel"),
        (lambda: sz.load_adapter(model.get_base_model(), tmp_path / "adapter"), "PEFT has put adapters on this model"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert torch.equal(logits_of(model), expected)
    with pytest.raises(InputError, match="no pickle is ever read"):
        model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(InputError, match=r"besides the values: save with save_embedding_layers=False"):
        model.save_pretrained(tmp_path / "more", save_embedding_layers=True)
    ours = copy.deepcopy(base)
    sz.load_adapter(ours, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"sz\.load_adapter has put adapters on this model"):
        load(ours, tmp_path / "adapter")


def test_damage_is_found_before_the_model_changes(Config, tmp_path):
    base = tiny_llama(layers=2)
    save_random(base, rows_of(base), "inplace", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    model = copy.deepcopy(base)
    with pytest.raises(InputError, match="does not have the content that was written"):
        peft.PeftModel.from_pretrained(model, tmp_path)
    assert bits(model) == bits(base)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"the package 'peft' is needed.*pip install 'sparse-zero\[peft\]'"):
        register_peft()


def test_the_config_says_what_peft_needs_and_no_more(tmp_path):
    base = tiny_llama(layers=2)
    save_random(base, rows_of(base), "delta", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "peft_type": "SPARSE_ZERO",
        "revision": None,
        "task_type": "CAUSAL_LM",
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_lines_of_the_page_run(tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    write_tiny_llama(tmp_path / "base", layers=2)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 4
    assert read_adapter("trained").selection == read_adapter("math").selection == names["selection"]
