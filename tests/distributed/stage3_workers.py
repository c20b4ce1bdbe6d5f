"""What the spawned ranks do in the tests of stage 3: write-back into shards, hooked parameters, what is kept alive."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_zero as sz
from scripts.dense_reference import adamw_on_entries
from sparse_zero.layers import sparse_parameter
from sparse_zero.layers.carriers import carriers, parameter_name
from sparse_zero.layers.sparsify import by_parameter
from sparse_zero.zero import compat
from sparse_zero.zero.config import PLACEMENTS, Placement
from sparse_zero.zero.shards import whole_values
from sparse_zero.zero.state import read_masters
from tests.distributed.workers import (
    CLIP,
    DECAY,
    GLOBAL_BATCH,
    LEARNING_RATE,
    _CountTraffic,
    count_optimizer_elements,
    make_batches,
    train,
)
from tests.sparse_zero.helpers import TinyModel, mixed_selection, owner_matrix, tiny_loss

STEPS = 5


class NormedModel(TinyModel):
    """The tiny model with experts and a norm: every kind of parameter. Its head may be the embedding."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__(tie=tie)
        self.experts = TinyExperts()
        self.norm = nn.LayerNorm(20)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            if self.checkpointing:
                x = torch.utils.checkpoint.checkpoint(layer.self_attn, x, use_reentrant=False)
            else:
                x = layer.self_attn(x)
        logits: Tensor = self.lm_head(self.norm(self.experts(x)))
        return logits


class TinyExperts(nn.Module):
    """A stack of matrices in one parameter, of which each call multiplies with two."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 20, 20) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        for number in (0, 2):
            x = x + torch.tanh(nn.functional.linear(x, self.stack[number]))
        return x


def make_model(tie: bool = False) -> NormedModel:
    torch.manual_seed(7)
    return NormedModel(tie)


def every_kind(model: nn.Module) -> sz.Selection:
    """Linears, rows and columns of the embedding (the head, where it is tied), a bias, and the norm."""
    weights = dict(mixed_selection(model).weights)
    weights["embed_tokens.weight"] = sz.WeightSelection(shape=(32, 20), rows=[1, 5, 31], columns=[3])
    weights["layers.1.self_attn.q_proj.bias"] = sz.WeightSelection(shape=(20, 1), whole=True)
    for number in (0, 1):
        weights[f"experts.stack[{number}]"] = sz.WeightSelection(
            shape=(20, 20), block_size=6, blocks=[[0, 3], [3, 3]], rows=[7], columns=[2]
        )
    weights["norm.weight"] = sz.WeightSelection(shape=(20, 1), whole=True)
    weights["norm.bias"] = sz.WeightSelection(shape=(20, 1), whole=True)
    return sz.Selection(weights)


def masks_of(model: nn.Module, selection: sz.Selection) -> dict[str, Tensor]:
    """Which entries of each parameter are trained, by plain loops."""
    found = {}
    for name, chosen in by_parameter(selection).items():
        mask = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
        for number, regions in chosen.items():
            owned = torch.ones(len(mask), dtype=torch.bool) if regions.whole else owner_matrix(regions) > 0
            (mask if number is None else mask[number]).copy_(owned)
        found[name] = mask
    return found


def global_batch() -> int:
    """Samples per step: as many as every rank gets equally in two micro-batches."""
    return GLOBAL_BATCH // (2 * dist.get_world_size()) * 2 * dist.get_world_size()


def reference(placement: Placement, tie: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Plain AdamW on the dense model; no code of ours."""
    model = make_model(tie)
    return adamw_on_entries(
        model,
        masks_of(model, every_kind(model)),
        tiny_loss,
        make_batches(STEPS)[:, : global_batch()],
        placement,
        learning_rate=LEARNING_RATE,
        decay=DECAY,
        clip=CLIP,
    )


