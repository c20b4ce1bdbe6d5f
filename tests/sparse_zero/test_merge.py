"""Invariant 6, and sparsify, adapters and parameter groups on one process."""

import copy
import json

import pytest
import torch
from torch import nn

import sparse_zero as sz
from sparse_zero.errors import InputError
from tests.models.tiny import tiny_llama
from tests.sparse_zero.helpers import TinyModel, mixed_selection, tiny_loss


def llama_selection(model: nn.Module) -> sz.Selection:
    regions = (
        sz.RegionConfig(kind="block", modules=("*.self_attn.*",), block_size=24),
        sz.RegionConfig(kind="row", modules=("*.mlp.{up,gate}_proj",)),
        sz.RegionConfig(kind="column", modules=("*.mlp.*",)),
    )
    config = sz.SelectionConfig(regions=regions, score="random", budget=sz.BudgetConfig(fraction=0.1))
    return sz.select(model, None, config)


def train_a_little(model: nn.Module) -> None:
    """Three plain AdamW steps with write-back by hand."""
    optimizer = torch.optim.AdamW(sz.trainable_parameters(model).values(), lr=1e-2)
    tokens = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        sz.write_back(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", ["inplace", "delta"])
@pytest.mark.parametrize("tie", [False, True])
def test_invariant_6_merge_gives_a_plain_model_and_unmerge_the_base(placement, dtype, tie, tmp_path):
    model = tiny_llama(tie=tie).to(dtype)
    base = copy.deepcopy(model.state_dict())
    classes = {name: type(module) for name, module in model.named_modules()}
    selection = llama_selection(model)
    sz.sparsify(model, selection, placement)
    assert set(base) <= set(model.state_dict())
    train_a_little(model)
    tokens = torch.arange(4, 24).unsqueeze(0)
    model.eval()
    with torch.no_grad():
        trained = model(tokens, use_cache=False).logits
    undo = sz.merge(model)
    assert list(model.state_dict()) == list(base)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    with torch.no_grad():
        merged = model(tokens, use_cache=False).logits
    if placement == "inplace":
        assert torch.equal(merged, trained)
    else:
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(merged, trained, atol=tolerance, rtol=tolerance)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed == set(selection.weights)

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())

    assert sum(t.numel() for kinds in undo.originals.values() for t in kinds.values()) == selection.num_parameters
    assert all(t.device.type == "cpu" and t.dtype == dtype for k in undo.originals.values() for t in k.values())
    sz.unmerge(model, undo)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


def test_merge_needs_no_write_back_before_it():
    model = TinyModel()
    sz.sparsify(model, mixed_selection(model), "inplace")
    with torch.no_grad():
        for values in sz.trainable_parameters(model).values():
            values.add_(1.0)
    expected = copy.deepcopy(model)
    sz.write_back(expected)
    sz.merge(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(expected.named_parameters())[name])


@pytest.mark.parametrize("placement", ["inplace", "delta"])
def test_sparsify_trains_exactly_the_selection(placement):
    model = TinyModel()
    selection = mixed_selection(model)
    tokens = torch.arange(18).reshape(2, 9)
    before = model(tokens)
    sz.sparsify(model, selection, placement)
    assert torch.equal(model(tokens), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == sz.trainable_parameters(model).keys()
    assert sum(p.numel() for p in trained.values()) == selection.num_parameters
    groups = sz.parameter_groups(model, per_kind={"row": {"lr": 1e-3}})
    assert [group["kind"] for group in groups] == ["block", "row", "column"]
    assert groups[1]["lr"] == 1e-3
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trained.values()}
    with pytest.raises(InputError, match="already"):
        sz.sparsify(model, selection)


def test_nothing_below_the_lowest_trained_layer_is_computed_in_backward():
    model = TinyModel(layers=4)
    selection = mixed_selection(model)
    upper = sz.Selection({name: weight for name, weight in selection.weights.items() if "layers.3" in name})
    sz.sparsify(model, upper)
    entered: list[int] = []

    def watch(number: int, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: entered.append(number))

    for number, layer in enumerate(model.layers):
        layer.self_attn.register_forward_hook(lambda _, __, output, number=number: watch(number, output))
    tiny_loss(model, torch.arange(18).reshape(2, 9)).backward()
    assert entered == [3]


