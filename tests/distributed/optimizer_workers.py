"""What the spawned ranks do in the tests of optimizers, their states and rounding."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparse_zero as sz
from sparse_zero.checkpoint.folders import file_sha256
from sparse_zero.collectives import PeerError
from sparse_zero.layers.carriers import carriers, values_name
from sparse_zero.layers.retired import find_positions
from sparse_zero.reselection.migration import live_entries
from sparse_zero.zero import compat
from sparse_zero.zero.config import Placement, Rounding
from sparse_zero.zero.engine import step_was_applied
from sparse_zero.zero.optimizer_state import LOSS_SCALE, algorithm, optimizer_step_count, read_loss_scale
from sparse_zero.zero.optimizers import (
    KindOptimizerConfig,
    ModuleOptimizerConfig,
    OptimizerConfig,
    OptimizerName,
    PerKindConfig,
    build_optimizer,
    configured_groups,
)
from sparse_zero.zero.rounding import key_of, round_stochastic
from sparse_zero.zero.shards import read_entries, whole_values
from sparse_zero.zero.state import read_masters, read_training_state
from tests.distributed.workers import GLOBAL_BATCH, full_weights, make_batches, make_model, train_whole
from tests.sparse_zero.helpers import TinyModel, mixed_selection, owner_matrix, tiny_loss

CLIP = 0.5
KINDS = {1: "block", 2: "row", 3: "column"}
PER_KIND = PerKindConfig(
    row=KindOptimizerConfig(learning_rate_factor=0.5),
    column=KindOptimizerConfig(learning_rate=4e-3, weight_decay=0.0),
)
# One decay of a kind is left as it is.
PER_MODULE = (
    ModuleOptimizerConfig(modules=("layers.2.self_attn.{q,v}_proj",), learning_rate_factor=0.25),
    ModuleOptimizerConfig(modules=("layers.2",), weight_decay=0.3),
)
RATES: dict[str, float] = {"lion": 1e-3, "adafactor": 3e-2}
# Stage and placement of each engine, and where its checkpoint is continued.
PLACES: tuple[tuple[int, Placement], ...] = ((0, "inplace"), (1, "delta"), (2, "inplace"), (3, "delta"))
ELSEWHERE = {0: 2, 1: 3, 2: 0, 3: 1}


def config_of(name: OptimizerName) -> OptimizerConfig:
    """Settings with a decay, and of some kinds and modules their own."""
    return OptimizerConfig(
        name=name,
        learning_rate=RATES.get(name, 1e-2),
        betas=(0.9, 0.99),
        weight_decay=0.1,
        per_kind=PER_KIND,
        per_module=PER_MODULE,
    )


def settings_of(weight: str, kind: str, config: OptimizerConfig) -> tuple[float, float]:
    """Learning rate and decay of a weight's values of one kind, by hand."""
    rate, decay = {
        "block": (config.learning_rate, 0.1),
        "row": (config.learning_rate * 0.5, 0.1),
        "column": (4e-3, 0.0),
    }[kind]
    if weight in ("layers.2.self_attn.q_proj.weight", "layers.2.self_attn.v_proj.weight"):
        return config.learning_rate * 0.25, decay
    return (rate, 0.3) if weight.startswith("layers.2.") else (rate, decay)


def make_engine(
    model: nn.Module,
    stage: int,
    config: OptimizerConfig,
    *,
    bf16: bool = False,
    rounding: Rounding = "nearest",
    offloaded: bool = False,
) -> Any:
    """A real engine whose micro-batch fills the global batch."""
    engine, *_ = sz.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
            "gradient_clipping": CLIP,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offloaded else {})},
            "bf16": {"enabled": bf16},
            "steps_per_print": 10**9,
        },
        optimizer=lambda groups: build_optimizer(groups, config, model=model, offloaded=offloaded),
        rounding=rounding,
        rounding_seed=5,
    )
    return engine


def sparse_engine(
    stage: int, placement: Placement, config: OptimizerConfig, *, bf16: bool = False, **settings: Any
) -> Any:
    """An engine over the tiny model."""
    model = make_model(bf16)
    sz.sparsify(model, mixed_selection(model), placement)
    return make_engine(model, stage, config, bf16=bf16, **settings)


# --- references, on plain tensors ------------------------------------------------------------------------------