def make_engine(
    model: nn.Module,
    micro_batch: int,
    accumulation: int,
    *,
    decay: float = DECAY,
    rate: float = LEARNING_RATE,
    clip: float = CLIP,
    **section: Any,
) -> Any:
    """A stage-3 engine; ``section``: more of zero_optimization."""
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, **section},
        "steps_per_print": 10**9,
    }
    engine, *_ = sz.initialize(
        model=model,
        config=config,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=rate, weight_decay=decay),
    )
    return engine


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, whole; those of the plain model by its names."""
    found = {}
    for name, parameter in model.named_parameters():
        with compat.whole(parameter):
            found[name] = parameter.detach().clone()
    return found


def from_masters(engine: Any, tie: bool) -> dict[str, Tensor]:
    """The dense weights that the masters stand for."""
    model = engine.module
    base = {name: p.detach() for name, p in make_model(tie).named_parameters()}
    masters = read_masters(engine)
    found = {}
    for name, carrier in carriers(model):
        parameter = parameter_name(name, carrier)
        dense = base[parameter].clone()
        for kind in carrier.values():
            at, numbers = carrier.positions(kind), masters[f"{name}.values_{kind}"]
            dense.view(-1)[at] = numbers + (dense.view(-1)[at] if carrier.placement == "delta" else 0.0)
        found[parameter] = dense
    return found


def against_dense(tie: bool, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Both placements with and without accumulation and gradient checkpointing."""
    world_size = dist.get_world_size()
    report = []
    for placement in PLACEMENTS:
        expected_losses, expected = reference(placement, tie)
        for accumulation, checkpointing in ((1, False), (2, True)):
            model = make_model(tie)
            model.checkpointing = checkpointing
            selection = every_kind(model)
            sz.sparsify(model, selection, placement)
            micro_batch = global_batch() // (world_size * accumulation)
            engine = make_engine(model, micro_batch, accumulation, **settings)
            losses = train(engine, make_batches(STEPS), micro_batch, accumulation)
            stands = gathered(model)
            masters = from_masters(engine, tie)
            weights = masters if placement == "delta" else stands
            entry = {
                "case": [world_size, placement, accumulation, checkpointing, tie],
                "loss_difference": max(abs(a - b) / abs(b) for a, b in zip(losses, expected_losses, strict=True)),
                "effect": abs(
                    expected_losses[-1] - tiny_loss(make_model(tie), make_batches(STEPS)[-1, : global_batch()]).item()
                ),
                "weight_difference": max(float((weights[name] - expected[name]).abs().max()) for name in masters),
                "written": all(
                    torch.equal(
                        stands[name],
                        masters[name] if placement == "inplace" else dict(make_model(tie).named_parameters())[name],
                    )
                    for name in masters
                ),
                "untouched": all(
                    torch.equal(stands[name], p)
                    for name, p in make_model(tie).named_parameters()
                    if name not in masters
                ),
                "secondary": any(len(compat.own_shards(p)) == 2 for p in model.parameters() if not p.requires_grad),
                "optimizer_elements": count_optimizer_elements(engine),
                "num_parameters": selection.num_parameters,
                "num_values": len(sz.trainable_parameters(model)),
                "sharded": sum(compat.is_sharded(p) and not compat.is_persistent(p) for p in model.parameters()),
            }
            report.append(entry)
            engine.destroy()
    return report


def ways_to_read(names: list[str]) -> list[dict[str, Any]]:
    """Models that read parameters in every way, against AdamW on the dense model."""
    from tests.sparse_zero.test_sparse_parameter import VOCABULARY, loss_of, make

    report = []
    tokens = torch.randint(0, VOCABULARY, (STEPS, 4, 5), generator=torch.Generator().manual_seed(1))
    size = 4 // dist.get_world_size()
    for name in names:
        for placement in PLACEMENTS:
            dense, selection = make(name)
            expected, _ = adamw_on_entries(
                dense, masks_of(dense, selection), loss_of, tokens, placement, learning_rate=0.1, decay=0.0, clip=None
            )
            model, _ = make(name)
            before = loss_of(model, tokens[-1]).item()
            sz.sparsify(model, selection, placement)
            engine = make_engine(model, size, 1, decay=0.0, rate=0.1, clip=0.0, stage3_param_persistence_threshold=0)
            losses = train(engine, tokens, size, 1, loss_of)
            report.append(
                {
                    "case": [name, placement],
                    "difference": max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)),
                    "effect": abs(expected[-1] - before) / before,
                }
            )
            engine.destroy()
    return report