def test_siblings_share_one_kept_input():
    model = TinyModel()
    names = [f"layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    shapes = {name: (p.shape[0], p.shape[-1]) for name, p in model.named_parameters()}
    rows_on_one = {names[0]: sz.WeightSelection(shape=shapes[names[0]], rows=[0])}
    columns = {name: sz.WeightSelection(shape=shapes[name], columns=[1, 2]) for name in names[1:]}
    sz.sparsify(model, sz.Selection(rows_on_one | columns))
    assert [model.get_submodule(name[:-7]).keep_input for name in names] == [True, True, True]
    model = TinyModel()
    sz.sparsify(model, sz.Selection(columns))
    assert [model.get_submodule(name[:-7]).keep_input for name in names[1:]] == [False, False]


def test_bad_sparsify_leaves_the_model_alone():
    model = TinyModel(tie=True)
    good = sz.WeightSelection(shape=(20, 20), rows=[0])
    cases = {
        "no weight layers.9.self_attn.q_proj.weight": {"layers.9.self_attn.q_proj.weight": good},
        r"as \(20, 20\), the model has \(10, 20\)": {"layers.0.self_attn.k_proj.weight": good},
        "no weight lm_head.weight": {"lm_head.weight": sz.WeightSelection(shape=(32, 20), rows=[0])},
        "selection is empty": {},
    }
    for message, weights in cases.items():
        with pytest.raises(InputError, match=message):
            sz.sparsify(model, sz.Selection({"layers.1.self_attn.q_proj.weight": good, **weights} if weights else {}))
    with pytest.raises(InputError, match="placement is 'outside'"):
        sz.sparsify(model, mixed_selection(model), "outside")  # type: ignore[arg-type]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, sz.SparseLinear) for module in model.modules())
    with pytest.raises(InputError, match="has no values"):
        sz.merge(model)
    sz.sparsify(model, sz.Selection({"layers.0.self_attn.q_proj.weight": good}))
    with pytest.raises(InputError, match="per_kind names 'block'"):
        sz.parameter_groups(model, per_kind={"block": {"lr": 1.0}})


@pytest.fixture
def adapter(tmp_path):
    """A trained adapter and the model it was trained in."""
    torch.manual_seed(0)
    base = TinyModel()
    model = copy.deepcopy(base)
    sz.sparsify(model, sz.Selection(mixed_selection(model).weights, {"made by": "the test"}), "inplace")
    with torch.no_grad():
        for values in sz.trainable_parameters(model).values():
            values.add_(torch.randn_like(values))
    sz.write_back(model)
    folder = tmp_path / "adapter"
    sz.save_adapter(model, folder, base=sz.BaseIdentity(name="tiny", sha256="ab" * 32))
    return base, model, folder


def test_an_adapter_is_small_and_loads_on_its_base(adapter):
    base, model, folder = adapter
    tokens = torch.arange(18).reshape(2, 9)
    loaded = copy.deepcopy(base)
    selection = sz.load_adapter(loaded, folder, trainable=True)
    assert selection.metadata == {"made by": "the test"}
    assert torch.equal(loaded(tokens), model(tokens))
    assert sum(p.numel() for p in sz.trainable_parameters(loaded).values()) == selection.num_parameters
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < 4 * selection.num_parameters + 30_000
    # Loaded adapters can be saved again, also when they are frozen.
    frozen = copy.deepcopy(base)
    sz.load_adapter(frozen, folder)
    sz.save_adapter(frozen, folder.parent / "again")
    again = folder.parent / "again" / "adapter_model.safetensors"
    assert again.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_several_adapters_are_exchanged_bit_for_bit(adapter, tmp_path):
    base, first, folder = adapter
    second = copy.deepcopy(base)
    sz.sparsify(second, llama_like_rows(second), "delta")
    with torch.no_grad():
        for values in sz.trainable_parameters(second).values():
            values.add_(torch.randn_like(values))
    sz.save_adapter(second, tmp_path / "second")
    tokens = torch.arange(18).reshape(2, 9)
    expected = {"first": first(tokens), "second": second(tokens), None: base(tokens)}

    model = copy.deepcopy(base)
    sz.load_adapter(model, folder, name="first")
    sz.load_adapter(model, tmp_path / "second", name="second", placement="delta")
    for name in ("second", "first", None, "second", None, "first", "first"):
        sz.set_adapter(model, name)
        assert torch.equal(model(tokens), expected[name]), name
    sz.set_adapter(model, None)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, sz.SparseLinear) for module in model.modules())

    sz.set_adapter(model, "second")
    with pytest.raises(InputError, match=r"'third' is loaded \(loaded: 'first', 'second'\)"):
        sz.set_adapter(model, "third")
    with pytest.raises(InputError, match="'first' is loaded already"):
        sz.load_adapter(model, folder, name="first")
    with torch.no_grad():
        model.layers[1].self_attn.q_proj.weight[0, 0] += 1e-3
    with pytest.raises(InputError, match="another base"):
        sz.load_adapter(model, folder, name="third")
    # The failed load left the active adapter where it was.
    assert any(isinstance(module, sz.SparseLinear) for module in model.modules())


