"""What the spawned ranks do in the tests of re-selection."""

import gc
import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparse_zero as sz
from sparse_zero.collectives import PeerError
from sparse_zero.layers.entries import gather_positions
from sparse_zero.layers.sparsify import retired_of, selection_of
from sparse_zero.zero.config import PLACEMENTS, Placement
from sparse_zero.zero.state import read_training_state
from tests.distributed.workers import (
    CLIP,
    DECAY,
    GLOBAL_BATCH,
    LEARNING_RATE,
    make_batches,
    make_engine,
    make_model,
    sparse_engine,
    train_whole,
)
from tests.sparse_zero.helpers import owner_matrix, tiny_loss

BETAS, EPSILON = (0.9, 0.999), 1e-8
STEPS = 3
PLACES: tuple[tuple[int, Placement], ...] = (
    (0, "inplace"), (0, "delta"), (1, "inplace"), (1, "delta"), (2, "inplace"), (2, "delta"), (3, "inplace"), (3, "delta"),
)  # fmt: skip
# Every stage, each with one placement.
SOME_PLACES: tuple[tuple[int, Placement], ...] = ((0, "inplace"), (1, "delta"), (2, "inplace"), (3, "delta"))
# Names of the kinds as owner_matrix numbers them.
KIND_NUMBERS = {"block": 1, "row": 2, "column": 3, "whole": 4}


def selections() -> list[sz.Selection]:
    """Three selections that share entries under other kinds; entries of the first come back in the third.

    Parameters without a layer of their own take part: an embedding, a bias.
    """
    q, k = "layers.1.self_attn.q_proj.weight", "layers.2.self_attn.k_proj.weight"
    v, o = "layers.1.self_attn.v_proj.weight", "layers.0.self_attn.o_proj.weight"

    def weight(shape: tuple[int, int], blocks: Any = (), rows: Any = (), columns: Any = ()) -> sz.WeightSelection:
        return sz.WeightSelection(shape=shape, block_size=6, blocks=blocks, rows=rows, columns=columns)

    found: list[dict[str, sz.WeightSelection]] = [
        {q: weight((20, 20), [[0, 0], [3, 3]], [4], [7]), k: weight((10, 20), rows=[1, 2])},
        {
            q: weight((20, 20), [[0, 1]], [2, 19], [7]),
            v: weight((10, 20), columns=[0, 5]),
            k: weight((10, 20), rows=[2]),
        },
        {q: weight((20, 20), [[3, 3], [0, 1]], [3], [0]), v: weight((10, 20), [[0, 0]]), o: weight((20, 10), rows=[3])},
    ]
    rows = ([1, 5], [5, 9], [1, 9])
    for number, chosen in enumerate(found):
        chosen["embed_tokens.weight"] = weight((32, 20), rows=rows[number])
    found[0]["layers.1.self_attn.q_proj.bias"] = sz.WeightSelection(shape=(20, 1), whole=True)
    found[2]["layers.1.self_attn.q_proj.bias"] = sz.WeightSelection(shape=(20, 1), whole=True)
    return [sz.Selection(chosen) for chosen in found]