def lion_reference(values: list[nn.Parameter], rate: float, decay: float) -> Callable[[], None]:
    """Chen et al., arXiv 2302.06675, algorithm 2."""
    momenta = [torch.zeros_like(each) for each in values]

    def step() -> None:
        for each, momentum in zip(values, momenta, strict=True):
            direction = (0.9 * momentum + 0.1 * each.grad).sign()
            each.sub_(rate * (direction + decay * each))
            momentum.copy_(0.99 * momentum + 0.01 * each.grad)

    return step


def muon_reference(blocks: list[list[nn.Parameter]], rate: float, decay: float) -> Callable[[], None]:
    """One block at a time, by the published iteration in fp32."""
    momenta = [[torch.zeros_like(block) for block in each] for each in blocks]

    def step() -> None:
        for each, buffers in zip(blocks, momenta, strict=True):
            for block, momentum in zip(each, buffers, strict=True):
                momentum.copy_(0.95 * momentum + 0.05 * block.grad)
                x = 0.05 * block.grad + 0.95 * momentum
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(5):
                    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
                    polynomial = -4.7750 * gram + 2.0315 * gram @ gram
                    x = 3.4445 * x + (polynomial @ x if x.shape[0] <= x.shape[1] else x @ polynomial)
                block.mul_(1 - rate * decay).sub_(rate * 0.2 * math.sqrt(max(block.shape)) * x)

    return step


def steps_of(
    name: OptimizerName, trained: dict[tuple[str, str], list[Any]], config: OptimizerConfig
) -> list[Callable[[], None]]:
    """One function for each weight and kind, which lets a reference take its step."""
    found: list[Callable[[], None]] = []
    for (weight, kind), values in trained.items():
        rate, decay = settings_of(weight, kind, config)
        if name == "lion":
            found.append(lion_reference(values, rate, decay))
        elif name == "adafactor":
            found.append(torch.optim.Adafactor(values, lr=rate, weight_decay=decay).step)
        elif name == "muon" and kind == "block":
            found.append(muon_reference(values, rate, decay))
        else:
            found.append(torch.optim.AdamW(values, lr=rate, betas=(0.9, 0.99), eps=1e-8, weight_decay=decay).step)
    return found


def places_of(name: OptimizerName) -> Iterator[tuple[str, str, int, Any]]:
    """Weight, kind, block number (0 for others) and mask of what a reference trains as one tensor."""
    for weight, regions in mixed_selection(make_model()).weights.items():
        owner = owner_matrix(regions)
        for code, kind in KINDS.items():
            if kind == "block" and name == "muon":
                height, width = regions.block_shape
                for number, (i, j) in enumerate(regions.blocks.tolist()):
                    rows, columns = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                    yield weight, kind, number, (rows, columns)
            elif bool((owner == code).any()):
                yield weight, kind, 0, owner == code