class _Alive(TorchDispatchMode):
    """The new storages of some sizes that are still alive."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.made = sizes, 0
        self._found: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes() in self.sizes:
                storage = leaf.untyped_storage()
                self.made += storage._cdata not in self._found
                self._found[storage._cdata] = StorageWeakRef(storage)
        return result

    @property
    def number(self) -> int:
        return sum(not reference.expired() for reference in self._found.values())


def kept_between_forward_and_backward() -> list[dict[str, Any]]:
    """Whole copies of hooked parameters that live when forward has ended, with notes and without."""
    report = []
    size = global_batch() // dist.get_world_size()
    own = vars(sparse_parameter)["saved_as_notes"]
    for placement in PLACEMENTS:
        for with_notes in (True, False):
            model = make_model(tie=True)
            large = {model.embed_tokens.weight.nbytes, model.experts.stack.nbytes}
            sz.sparsify(model, every_kind(model), placement)
            engine = make_engine(model, size, 1, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0)
            tokens = make_batches(STEPS)[0, dist.get_rank() * size :][:size]
            vars(sparse_parameter)["saved_as_notes"] = own if with_notes else lambda *_: nullcontext()
            train(engine, make_batches(2), size, 1)
            with _Alive(large) as alive:
                loss = tiny_loss(engine, tokens)
                number = alive.number
            engine.backward(loss)
            engine.step()
            vars(sparse_parameter)["saved_as_notes"] = own
            report.append({"case": [placement, with_notes], "made": alive.made, "alive": number})
            engine.destroy()
    return report


class _Frozen(nn.Module):
    """A linear that is trained in part, one that is frozen, and one of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.frozen, self.own = nn.Linear(20, 24), nn.Linear(24, 28), _Own(28, 20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.own(self.frozen(self.q_proj(x)))
        return y


class _Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def kept_by_frozen_linears() -> dict[str, Any]:
    """Widths of the activations that backward keeps, what was computed, and of which class the modules are."""
    torch.manual_seed(3)
    model = _Frozen()
    x = torch.randn(5, 20)
    expected = model(x)
    sz.sparsify(model, sz.Selection({"q_proj.weight": sz.WeightSelection(shape=(24, 20), rows=[1, 4])}))
    engine = make_engine(model, 1, 1)
    kept: list[int] = []

    def note(saved: Tensor) -> Tensor:
        if saved.dim() == 2 and len(saved) == 5:
            kept.append(saved.shape[1])
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        found = engine(x)
    engine.backward(found.sum())
    while_training = type(engine.module.frozen).__name__
    same = bool(torch.allclose(found, expected, atol=1e-6))
    plain = compat.detach_engine(engine)
    names = [while_training, type(plain.frozen).__name__, type(plain.own).__name__]
    return {"kept": kept, "same": same, "names": names}


def written_into_shards() -> dict[str, Any]:
    """What a write-back by hand moves, changes and gathers."""
    size = global_batch() // dist.get_world_size()
    model = make_model()
    selection = every_kind(model)
    sz.sparsify(model, selection)
    engine = make_engine(model, size, 1, stage3_param_persistence_threshold=0)
    train(engine, make_batches(2), size, 1)
    weights: dict[str, Any] = {name: p for name, p in model.named_parameters() if "values_" not in name}
    before = gathered(model)
    compat.release_gathered(engine)
    places = {name: p.ds_tensor.data_ptr() for name, p in weights.items()}
    # What stands there is spoiled in the shards alone.
    for _, carrier in carriers(model):
        for kind, numbers in carrier.originals.items():
            carrier.set_entries(kind, numbers)
    spoiled = gathered(model)
    compat.release_gathered(engine)
    with _CountTraffic() as traffic:
        sz.write_back(model)
    available = [name for name, p in weights.items() if compat.is_available(p)]
    moved = [name for name, p in weights.items() if p.ds_tensor.data_ptr() != places[name]]
    after = gathered(model)
    compat.release_gathered(engine)
    values = list(sz.trainable_parameters(model).values())
    numels = [compat.full_numel(each) for each in values]
    at_once = [each.clone() for each in whole_values(values)]
    with _CountTraffic() as buckets:
        bucketed = [each.clone() for each in whole_values(values, limit=50)]
    index_bytes = torch.tensor(sum(i.num_bytes for _, c in carriers(model) for i in c._shard_indices.values()))
    dist.all_reduce(index_bytes)
    found = {
        "spoiled": sum(not torch.equal(spoiled[name], before[name]) for name in weights),
        "restored": all(torch.equal(after[name], before[name]) for name in weights),
        "available": available,
        "moved": moved,
        "calls": traffic.calls,
        "bytes": traffic.bytes,
        "value_bytes": 4 * selection.num_parameters,
        "padding_bytes": 4 * dist.get_world_size() * len(values),
        "dense_bytes": sum(4 * p.ds_numel for p in weights.values()),
        "buckets": buckets.calls,
        "fewest_buckets": sum(1 for numel in numels if numel > 25),
        "same": all(torch.equal(one, other) for one, other in zip(at_once, bucketed, strict=True)),
        "index_bytes": int(index_bytes),
    }
    engine.destroy()
    return found


def stage2_engine(model: nn.Module, size: int, selection: sz.Selection) -> Any:
    from tests.distributed.workers import make_engine as engine_at

    sz.sparsify(model, selection)
    return engine_at(model, 2, size, 1)


def there_and_back(folder: str) -> dict[str, Any]:
    """A checkpoint from stage 2 to stage 3 and back; then an adapter, merge, unmerge, and training on in the shards."""
    size = global_batch() // dist.get_world_size()
    batches = make_batches(3 * STEPS)
    selection = every_kind(make_model())
    path = Path(folder)

    def stage3() -> Any:
        model = make_model()
        sz.sparsify(model, selection)
        return make_engine(model, size, 1)

    engine = stage2_engine(make_model(), size, selection)
    expected = train(engine, batches, size, 1)
    engine.destroy()
    engine = stage2_engine(make_model(), size, selection)
    losses = train(engine, batches[:STEPS], size, 1)
    sz.save_checkpoint(engine, path / "second")
    engine.destroy()
    engine = stage3()
    # Also over values that have been gathered and trained meanwhile.
    train(engine, batches[:1], size, 1)
    sz.load_checkpoint(engine, path / "second")
    losses += train(engine, batches[STEPS : 2 * STEPS], size, 1)
    sz.save_checkpoint(engine, path / "third")
    sz.save_adapter(engine, path / "adapter")
    # Of the model alone, whose values lie in shards.
    sz.save_adapter(engine.module, path / "of_model")
    stands = gathered(engine.module)
    engine.eval()
    with torch.no_grad():
        outputs = engine(batches[0])
    engine.destroy()
    engine = stage2_engine(make_model(), size, selection)
    sz.load_checkpoint(engine, path / "third")
    losses += train(engine, batches[2 * STEPS :], size, 1)
    engine.destroy()
    loaded = make_model()
    sz.load_adapter(loaded, path / "adapter")
    with torch.no_grad():
        difference = float((loaded(batches[0]) - outputs).abs().max())
    stored = [load_file(path / name / "adapter_model.safetensors") for name in ("adapter", "of_model")]
    equal = stored[0].keys() == stored[1].keys() and all(
        torch.equal(stored[0][name], stored[1][name]) for name in stored[0]
    )
    found = {"losses": losses, "expected": expected, "adapter_difference": difference, "adapters_equal": equal}

    plain = dict(make_model().named_parameters())
    for placement in PLACEMENTS:
        model = make_model()
        sz.sparsify(model, selection, placement)
        engine = make_engine(model, size, 1)
        first = train(engine, batches[:STEPS], size, 1)
        masters = from_masters(engine, tie=False)
        undo = sz.merge(model)
        merged = gathered(model)
        sz.unmerge(model, undo)
        restored = gathered(model)
        # The model is plain and in shards: it is made sparse there, and trains as it did at first.
        compat.detach_engine(engine)
        sharded = all(compat.is_sharded(p) for p in model.parameters())
        sz.sparsify(model, selection, placement)
        originals = all(
            torch.equal(numbers, plain[parameter_name(name, carrier)].detach().view(-1)[carrier.positions(kind)])
            for name, carrier in carriers(model)
            for kind, numbers in carrier.originals.items()
        )
        engine = make_engine(model, size, 1)
        again = train(engine, batches[:STEPS], size, 1)
        engine.destroy()
        found[placement] = {
            "merged": all(torch.equal(merged[name], masters.get(name, p)) for name, p in plain.items()),
            "names": merged.keys() == plain.keys(),
            "restored": all(torch.equal(restored[name], p) for name, p in plain.items()),
            "sharded": sharded,
            "originals": originals,
            "same_losses": first == again,
        }
    found["written"] = all(torch.equal(stands[name], p) for name, p in loaded.named_parameters() if name in stands)
    return found