def kinds_of(selection: sz.Selection, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Number of the kind that owns each entry of every parameter, 0 for nobody."""
    found = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    for name, weight in selection.weights.items():
        whole = torch.full(shapes[name], KIND_NUMBERS["whole"])
        found[name] = whole if weight.whole else owner_matrix(weight)
    return found


class DenseReference:
    """AdamW on the dense model with a moment per entry, a changing mask and one step counter; no code of ours."""

    def __init__(self, placement: Placement, moments: str) -> None:
        self.model = make_model()
        self.parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        self.moments, self.step = moments, 0
        self.base = {
            name: p.clone() if placement == "delta" else torch.zeros_like(p) for name, p in self.parameters.items()
        }
        # What AdamW works on: the weights themselves (inplace), or what is added to the base (delta).
        self.numbers = {name: p - self.base[name] for name, p in self.parameters.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.kinds: dict[str, Tensor] = {}

    def select(self, selection: sz.Selection) -> None:
        kinds = kinds_of(selection, {name: p.shape for name, p in self.parameters.items()})
        kept_everywhere = {
            name: (self.kinds.get(name, torch.zeros(())) > 0) & (kind > 0) for name, kind in kinds.items()
        }
        kept_seconds = torch.cat([self.second[name][kept] for name, kept in kept_everywhere.items()])
        for name, kind in kinds.items():
            kept = kept_everywhere[name]
            self.first[name][~kept] = 0.0
            self.second[name][~kept] = 0.0
            for number in KIND_NUMBERS.values():
                if self.moments == "mean" and self.step:
                    of_kind = self.second[name][kept & (kind == number)]
                    self.second[name][~kept & (kind == number)] = (of_kind if len(of_kind) else kept_seconds).mean()
        self.kinds = kinds

    def train(self, batches: Tensor) -> list[float]:
        losses = []
        for tokens in batches:
            self.model.zero_grad()
            loss = tiny_loss(self.model, tokens)
            loss.backward()
            losses.append(loss.item())
            self.step += 1
            masks = {name: kind > 0 for name, kind in self.kinds.items()}
            gradients = {name: p.grad for name, p in self.model.named_parameters()}
            norm = torch.cat([gradients[name][mask] for name, mask in masks.items()]).norm()
            scale = min(1.0, CLIP / (float(norm) + 1e-6))
            with torch.no_grad():
                for name, mask in masks.items():
                    gradient = gradients[name][mask] * scale
                    first = self.first[name][mask] * BETAS[0] + gradient * (1 - BETAS[0])
                    second = self.second[name][mask] * BETAS[1] + gradient**2 * (1 - BETAS[1])
                    self.first[name][mask], self.second[name][mask] = first, second
                    update = first / (1 - BETAS[0] ** self.step)
                    update = update / ((second / (1 - BETAS[1] ** self.step)).sqrt() + EPSILON)
                    decayed = self.numbers[name][mask] * (1 - LEARNING_RATE * DECAY)
                    self.numbers[name][mask] = decayed - LEARNING_RATE * update
                    self.parameters[name].copy_(self.base[name] + self.numbers[name])
        return losses


def rebuild(stage: int, decay: float = DECAY, bf16: bool = False) -> Callable[[nn.Module], Any]:
    """What users hand to migrate and reselect."""
    return lambda model: make_engine(model, stage, GLOBAL_BATCH // dist.get_world_size(), 1, decay, bf16)


def dense_state(engine: Any) -> dict[str, Tensor]:
    """Masters and moments of all values, scattered over dense tensors: zero where nothing is trained."""
    state = read_training_state(engine)
    found = {}
    for key, numbers in {"master": state.masters, **state.moments}.items():
        for weight, chosen in selection_of(engine.module).weights.items():
            module, _, attribute = weight.rpartition(".")
            dense = torch.zeros(chosen.shape)
            for kind in chosen.kinds():
                hooked = f"{module}.sparse_{attribute}.values_{kind}"
                values = numbers[hooked if hooked in numbers else f"{module}.values_{kind}"]
                dense.view(-1)[chosen.flat_indices(kind)] = values
            found[f"{weight}/{key}"] = dense
    return found


def hooks(model: nn.Module) -> int:
    """Forward hooks in the whole model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def migrations(moments: str) -> list[dict[str, Any]]:
    """Three selections in turn at every place, against the dense reference."""
    report = []
    batches = make_batches(3 * STEPS)
    for stage, placement in PLACES:
        chosen = selections()
        reference = DenseReference(placement, moments)
        engine = sparse_engine(stage, placement, selection=chosen[0])
        losses, expected, counts = [], [], []
        kept_bitwise, freed = True, True
        for number, selection in enumerate(chosen):
            if number:
                before = dense_state(engine)
                ended = weakref.ref(engine), weakref.ref(engine.optimizer)
                layers = [weakref.ref(m) for m in engine.module.modules() if isinstance(m, sz.SparseLinear)]
                engine, entries = sz.migrate(engine, selection, rebuild(stage), moments=moments)  # type: ignore[arg-type]
                gc.collect()
                freed = freed and all(reference() is None for reference in (*ended, *layers))
                after = dense_state(engine)
                shapes = {name: p.shape for name, p in make_model().named_parameters()}
                old, new = (kinds_of(each, shapes) for each in chosen[number - 1 : number + 1])
                for key in after:
                    name = key.partition("/")[0]
                    both = ((old[name] > 0) & (new[name] > 0)).reshape(after[key].shape)
                    kept_bitwise &= not both.any() or torch.equal(after[key][both], before[key][both])
                counts.append([entries.kept, entries.new, entries.returned, entries.dropped, entries.retired])
            reference.select(selection)
            part = batches[number * STEPS : (number + 1) * STEPS]
            losses += train_whole(engine, part)
            expected += reference.train(part)
        numbers = dense_state(engine)
        report.append(
            {
                "place": [stage, placement],
                "losses": losses,
                "expected": expected,
                "weight_difference": max(
                    float((numbers[f"{name}/master"].reshape(p.shape) - p)[reference.kinds[name] > 0].abs().max())
                    for name, p in reference.numbers.items()
                    if f"{name}/master" in numbers
                ),
                "kept_bitwise": kept_bitwise,
                "freed": freed,
                "counts": counts,
                "num_retired": sz.num_retired(engine.module),
                "hooks": hooks(engine.module),
                "hooks_of_a_new_engine": _hooks_of_new(engine, stage, placement, chosen[2]),
            }
        )
    return report


def _hooks_of_new(engine: Any, stage: int, placement: Placement, selection: sz.Selection) -> int:
    """Hooks on a model whose first engine was made just now, with as many carriers."""
    retired = retired_of(engine.module)
    engine.destroy()
    model = make_model()
    sz.sparsify(model, selection, placement, retired=retired)
    fresh = rebuild(stage)(model)
    number = hooks(model)
    fresh.destroy()
    return number


def migrations_in_bf16() -> list[dict[str, Any]]:
    """Masters, moments and weights around a migration whose weights are narrower than the masters."""
    report = []
    for stage, placement in (*SOME_PLACES[2:], PLACES[6]):
        chosen = selections()[:2]
        engine = sparse_engine(stage, placement, selection=chosen[0], bf16=True)
        train_whole(engine, make_batches(STEPS))
        before = dense_state(engine)
        engine, _ = sz.migrate(engine, chosen[1], rebuild(stage, bf16=True))
        after, retired = dense_state(engine), retired_of(engine.module).entries
        shapes = {name: p.shape for name, p in make_model().named_parameters()}
        parameters = dict(engine.module.named_parameters())
        old, new = (kinds_of(each, shapes) for each in chosen)
        kept_bitwise = retired_bitwise = written = True
        for key, dense in after.items():
            both = (old[key.partition("/")[0]] > 0) & (new[key.partition("/")[0]] > 0)
            if both.any():
                kept_bitwise &= torch.equal(dense[both], before[key][both])
        for name, entries in retired.items():
            numbers = before[f"{name}/master"].view(-1)[entries.positions]
            retired_bitwise &= torch.equal(entries.numbers, numbers)
            if placement == "inplace":
                stands = gather_positions(parameters[name], entries.positions)
                written &= torch.equal(stands, numbers.bfloat16())
        report.append(
            {
                "place": [stage, placement],
                "kept_bitwise": bool(kept_bitwise),
                "retired_bitwise": bool(retired_bitwise),
                "written": bool(written),
                "masters_are_wide": any(bool((m != m.bfloat16()).any()) for m in before.values()),
                "step": read_training_state(engine).step,
                "finite": all(map(math.isfinite, train_whole(engine, make_batches(1)))),
            }
        )
        engine.destroy()
    return report


def from_checkpoint(folder: Path, stage: int, placement: Any, decay: float) -> Any:
    """An engine that continues from a checkpoint."""
    stored = sz.read_checkpoint(folder)
    model = make_model()
    sz.sparsify(model, stored.selection, placement, retired=stored.retired)
    engine = rebuild(stage, decay)(model)
    sz.load_checkpoint(engine, folder)
    return engine


def checkpoints(folder: str, decay: float) -> list[dict[str, Any]]:
    """Train, migrate, train, save, train on; an engine made from the checkpoint trains the same steps.

    Without decay, an engine at another stage with the other placement does so, too.
    """
    report = []
    batches = make_batches(3 * STEPS)
    elsewhere = {0: (3, "delta"), 1: (2, "inplace"), 2: (1, "delta"), 3: (0, "inplace")}
    for stage, placement in SOME_PLACES:
        chosen = selections()
        engine = sparse_engine(stage, placement, decay, chosen[0])
        train_whole(engine, batches[:STEPS])
        engine, _ = sz.migrate(engine, chosen[1], rebuild(stage, decay))
        train_whole(engine, batches[STEPS : 2 * STEPS])
        path, adapter = Path(folder) / f"stage{stage}", Path(folder) / f"adapter{stage}"
        sz.save_checkpoint(engine, path)
        sz.save_adapter(engine, adapter)
        engine.eval()
        with torch.no_grad():
            trained = engine(batches[0]).clone()
        engine.train()
        entry: dict[str, Any] = {"stage": stage, "num_retired": sz.num_retired(engine.module)}

        def go_on(engine: Any, stage: int, chosen: sz.Selection) -> list[float]:
            losses = train_whole(engine, batches[2 * STEPS :])
            engine, _ = sz.migrate(engine, chosen, rebuild(stage, decay))
            losses += train_whole(engine, batches[:STEPS])
            engine.destroy()
            return losses

        entry["uninterrupted"] = go_on(engine, stage, chosen[2])
        entry["resumed"] = go_on(from_checkpoint(path, stage, placement, decay), stage, chosen[2])
        if decay == 0.0:
            other = elsewhere[stage]
            entry["elsewhere"] = go_on(from_checkpoint(path, *other, decay), other[0], chosen[2])
        engine = sparse_engine(stage, placement, decay, sz.read_checkpoint(path).selection)
        try:
            sz.load_checkpoint(engine, path)
        except (sz.InputError, PeerError) as error:
            entry["forgotten"] = str(error)
        engine.destroy()
        for loaded in PLACEMENTS:
            model = make_model()
            sz.load_adapter(model, adapter, placement=loaded)
            with torch.no_grad():
                entry[f"{loaded}_difference"] = float((model(batches[0]) - trained).abs().max())
        report.append(entry)
    return report


def scoring_config(score: str, captured_below: float | None = None) -> sz.SelectionConfig:
    """Blocks and rows that compete, columns by number."""
    regions = (
        sz.RegionConfig(kind="block", modules=("*.{q,k,v}_proj",), block_size=5),
        sz.RegionConfig(kind="row", modules=("*.o_proj",)),
        sz.RegionConfig(kind="column", modules=("*.{k,v}_proj",), per_matrix=1),
        # Of a parameter that no layer can be swapped for.
        sz.RegionConfig(kind="row", modules=("embed_tokens",), per_matrix=3),
    )
    return sz.SelectionConfig(
        regions=regions,
        score=score,
        budget=sz.BudgetConfig(fraction=0.2),
        reselect=sz.ReselectConfig(every=STEPS, captured_below=captured_below, moments="zero"),
    )


def calibration(step: int) -> list[Tensor]:
    """Micro-batches of token ids, others for every step."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randint(0, 32, (2, 9), generator=generator) for _ in range(3)]


def reselections(scores: list[str], stages: list[int]) -> list[dict[str, Any]]:
    """Two checks during training by each score."""
    return [entry for score in scores for entry in _reselections(score, stages)]


def _reselections(score: str, stages: list[int]) -> list[dict[str, Any]]:
    """The reference selects by plain ``select`` on its dense weights."""
    config, batches = scoring_config(score), make_batches(3 * STEPS)
    report = []
    references: dict[str, Any] = {}
    for placement in PLACEMENTS:
        reference = DenseReference(placement, "zero")
        chosen, expected, digests = sz.select(make_model(), calibration(0), config, tiny_loss), [], []
        for number in range(3):
            if number:
                now = sz.config_at(config, number * STEPS)
                chosen = sz.select(reference.model, calibration(number), now, tiny_loss)
            reference.select(chosen)
            digests.append(chosen.digest())
            expected += reference.train(batches[number * STEPS : (number + 1) * STEPS])
        references[placement] = {"expected": expected, "expected_digests": digests}
    for stage, placement in [place for place in (*SOME_PLACES, PLACES[6]) if place[0] in stages]:
        selection = sz.select(make_model(), calibration(0), config, tiny_loss)
        engine = sparse_engine(stage, placement, selection=selection)
        losses, checks, digests = [], [], []
        for number in range(3):
            if number:
                engine, found = sz.reselect(
                    engine, calibration(number), config, make_engine=rebuild(stage), loss_fn=tiny_loss
                )
                entries = found.entries
                checks.append([found.step, found.changed, found.captured_before, found.captured_after, entries.new])
            digests.append(selection_of(engine.module).digest())
            losses += train_whole(engine, batches[number * STEPS : (number + 1) * STEPS])
        metadata = selection_of(engine.module).metadata
        report.append(
            {
                "place": [score, stage, placement],
                "losses": losses,
                "digests": digests,
                "checks": checks,
                "config_is_kept": metadata["config"] == selection.metadata["config"],
                "num_parameters_model": [
                    metadata["num_parameters_model"],
                    sum(p.numel() for p in make_model().parameters()),
                ],
                **references[placement],
            }
        )
        engine.destroy()
    return report


def _refused(engine: Any, stage: int) -> dict[str, str]:
    """What cannot be migrated to, by name."""
    cases = {
        "empty": sz.Selection({}),
        "another model": sz.Selection({"elsewhere.weight": sz.WeightSelection(shape=(2, 2), rows=[1])}),
        "one rank only": selections()[dist.get_rank()],
    }
    found = {}
    for name, selection in cases.items():
        try:
            sz.migrate(engine, selection, rebuild(stage))
        except (sz.InputError, RuntimeError) as error:
            found[name] = str(error)
    return found


def checks_that_change_nothing() -> list[dict[str, Any]]:
    """Training with a check whose share is captured anyway, against training without; and errors."""
    report = []
    config, batches = scoring_config("mean_of_abs", captured_below=1e-6), make_batches(2 * STEPS)
    for stage, placement in SOME_PLACES:
        losses = {}
        for checked in (False, True):
            engine = sparse_engine(
                stage, placement, selection=sz.select(make_model(), calibration(0), config, tiny_loss)
            )
            losses[checked] = train_whole(engine, batches[:STEPS])
            if checked:
                before = engine
                engine, found = sz.reselect(
                    engine, calibration(1), config, make_engine=rebuild(stage), loss_fn=tiny_loss, step=7
                )
                same, entries = engine is before and not found.changed, found.entries
                errors = _refused(engine, stage)
            losses[checked] += train_whole(engine, batches[STEPS:])
            engine.destroy()
        report.append(
            {
                "place": [stage, placement],
                "losses": losses[True],
                "expected": losses[False],
                "same_engine": same,
                "step": found.step,
                "entries": [entries.new, entries.dropped, entries.retired],
                "errors": errors,
            }
        )
    return report


def checks_that_cannot_be_made() -> list[dict[str, Any]]:
    """A check whose data are useless on one rank, then training on."""
    config = scoring_config("mean_of_abs")
    selection = sz.select(make_model(), calibration(0), config, tiny_loss)
    batches = make_batches(2)

    def spoiled(model: nn.Module, batch: Tensor) -> Tensor:
        return tiny_loss(model, batch) * (float("nan") if dist.get_rank() == 1 else 1.0)

    engine = sparse_engine(2, "inplace", selection=selection)
    losses = train_whole(engine, batches)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        after, found = sz.reselect(
            engine, calibration(1), config, make_engine=rebuild(2), loss_fn=spoiled, step=len(batches)
        )
    same = after is engine and not found.changed
    losses += train_whole(engine, batches)
    engine.destroy()
    return [
        {
            "same": same,
            "problem": found.problem,
            "said": [str(each.message) for each in said if issubclass(each.category, UserWarning)],
            "losses": losses,
        }
    ]