def reference(name: OptimizerName, placement: Placement, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of a dense model on one process, of which an optimizer updates the selected entries only."""
    model, config = make_model(), config_of(name)
    parameters = dict(model.named_parameters())
    places = list(places_of(name))
    base = {place[:3]: parameters[place[0]].detach()[place[3]].clone() for place in places}
    values = {
        key: nn.Parameter(torch.zeros_like(entries) if placement == "delta" else entries.clone())
        for key, entries in base.items()
    }
    trained: dict[tuple[str, str], list[Any]] = {}
    for weight, kind, number, _ in places:
        own = trained.setdefault((weight, kind), [])
        if name == "muon" and kind == "block":
            if number == 0:
                own.append([])
            own[-1].append(values[weight, kind, number])
        else:
            own.append(values[weight, kind, number])
    take_step = steps_of(name, trained, config)
    losses = []
    for tokens in make_batches(steps):
        model.zero_grad()
        loss = tiny_loss(model, tokens)
        loss.backward()
        for weight, kind, number, where in places:
            values[weight, kind, number].grad = parameters[weight].grad[where].clone()
        nn.utils.clip_grad_norm_(values.values(), CLIP)
        with torch.no_grad():
            for step in take_step:
                step()
            for weight, kind, number, where in places:
                key = (weight, kind, number)
                parameters[weight][where] = values[key] + (base[key] if placement == "delta" else 0.0)
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in parameters.items()}


# --- what the ranks do -----------------------------------------------------------------------------------------


def against_references(folder: str, names: list[OptimizerName], steps: int) -> list[dict[str, Any]]:
    """Each optimizer at every stage: the reference's losses and weights; and a resume half-way, there and elsewhere."""
    report = []
    batches, half = make_batches(steps), steps // 2
    for name in names:
        expected = {placement: reference(name, placement, steps) for placement in ("inplace", "delta")}
        for stage, placement in PLACES:
            engine = sparse_engine(stage, placement, config_of(name))
            losses = train_whole(engine, batches[:half])
            path = Path(folder) / f"{name}{stage}"
            sz.save_checkpoint(engine, path)
            losses += train_whole(engine, batches[half:])
            weights, uninterrupted = full_weights(engine), losses[half:]
            engine.destroy()
            resumed_engine = sparse_engine(stage, placement, config_of(name))
            checkpoint = sz.load_checkpoint(resumed_engine, path)
            resumed = train_whole(resumed_engine, batches[half:])
            resumed_engine.destroy()
            expected_losses, expected_weights = expected[placement]
            report.append(
                {
                    "combination": [name, stage, placement],
                    "loss_difference": max(abs(a - b) / b for a, b in zip(losses, expected_losses, strict=True)),
                    "weight_difference": max(float((weights[n] - expected_weights[n]).abs().max()) for n in weights),
                    "change": max(
                        float((weights[n] - p.detach()).abs().max())
                        for n, p in make_model().named_parameters()
                        if n in weights
                    ),
                    "uninterrupted": uninterrupted,
                    "resumed": resumed,
                    "step": checkpoint.optimizer_step,
                    "optimizers": list(checkpoint.optimizers),
                    "states": sorted(checkpoint.read_state().moments),
                }
            )
    return report


def resume_elsewhere(folder: str, names: list[OptimizerName], steps: int) -> list[dict[str, Any]]:
    """What :func:`against_references` saved, continued at another stage and world size; and by another optimizer."""
    report = []
    batches, half = make_batches(steps), steps // 2
    for name in names:
        for stored, placement in PLACES:
            engine = sparse_engine(ELSEWHERE[stored], placement, config_of(name))
            sz.load_checkpoint(engine, Path(folder) / f"{name}{stored}")
            losses = train_whole(engine, batches[half:])
            error = ""
            other = names[(names.index(name) + 1) % len(names)]
            try:
                sz.load_checkpoint(engine, Path(folder) / f"{other}{stored}")
            except sz.InputError as refused:
                error = str(refused)
            report.append({"name": name, "stored": stored, "losses": losses, "other": other, "error": error})
            engine.destroy()
    return report


def wide_model() -> TinyModel:
    """With values of more than 4,096 entries on each rank, which bitsandbytes keeps in 8 bits."""
    torch.manual_seed(7)
    return TinyModel(hidden=128)


def wide_engine(stage: int, placement: Placement, name: OptimizerName) -> Any:
    """Many rows and two blocks, of a few thousand entries, in every projection of the upper layers."""
    model = wide_model()
    weights = {
        weight: sz.WeightSelection(shape=(p.shape[0], p.shape[1]), block_size=32, blocks=[[0, 0]], rows=range(44))
        for weight, p in model.named_parameters()
        if "_proj.weight" in weight and "layers.0" not in weight
    }
    sz.sparsify(model, sz.Selection(weights), placement)
    return make_engine(model, stage, OptimizerConfig(name=name, learning_rate=1e-3, weight_decay=0.1))


def _distance(found: dict[str, Tensor], wanted: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Of two changes since the start, relative to the one that is wanted."""
    apart = torch.cat([found[name] - wanted[name] for name in wanted])
    change = torch.cat([wanted[name] - start[name] for name in wanted])
    return float(apart.norm() / change.norm())


def eight_bit(folder: str) -> list[dict[str, Any]]:
    """8-bit AdamW: how near AdamW, and a resume half-way, at every stage."""
    report = []
    batches = make_batches(14)
    for stage, placement in PLACES[:1] + PLACES[2:]:
        plain = wide_engine(stage, placement, "adamw")
        start = read_masters(plain)
        train_whole(plain, batches)
        wanted = read_masters(plain)
        plain.destroy()
        engine = wide_engine(stage, placement, "adamw_8bit")
        train_whole(engine, batches[:7])
        dtypes = {state["state1"].dtype for state in engine_states(engine)}
        path = Path(folder) / f"stage{stage}"
        sz.save_checkpoint(engine, path)
        kept = {key for state in engine_states(engine) for key in state if "fp32" in key}
        train_whole(engine, batches[7:])
        found = read_masters(engine)
        engine.destroy()
        resumed_engine = wide_engine(stage, placement, "adamw_8bit")
        sz.load_checkpoint(resumed_engine, path)
        state = read_training_state(resumed_engine)
        saved = sz.read_checkpoint(path).read_state()
        quantized_again = max(
            float((state.moments[key][name] - numbers).norm() / numbers.norm())
            for key, moments in saved.moments.items()
            for name, numbers in moments.items()
        )
        train_whole(resumed_engine, batches[7:])
        again = read_masters(resumed_engine)
        resumed_engine.destroy()
        report.append(
            {
                "stage": stage,
                "has_8_bits": torch.uint8 in dtypes,
                "left_wide": sorted(kept),
                "states": sorted(saved.moments),
                "distance_to_adamw": _distance(found, wanted, start),
                "quantized_again": quantized_again,
                "distance_after_resume": _distance(again, found, start),
            }
        )
    return report


def engine_states(engine: Any) -> list[dict[str, Any]]:
    """The states of the inner optimizer, one for each tensor that it steps."""
    from sparse_zero.zero.compat import inner_optimizer

    return [state for state in inner_optimizer(engine).state.values() if state]


@contextmanager
def _scaled(engine: Any) -> Iterator[Any]:
    """Let a stage-2 engine in fp32 scale its loss as it does in fp16, by DeepSpeed's own scaler."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        init_scale=2.0**10, scale_window=4, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False
    )
    engine.optimizer.loss_scaler, engine.optimizer.dynamic_loss_scale = scaler, True
    yield scaler
    engine.destroy()


def loss_scale(folder: str) -> dict[str, Any]:
    """Overflows change no weight and lower the scale; a resume goes on with the scale and its counters."""
    batches = make_batches(8)
    size = GLOBAL_BATCH // dist.get_world_size()
    engine = sparse_engine(2, "inplace", config_of("adamw"))
    with _scaled(engine) as scaler:
        train_whole(engine, batches[:2])
        before, weights = read_masters(engine), {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        for _ in range(2):
            engine.backward(tiny_loss(engine, batches[2][:size]) * (math.inf if dist.get_rank() == 0 else 1.0))
            engine.step()
        after = read_masters(engine)
        unchanged = all(torch.equal(before[name], after[name]) for name in before) and all(
            torch.equal(weights[name], p) for name, p in engine.module.named_parameters()
        )
        applied, lowered = step_was_applied(engine), scaler.cur_scale
        sz.save_checkpoint(engine, folder)
        stored = read_loss_scale(engine)
        uninterrupted = train_whole(engine, batches[3:])
        raised = scaler.cur_scale
    resumed_engine = sparse_engine(2, "inplace", config_of("adamw"))
    with _scaled(resumed_engine) as scaler:
        sz.load_checkpoint(resumed_engine, folder)
        loaded = read_loss_scale(resumed_engine)
        resumed = train_whole(resumed_engine, batches[3:])
    return {
        "unchanged": unchanged,
        "applied": applied,
        "scales": [lowered, raised],
        "stored": stored,
        "loaded": loaded,
        "uninterrupted": uninterrupted,
        "resumed": resumed,
    }


def other_optimizers(folder: str) -> dict[str, Any]:
    """Optimizers that are not ours: one with a third state is saved and goes on, one with a factored state is refused."""

    class Factored(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["row_var"] = torch.zeros(3)
            return super().step(closure)

    found: dict[str, Any] = {}
    batches = make_batches(6)
    makers: dict[str, Callable[[Any], Any]] = {
        "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-3, amsgrad=True),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
        "factored": lambda groups: Factored(groups, lr=1e-2),
    }
    for name, maker in makers.items():
        losses: list[list[float]] = []
        for number in range(2):
            model = make_model()
            sz.sparsify(model, mixed_selection(model), "inplace")
            engine, *_ = sz.initialize(
                model=model,
                config={
                    "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
                    "zero_allow_untested_optimizer": True,
                    "zero_optimization": {"stage": 2},
                    "steps_per_print": 10**9,
                },
                optimizer=maker,
            )
            path = Path(folder) / name
            try:
                if number == 0:
                    train_whole(engine, batches[:3])
                    sz.save_checkpoint(engine, path)
                else:
                    sz.load_checkpoint(engine, path)
                losses.append(train_whole(engine, batches[3:]))
            except sz.InputError as error:
                found[f"{name}_error"] = str(error)
                engine.destroy()
                break
            found[name] = {"algorithm": algorithm(engine), "losses": losses}
            engine.destroy()
    return found


def standing(engine: Any) -> dict[str, Tensor]:
    """What stands in the weights where values belong, by the values' names; whole on every rank."""
    return {
        values_name(name, kind): read_entries(carrier.parameter, carrier.positions(kind)).clone()
        for name, carrier in carriers(engine.module)
        for kind in carrier.values()
    }


def stochastic_rounding(folder: str) -> list[dict[str, Any]]:
    """bf16 engines that round stochastically: weights are what the masters round to, on all ranks, also after a resume."""
    report = []
    reference: dict[str, Tensor] = {}
    batches = make_batches(6)
    for stage in range(4):
        engine = sparse_engine(stage, "inplace", config_of("adamw"), bf16=True, rounding="stochastic")
        train_whole(engine, batches[:3])
        masters = read_masters(engine)
        reference = reference or masters
        expected = {
            name: round_stochastic(numbers, torch.bfloat16, key_of(5, 3, name)) for name, numbers in masters.items()
        }
        values = dict(zip(expected, whole_values(sz.trainable_parameters(engine.module).values()), strict=True))
        as_expected = all(torch.equal(values[name], expected[name]) for name in expected)
        nearest = sum(int((expected[name] != masters[name].bfloat16()).sum()) for name in expected)
        weights = standing(engine)
        sz.write_back(engine.module)
        written = all(torch.equal(weights[name], each) for name, each in standing(engine).items()) and all(
            torch.equal(weights[name], each) for name, each in expected.items()
        )
        flat = torch.cat(list(weights.values())).float()
        everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, flat)
        sz.save_checkpoint(engine, Path(folder) / f"stage{stage}")
        uninterrupted = train_whole(engine, batches[3:])
        engine.destroy()
        resumed_engine = sparse_engine(stage, "inplace", config_of("adamw"), bf16=True, rounding="stochastic")
        sz.load_checkpoint(resumed_engine, Path(folder) / f"stage{stage}")
        same_weights = all(torch.equal(weights[name], each) for name, each in standing(resumed_engine).items())
        resumed = train_whole(resumed_engine, batches[3:])
        resumed_engine.destroy()
        report.append(
            {
                "stage": stage,
                "masters_of_stage_0": max(float((masters[n] - each).abs().max()) for n, each in reference.items()),
                "as_expected": as_expected,
                "not_nearest": nearest,
                "written": written,
                "equal_on_all_ranks": all(torch.equal(each, flat) for each in everyone),
                "same_weights": same_weights,
                "uninterrupted": uninterrupted,
                "resumed": resumed,
            }
        )
    return report


def private_names() -> dict[str, Any]:
    """Whether this DeepSpeed's optimizers still hold values where sparse_zero.zero.compat looks for them."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    found: dict[str, Any] = {}
    for stage, bf16 in ((0, False), (0, True), (1, False), (1, True), (2, False), (3, False)):
        engine = sparse_engine(stage, "inplace", config_of("adamw"), bf16=bf16)
        values = sz.trainable_parameters(engine.module)
        groups = compat.stepped(engine)
        given = configured_groups(sz.parameter_groups(engine.module), config_of("adamw"), engine.module)
        entries = torch.zeros(1)
        for each in groups:
            pieces, _, _ = compat.pieces(each.values, each.tensors)
            entries += sum(piece.length for piece in pieces)
        if stage:
            dist.all_reduce(entries)
        masters = read_masters(engine)
        weights = {name: each.float() for name, each in standing(engine).items()}
        found[f"{stage} {'bf16' if bf16 else 'fp32'}"] = {
            "values": sum(len(each.values) for each in groups) == len(values),
            "groups": {(each.group, id(one)) for each in groups for one in each.values}
            == {(number, id(one)) for number, group in enumerate(given) for one in group["params"]},
            "num_groups": len(given),
            "entries": int(entries) == sum(len(master) for master in masters.values()),
            "masters": all(torch.equal(masters[name], weights[name]) for name in masters),
            "steps": optimizer_step_count(engine),
        }
        engine.destroy()
    scaler = DynamicLossScaler(
        init_scale=4.0, scale_window=4, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False
    )
    found["loss_scaler"] = [name for name in LOSS_SCALE if not hasattr(scaler, name)] + (
        [] if scaler.dynamic else ["dynamic"]
    )
    return found


def migrations() -> dict[str, Any]:
    """Another selection half-way: entries that are kept keep what the optimizer knows of them."""
    found: dict[str, Any] = {}
    names: tuple[OptimizerName, ...] = ("adafactor", "muon")
    for name in names:
        engine = sparse_engine(2, "inplace", config_of(name))
        train_whole(engine, make_batches(3))
        state = read_training_state(engine)
        before = live_entries(
            engine.module, dataclasses.replace(state, moments={} if name == "muon" else state.moments)
        )
        other = mixed_selection(make_model(), block_size=5)
        try:
            engine, counts = sz.migrate(
                engine, other, partial(make_engine, stage=2, config=config_of(name)), moments="mean"
            )
        except sz.InputError as error:
            found[name] = {"error": str(error), "goes_on": train_whole(engine, make_batches(4)[3:])}
            engine.destroy()
            continue
        after = live_entries(engine.module, read_training_state(engine))
        same, started = [], []
        for parameter, new in after.items():
            at, kept = find_positions(before[parameter].positions, new.positions)
            old = before[parameter]
            same.append(torch.equal(new.masters[kept], old.masters[at[kept]]))
            for key, moment in new.moments.items():
                same.append(torch.equal(moment[kept], old.moments[key][at[kept]]))
                started.append(bool((moment[~kept] > 0).all()))
        found[name] = {
            "same": same,
            "started": started,
            "counts": [counts.kept, counts.new],
            "losses": train_whole(engine, make_batches(6)[3:]),
            "states": sorted(read_training_state(engine).moments),
        }
        engine.destroy()
    return found


def offloaded_states(folder: str, names: list[OptimizerName]) -> list[dict[str, Any]]:
    """States in the host's memory: losses are those without, and a resume goes on bit for bit."""
    report = []
    batches = make_batches(6)
    for name in names:
        for stage in (1, 2, 3):
            engine = sparse_engine(stage, "inplace", config_of(name))
            plain = train_whole(engine, batches)
            engine.destroy()
            engine = sparse_engine(stage, "inplace", config_of(name), offloaded=True)
            losses = train_whole(engine, batches[:3])
            sz.save_checkpoint(engine, Path(folder) / f"{name}{stage}")
            losses += train_whole(engine, batches[3:])
            engine.destroy()
            resumed_engine = sparse_engine(stage, "inplace", config_of(name), offloaded=True)
            sz.load_checkpoint(resumed_engine, Path(folder) / f"{name}{stage}")
            resumed = train_whole(resumed_engine, batches[3:])
            resumed_engine.destroy()
            report.append({"combination": [name, stage], "plain": plain, "losses": losses, "resumed": resumed})
    return report


def old_checkpoint(folder: str) -> dict[str, Any]:
    """A checkpoint as format 2 had it, which was Adam's only and named no optimizer."""
    path, batches = Path(folder), make_batches(4)
    engine = sparse_engine(2, "inplace", config_of("adamw"))
    train_whole(engine, batches[:2])
    sz.save_checkpoint(engine, path)
    uninterrupted = train_whole(engine, batches[2:])
    engine.destroy()
    if dist.get_rank() == 0:
        header = json.loads((path / "checkpoint.json").read_text())
        younger = (
            "optimizer",
            "loss_scale",
            "schedule",
            "rng",
            "config",
            "selection_digest",
            "masters_sha256",
            "state_id",
        )
        for name in younger:
            del header[name]
        (path / "checkpoint.json").write_text(json.dumps({**header, "version": 2}))
        manifest = json.loads((path / "manifest.json").read_text())
        changed = {"bytes": (path / "checkpoint.json").stat().st_size, "sha256": file_sha256(path / "checkpoint.json")}
        manifest["files"]["checkpoint.json"] = changed
        (path / "manifest.json").write_text(json.dumps(manifest))
    dist.barrier()
    engine = sparse_engine(2, "inplace", config_of("adamw"))
    sz.load_checkpoint(engine, path)
    resumed = train_whole(engine, batches[2:])
    engine.destroy()
    engine, error = sparse_engine(2, "inplace", config_of("adafactor")), ""
    try:
        sz.load_checkpoint(engine, path)
    except (sz.InputError, PeerError) as refused:
        error = str(refused)
    engine.destroy()
    return {"uninterrupted": uninterrupted, "resumed": resumed, "error": error}


def all_in_one_world(folder: str) -> dict[str, Any]:
    """What needs little time of its own: starting ranks takes more."""
    return {
        "loss_scale": loss_scale(f"{folder}/loss_scale"),
        "migrations": migrations(),
        "offloaded": offloaded_states(f"{folder}/offloaded", ["adamw", "muon"]),
        "old_checkpoint": old_checkpoint(f"{folder}/old"),
        "other_optimizers": other_optimizers(folder),
        "stochastic_rounding": stochastic_rounding(folder),
    }