def test_adapters_of_tied_weights_are_exchanged_bit_for_bit(tmp_path):
    """Rows of an embedding that the head has too, by both placements, and one that leaves it alone."""
    torch.manual_seed(0)
    base, tokens = TinyModel(tie=True), torch.arange(18).reshape(2, 9)
    tied = sz.Selection({"embed_tokens.weight": sz.WeightSelection(shape=(32, 20), rows=[3, 5], columns=[1])})
    expected: dict[str | None, torch.Tensor] = {None: base(tokens)}
    model = copy.deepcopy(base)
    for name, selection, placement in (
        ("inplace", tied, "inplace"),
        ("delta", tied, "delta"),
        ("rows", llama_like_rows(base), "inplace"),
    ):
        trained = copy.deepcopy(base)
        sz.sparsify(trained, selection, placement)  # type: ignore[arg-type]
        with torch.no_grad():
            for values in sz.trainable_parameters(trained).values():
                values.add_(torch.randn_like(values))
        sz.write_back(trained)
        sz.save_adapter(trained, tmp_path / name)
        expected[name] = trained(tokens)
        # Added while another is active.
        sz.load_adapter(model, tmp_path / name, name=name, placement=placement)  # type: ignore[arg-type]
    order: tuple[str | None, ...] = ("delta", "inplace", "rows", None, "inplace", "delta", None, "rows", None)
    for active in order:
        sz.set_adapter(model, active)
        assert torch.equal(model(tokens), expected[active]), active
        assert model.lm_head.weight is model.embed_tokens.weight or active in ("delta", "inplace")
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())


class Scaled(nn.Sequential):
    """Two linears and a scale; adding a submodule for values of the scale would add a step."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.ones(4))


def test_a_load_that_fails_late_leaves_the_active_adapter(tmp_path):
    torch.manual_seed(0)
    base, x = nn.ModuleDict({"body": Scaled()}), torch.randn(3, 4)
    rows = {"body.0.weight": sz.WeightSelection(shape=(4, 4), rows=[1])}
    good = copy.deepcopy(base)
    sz.sparsify(good, sz.Selection(rows))
    with torch.no_grad():
        next(iter(sz.trainable_parameters(good).values())).add_(1.0)
    sz.write_back(good)
    sz.save_adapter(good, tmp_path / "good")
    # The same names in a model that has no objection.
    other = nn.ModuleDict({"body": nn.Module()})
    other["body"].add_module("0", copy.deepcopy(base["body"][0]))
    other["body"].register_parameter("scale", nn.Parameter(torch.ones(4)))
    sz.sparsify(other, sz.Selection({**rows, "body.scale": sz.WeightSelection(shape=(4, 1), whole=True)}))
    sz.save_adapter(other, tmp_path / "late")

    model = copy.deepcopy(base)
    sz.load_adapter(model, tmp_path / "good")
    with pytest.raises(InputError, match="which iterates over its submodules"):
        sz.load_adapter(model, tmp_path / "late", name="late")
    assert torch.equal(model["body"](x), good["body"](x))
    sz.set_adapter(model, None)
    assert torch.equal(model["body"](x), base["body"](x))


def llama_like_rows(model: nn.Module) -> sz.Selection:
    region = sz.RegionConfig(kind="row", modules=("*.v_proj",), per_matrix=2)
    return sz.select(model, None, sz.SelectionConfig(regions=(region,), score="first"))


def damage(folder, case):
    values = folder / "adapter_model.safetensors"
    if case == "cut":
        values.write_bytes(values.read_bytes()[:-7])
    elif case == "flipped":
        data = bytearray(values.read_bytes())
        data[-3] ^= 1
        values.write_bytes(data)
    elif case == "missing":
        (folder / "selection.safetensors").unlink()
    elif case == "no manifest":
        (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("cut", "adapter_model.safetensors has .* bytes instead of"),
        ("flipped", "adapter_model.safetensors does not have the content"),
        ("missing", "selection.safetensors is missing"),
        ("no manifest", "is no adapter"),
    ],
)
def test_a_damaged_adapter_is_refused_and_the_model_unchanged(adapter, case, message):
    base, _, folder = adapter
    damage(folder, case)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(InputError, match=message):
        sz.load_adapter(base, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not any(isinstance(module, sz.SparseLinear) for module in base.modules())


def test_an_adapter_of_another_base_is_refused(adapter):
    base, _, folder = adapter
    with torch.no_grad():
        base.layers[1].self_attn.q_proj.weight[0, 0] += 1e-3
    with pytest.raises(InputError, match=r"another base.*layers.1.self_attn.q_proj.weight.*1 of 8"):
        sz.load_adapter(base, folder)
    with pytest.raises(InputError, match="no adapter folder"):
        sz.load_adapter(base, folder / "nowhere")


def test_an_adapter_names_its_base_and_holds_no_pickle(adapter):
    _, _, folder = adapter
    header = json.loads((folder / "adapter.json").read_text())
    assert header["base"] == {"name": "tiny", "sha256": "ab" * 32}
    assert header["placement"] == "inplace"
    assert {path.name for path in folder.iterdir()} == {
        "adapter.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "selection.safetensors",
    }
    # A wider load of the same numbers is the same base.
    wide = TinyModel().double()
    wide.load_state_dict({name: tensor.double() for name, tensor in dict(adapter[0].state_dict()).items()})
    sz.load_adapter(wide, folder)
