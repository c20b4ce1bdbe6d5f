"""Retired entries: they act like the numbers that they are, survive every form on disk, and leave no trace behind."""

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_zero as sz
from sparse_zero.checkpoint.folders import MANIFEST, file_sha256
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json, write_safetensors
from sparse_zero.layers.retired import Retired, RetiredEntries, RetiredProduct, retired_product
from sparse_zero.layers.sparsify import retired_of, selection_of
from sparse_zero.reselection.migration import LiveEntries, mean_second_moments, plan_migration
from sparse_zero.reselection.plain import effective_weights, without_values
from sparse_zero.selection.config import Kind
from sparse_zero.zero.config import PLACEMENTS


class Model(nn.Module):
    """A linear with a bias, an embedding, and a stack of matrices that one parameter holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.up = nn.Linear(7, 9)
        self.experts = nn.Parameter(torch.randn(3, 7, 9))
        self.other = nn.Linear(7, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.up(self.embed(tokens)))
        result: Tensor = self.other(torch.einsum("bli,eoi->blo", x, self.experts))
        return result


TOKENS = torch.arange(22).reshape(2, 11) % 11


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def live() -> sz.Selection:
    return sz.Selection(
        {
            "up.weight": sz.WeightSelection(shape=(9, 7), block_size=4, blocks=[[0, 1]], rows=[8]),
            "embed.weight": sz.WeightSelection(shape=(11, 7), rows=[2, 3]),
            "experts[1]": sz.WeightSelection(shape=(7, 9), columns=[4]),
        },
        {"made by": "the test"},
    )


def numbers_at(names: Mapping[str, list[int]], scale: float = 0.3) -> Retired:
    """Deltas at some positions of some parameters."""
    generator = torch.Generator().manual_seed(5)
    return Retired(
        placement="delta",
        entries={
            name: RetiredEntries(
                positions=torch.tensor(positions), numbers=scale * torch.randn(len(positions), generator=generator)
            )
            for name, positions in names.items()
        },
    )


# In parameters that have values besides, and in others: a vector, a linear.
RETIRED = numbers_at(
    {
        "up.weight": [0, 1, 30, 31, 48],
        "embed.weight": [0, 5, 6, 70],
        "experts": [0, 62, 150],
        "up.bias": [1, 8],
        "other.weight": [3, 4, 34],
    }
)


def dense_with(retired: Retired, dtype: torch.dtype = torch.float32) -> Model:
    """The base with the retired deltas added, by hand."""
    model = make_model(dtype)
    for name, entries in retired.entries.items():
        flat = model.get_parameter(name).data.view(-1)
        for position, number in zip(entries.positions.tolist(), entries.numbers, strict=True):
            flat[position] = (flat[position].float() + number).to(dtype)
    return model


def sparse(placement: Any, dtype: torch.dtype = torch.float32) -> Model:
    model = make_model(dtype)
    sz.sparsify(model, live(), placement, retired=RETIRED)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(13, 17), (1, 5), (6, 1)])
def test_the_retired_product_is_that_of_a_dense_matrix(num_outputs, num_inputs, dtype, tolerance):
    torch.manual_seed(0)
    size = num_outputs * num_inputs
    positions = torch.randperm(size)[: -(-size // 3)].sort().values
    numbers = torch.randn(len(positions))
    dense = torch.zeros(size).index_copy(0, positions, numbers).view(num_outputs, num_inputs)
    product = RetiredProduct(RetiredEntries(positions=positions, numbers=numbers), (num_outputs, num_inputs))
    x = torch.randn(2, 3, num_inputs).to(dtype).requires_grad_()
    expected_x = x.detach().float().requires_grad_()
    for each in (product, copy.deepcopy(product)):
        y, expected = retired_product(x, each, dtype), nn.functional.linear(expected_x, dense)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, atol=tolerance, rtol=tolerance)
        gradient = torch.randn_like(expected)
        (dx,) = torch.autograd.grad(y, x, gradient.to(dtype))
        (expected_dx,) = torch.autograd.grad(expected, expected_x, gradient)
        assert dx.dtype == dtype
        torch.testing.assert_close(dx.float(), expected_dx, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_retired_entries_act_and_the_values_get_the_gradient_of_what_acts(placement):
    model, dense = sparse(placement), dense_with(RETIRED)
    y, expected = model(TOKENS), dense(TOKENS)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, values in sz.trainable_parameters(model).items():
        module, _, kind = name.rpartition(".values_")
        weight = {"up": "up.weight", "sparse_experts": "experts[1]", "embed.sparse_weight": "embed.weight"}[module]
        gradient = dense.get_parameter(weight.partition("[")[0]).grad
        gradient = gradient[1] if weight == "experts[1]" else gradient
        positions = live().weights[weight].flat_indices(kind)  # type: ignore[arg-type]
        torch.testing.assert_close(values.grad, gradient.reshape(-1)[positions], atol=1e-5, rtol=1e-5)
    assert len(sz.trainable_parameters(model)) == 4
    assert sz.num_retired(model) == RETIRED.num_entries == 17
    assert selection_of(model) == live()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(TOKENS), model(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_invariant_6_merge_keeps_what_acted_and_unmerge_restores_the_base(placement, dtype):
    model, base = sparse(placement, dtype), make_model(dtype).state_dict()
    expected = dense_with(RETIRED, dtype).state_dict()
    undo = sz.merge(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert type(model.up) is nn.Linear
    sz.unmerge(model, undo)
    assert list(model.state_dict()) == list(base)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())


def same_retired(a: Retired, b: Retired) -> bool:
    return a.entries.keys() == b.entries.keys() and all(
        torch.equal(a.entries[name].positions, b.entries[name].positions)
        and torch.equal(a.entries[name].numbers, b.entries[name].numbers)
        for name in a.entries
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("loaded", PLACEMENTS)
def test_an_adapter_brings_its_retired_entries_to_either_placement(placement, loaded, tmp_path):
    model = sparse(placement)
    with torch.no_grad():
        for values in sz.trainable_parameters(model).values():
            values.add_(torch.randn_like(values), alpha=0.1)
    sz.write_back(model)
    sz.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter.json").read_text())["num_retired"] == 17
    again = make_model()
    sz.load_adapter(again, tmp_path / "adapter", placement=loaded)
    assert sz.num_retired(again) == 17
    if loaded == placement:
        assert torch.equal(again(TOKENS), model(TOKENS))
        assert same_retired(retired_of(again), retired_of(model))
        sz.save_adapter(again, tmp_path / "again")
        for name in ("retired.safetensors", "adapter_model.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    torch.testing.assert_close(again(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-5)


def test_adapters_with_retired_entries_are_exchanged_bit_for_bit(tmp_path):
    base = make_model()
    folders = {}
    for placement in PLACEMENTS:
        folders[placement] = tmp_path / placement
        sz.save_adapter(sparse(placement), folders[placement])
    plain = make_model()
    sz.sparsify(plain, live(), "inplace")
    sz.save_adapter(plain, tmp_path / "none")
    assert not (tmp_path / "none" / "retired.safetensors").exists()
    expected: dict[str | None, Tensor] = {None: base(TOKENS), "none": plain(TOKENS)}
    for placement in PLACEMENTS:
        expected[placement] = sparse(placement)(TOKENS)

    model = make_model()
    sz.load_adapter(model, tmp_path / "none", name="none")
    for placement in PLACEMENTS:
        sz.load_adapter(model, folders[placement], name=placement, placement=placement)
    for name in ("inplace", "delta", "none", "inplace", None, "delta", None):
        sz.set_adapter(model, name)
        assert torch.equal(model(TOKENS), expected[name]), name
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_of_a_base_that_differs_under_a_retired_entry_is_refused(tmp_path):
    sz.save_adapter(sparse("delta"), tmp_path / "adapter")
    model = make_model()
    with torch.no_grad():
        model.other.weight.view(-1)[34] += 1e-3
    with pytest.raises(InputError, match=r"another base.*other\.weight.*1 of 5"):
        sz.load_adapter(model, tmp_path / "adapter")


def rewrite(folder: Path, name: str, content: Any) -> None:
    """Put other content, or what lies there (None), into a file of a folder, and into the manifest."""
    if name.endswith(".json"):
        atomic_write_json(folder / name, content)
    elif content is not None:
        write_safetensors(folder / name, content, {"format": "sparse_zero.retired"})
    manifest = read_json(folder / MANIFEST)
    path = folder / name
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    atomic_write_json(folder / MANIFEST, manifest)


@pytest.mark.parametrize("version", [1, 2])
def test_an_adapter_of_an_older_format_is_still_read(version, tmp_path):
    """Those had the values in a file of their own name, without a prefix, and nothing for PEFT."""
    folder = tmp_path / "adapter"
    model = make_model()
    sz.sparsify(model, live(), "delta")
    with torch.no_grad():
        for values in sz.trainable_parameters(model).values():
            values.add_(torch.randn_like(values))
    sz.save_adapter(model, folder)
    tensors = {name: values.detach() for name, values in sz.trainable_parameters(model).items()}
    write_safetensors(folder / "values.safetensors", tensors, {"format": "sparse_zero.values"})
    header = read_json(folder / "adapter.json")
    if version == 1:
        del header["num_retired"]
    files = read_json(folder / MANIFEST)["files"]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
        del files[name]
    files["values.safetensors"] = {}
    atomic_write_json(folder / MANIFEST, {"files": files})
    rewrite(folder, "values.safetensors", None)
    rewrite(folder, "adapter.json", {**header, "version": version})
    again = make_model()
    sz.load_adapter(again, folder, placement="delta")
    assert sz.num_retired(again) == 0
    assert torch.equal(again(TOKENS), model(TOKENS))
    # Saved again it has the present format, with the same values.
    sz.save_adapter(again, tmp_path / "again")
    assert read_json(tmp_path / "again" / "adapter.json")["version"] == 3
    rewrite(folder, "adapter.json", {**header, "version": 4})
    with pytest.raises(InputError, match=r"version 4, not 'sparse_zero.adapter' up to 3"):
        sz.load_adapter(make_model(), folder)


@pytest.mark.parametrize(
    ("positions", "numbers", "message"),
    [
        ([5, 3], [1.0, 2.0], "has no ascending positions of other.weight"),
        ([3, 3], [1.0, 2.0], "has no ascending positions of other.weight"),
        ([3, 4], [1.0, 2.0], "has 2 retired entries, and adapter.json names 17"),
        ([-1, 3], [1.0, 2.0], "has no ascending positions of other.weight"),
        ([3], [1.0, 2.0], "has no number for each position of other.weight"),
    ],
)
def test_damaged_retired_entries_are_refused_and_the_model_unchanged(positions, numbers, message, tmp_path):
    sz.save_adapter(sparse("delta"), tmp_path / "adapter")
    content = {"other.weight/positions": torch.tensor(positions), "other.weight/numbers": torch.tensor(numbers)}
    rewrite(tmp_path / "adapter", "retired.safetensors", content)
    model = make_model()
    with pytest.raises(InputError, match=message):
        sz.load_adapter(model, tmp_path / "adapter")
    assert all(torch.equal(tensor, make_model().state_dict()[name]) for name, tensor in model.state_dict().items())


def test_retired_entries_that_do_not_fit_are_refused_before_anything_changes():
    model = make_model()
    # Row 8 of up.weight is trained.
    with pytest.raises(InputError, match=r"up\.weight has entries that are both retired and selected"):
        sz.sparsify(model, live(), retired=numbers_at({"up.weight": [0, 58]}))
    with pytest.raises(InputError, match="no weight elsewhere"):
        sz.sparsify(model, live(), retired=numbers_at({"elsewhere": [0]}))
    assert not any(isinstance(module, sz.SparseLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_those_who_score_see_a_plain_model_with_everything_that_acts(placement):
    model, expected = sparse(placement), dense_with(RETIRED)
    before, output = copy.deepcopy(model.state_dict()), model(TOKENS)
    with effective_weights(model), without_values(model):
        assert {name: type(module) for name, module in model.named_modules()} == {
            name: type(module) for name, module in expected.named_modules()
        }
        found = dict(model.named_parameters())
        assert list(found) == [name for name, _ in expected.named_parameters()]
        assert all(torch.equal(parameter, found[name]) for name, parameter in expected.named_parameters())
        model(TOKENS).sum()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(TOKENS), output)
    with pytest.raises(ZeroDivisionError), effective_weights(model), without_values(model):
        raise ZeroDivisionError
    assert torch.equal(model(TOKENS), output)


def random_entries(generator: torch.Generator, size: int, number: int) -> Tensor:
    return torch.randperm(size, generator=generator)[:number]


@pytest.mark.parametrize("seed", range(5))
def test_a_migration_takes_every_entry_by_its_position(seed):
    """Against dictionaries of positions, one entry at a time."""
    generator = torch.Generator().manual_seed(seed)
    size = 60
    before: dict[str, dict[int, tuple[float, float, float]]] = {}
    old: dict[str, dict[int, float]] = {}
    live_of, retired_of_name, wanted = {}, {}, {}
    for name in ("a", "b", "c", "d"):
        order = torch.randperm(size, generator=generator)
        trained, gone = order[: 20 * (name != "d")].sort().values, order[20 : 30 + 10 * (name == "d")].sort().values
        numbers = [torch.rand(len(trained), generator=generator) for _ in range(3)]
        before[name] = {
            at: (m, f, s) for at, m, f, s in zip(trained.tolist(), *(each.tolist() for each in numbers), strict=True)
        }
        if len(trained):
            live_of[name] = LiveEntries(
                positions=trained, masters=numbers[0], moments={"exp_avg": numbers[1], "exp_avg_sq": numbers[2]}
            )
        retired_numbers = torch.rand(len(gone), generator=generator)
        old[name] = dict(zip(gone.tolist(), retired_numbers.tolist(), strict=True))
        retired_of_name[name] = RetiredEntries(positions=gone, numbers=retired_numbers)
        chosen = random_entries(generator, size, 25)
        kinds: dict[Kind, Tensor] = {"block": chosen[:10], "column": chosen[10:]}
        if name != "c":  # A parameter of which nothing is trained any more.
            wanted[name] = kinds
    found = plan_migration(live_of, retired_of_name, wanted)

    kept = new = returned = dropped = 0
    for name in before:
        expected_retired = {**old[name], **{at: m for at, (m, _, _) in before[name].items()}}
        for kind, positions in wanted.get(name, {}).items():
            values = found.values[name][kind]
            for number, at in enumerate(positions.tolist()):
                expected_retired.pop(at, None)
                entry = before[name].get(at)
                kept, new, returned = kept + (entry is not None), new + (entry is None), returned + (at in old[name])
                master, first, second = entry or (old[name].get(at, 0.0), 0.0, 0.0)
                assert float(values.masters[number]) == master
                assert float(values.moments["exp_avg"][number]) == first
                assert float(values.moments["exp_avg_sq"][number]) == second
                assert bool(values.kept[number]) == (entry is not None)
                assert bool(values.returned[number]) == (at in old[name])
        selected = {at for positions in wanted.get(name, {}).values() for at in positions.tolist()}
        dropped += len(set(before[name]) - selected)
        entries = found.retired[name]
        assert entries.positions.tolist() == sorted(expected_retired)
        assert entries.numbers.tolist() == [expected_retired[at] for at in sorted(expected_retired)]
    counts = found.counts
    assert (counts.kept, counts.new, counts.returned, counts.dropped) == (kept, new, returned, dropped)
    assert counts.retired == sum(len(entries) for entries in found.retired.values())
    assert min(kept, new, returned, dropped) > 0


def test_second_moments_begin_as_the_mean_of_what_was_kept():
    def entries(*seconds: float) -> LiveEntries:
        number = len(seconds)
        return LiveEntries(
            positions=torch.arange(number), masters=torch.ones(number), moments={"exp_avg_sq": torch.tensor(seconds)}
        )

    wanted: dict[str, dict[Kind, Tensor]] = {
        "a": {"row": torch.tensor([0, 1, 9]), "column": torch.tensor([2, 8])},
        "b": {"row": torch.tensor([7])},
    }
    found = plan_migration({"a": entries(1.0, 2.0, 6.0, 100.0), "b": entries(50.0)}, {}, wanted)
    # Of b nothing was kept: the mean over the whole model stands in.
    assert mean_second_moments(found) == {("a", "row"): 1.5, ("a", "column"): 6.0, ("b", "row"): 3.0}
    nothing = plan_migration({"b": entries(50.0)}, {}, {"b": {"row": torch.tensor([7])}})
    assert mean_second_moments(nothing) == {("b", "row"): 0.0}
    before_the_first_step = plan_migration({}, {}, wanted)
    assert mean_second_moments(before_the_first_step) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "selection.reselect.every is 0: it must be at least 1"),
        ({"every": 5, "until": 0}, "selection.reselect.until is 0"),
        ({"every": 5, "calibration_batches": 0}, "selection.reselect.calibration_batches is 0"),
        ({"every": 5, "captured_below": 0.0}, r"captured_below is 0.0: it must lie in \(0, 1\]"),
        ({"every": 5, "captured_below": 1.5}, "captured_below is 1.5"),
        ({"every": 5, "moments": "none"}, "moments is 'none': choose zero or mean"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        sz.ReselectConfig(**settings)


def test_settings_that_do_not_go_together_are_refused():
    every = sz.ReselectConfig(every=5, captured_below=0.5)
    rows = sz.RegionConfig(kind="row", modules=("*",), per_matrix=1)
    columns = sz.RegionConfig(kind="column", modules=("*",), per_matrix=1, score="magnitude")
    with pytest.raises(InputError, match=r"selection\.file is x and selection.reselect is set"):
        sz.SelectionConfig(file="x", reselect=every)
    with pytest.raises(InputError, match=r"several scores \(abs_of_mean, magnitude\)"):
        sz.SelectionConfig(regions=(rows, columns), reselect=every)
    assert sz.SelectionConfig(regions=(rows, columns), reselect=sz.ReselectConfig(every=5)).reselect is not None


def test_checks_come_at_their_steps_with_seeds_of_their_own():
    every = sz.ReselectConfig(every=5, until=12, calibration_batches=3)
    assert [step for step in range(20) if every.is_due(step)] == [5, 10]
    rows = sz.RegionConfig(kind="row", modules=("*",), per_matrix=1)
    config = sz.SelectionConfig(regions=(rows,), reselect=every, seed=4, calibration_weights="full")
    checks = [sz.config_at(config, step) for step in (5, 10)]
    assert len({config.seed, *(each.seed for each in checks)}) == 3
    assert [(each.calibration_batches, each.calibration_weights) for each in checks] == [(3, "frozen")] * 2
    with pytest.raises(InputError, match=r"selection\.reselect is missing"):
        sz.config_at(checks[0], 5)


def test_what_a_hooked_parameter_does_under_delta_is_what_merge_writes_in_bf16():
    """Both round W plus the number once."""
    model = sparse("delta", torch.bfloat16)
    with torch.no_grad():
        for values in sz.trainable_parameters(model).values():
            values.copy_(0.37 * torch.randn(values.shape, generator=torch.Generator().manual_seed(1)))
    acting = model.embed(torch.arange(11)).detach().clone()
    sz.merge(model)
    assert torch.equal(model.embed.weight.detach(), acting)


def test_merge_undo_needs_no_map_of_the_model():
    """A map that says another layout than names tell is followed back, too."""
    holder = nn.Module()
    holder.table = nn.Embedding(6, 4)
    told = sz.default_module_map(holder)
    turned = dataclasses.replace(told.matrices[0], layout="in_out", shape=(4, 6))
    module_map = dataclasses.replace(told, matrices=(turned,))
    base = holder.table.weight.detach().clone()
    selection = sz.Selection({"table.weight": sz.WeightSelection(shape=(4, 6), rows=[1])})
    sz.sparsify(holder, selection, module_map=module_map)
    with torch.no_grad():
        for values in sz.trainable_parameters(holder).values():
            values.fill_(9.0)
    undo = sz.merge(holder)
    assert (holder.table.weight[:, 1] == 9.0).all()
    sz.unmerge(holder, undo)
    assert torch.equal(holder.table.weight, base)


def test_a_linear_whose_forward_was_replaced_is_refused():
    model = make_model()
    vars(model.up)["forward"] = lambda x: nn.Linear.forward(model.up, x)
    with pytest.raises(InputError, match=r"up has a forward that something else has put there"):
        sz.sparsify(model, live())
    assert type(model.up) is nn.Linear
