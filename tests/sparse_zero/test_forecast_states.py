"""Does the closed form tell what a rank holds beside activations: the base, what is trained, gradients and states?"""

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

import sparse_zero as sz
from models.decoder_shapes import decoder_shape
from models.peer_models import make_peer
from models.quantized_shapes import quantize_shapes
from sparse_zero.layers.carriers import carriers
from sparse_zero.memory.closed_form.base_weights import base_of, constant_bytes
from sparse_zero.memory.closed_form.forecast import Forecast, forecast_memory
from sparse_zero.memory.closed_form.gathers import Limits, walk
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.module_order import Module, Parameter
from sparse_zero.memory.closed_form.moments import Moment, Phase, Term
from sparse_zero.memory.closed_form.optimizer_states import moments_bytes
from sparse_zero.memory.closed_form.partitions import partitions_of, zero_sizes
from sparse_zero.memory.closed_form.states import held_states
from sparse_zero.memory.closed_form.trained import Trained, TrainedTensor, trained_of
from sparse_zero.memory.simulation.quantized_bases import constants_of
from sparse_zero.selection.config import Kind
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.defaults import with_defaults
from sparse_zero.zero.optimizers import ModuleOptimizerConfig, OptimizerConfig, OptimizerName, build_optimizer
from tests.distributed.spawn import preloaded_context
from tests.models.tiny import tiny_llama
from tests.sparse_zero.helpers import mixed_selection
from tests.sparse_zero.quantizing import quantize

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHAPE: dict[str, Any] = {"hidden": 256, "intermediate": 640, "layers": 3, "vocab": 1000}
TARGETS = ("q_proj", "v_proj", "down_proj")
# What tensors between two phases are; gradients are told apart from what the optimizer has otherwise.
STATES = ("weights", "gathered", "values", "gradients", "optimizer", "indices")


def on_meta(precision: str = "fp32") -> Any:
    with torch.device("meta"):
        model = tiny_llama(**SHAPE)
    return model if precision == "fp32" else model.bfloat16()


def regions() -> Selection:
    return mixed_selection(on_meta(), block_size=16)


def make_job(**changes: Any) -> MemoryJob:
    defaults: dict[str, Any] = {"micro_batch": 1, "length": 32, "precision": "fp32", "lora_rank": 4}
    return MemoryJob(**{**defaults, "lora_targets": TARGETS, **changes})


def forecast(job: MemoryJob) -> Forecast:
    model = on_meta(job.precision)
    return forecast_memory(decoder_shape(model), job, regions(), module_map=sz.default_module_map(model))


# -- against simulations


def simulate(out: str, **changes: Any) -> None:
    """What a rank holds, by phase, in a process of its own; ``changes`` are of the job."""
    from models.compat import masks_of_fake_tensors
    from models.loading import checkpoint_activations
    from sparse_zero.memory.simulation.peers import peer_engine
    from sparse_zero.memory.simulation.simulate_training import simulate_training

    job = make_job(**changes)
    model = on_meta(job.precision)
    if job.quantization != "none":
        quantize_shapes(model, job.quantization, job.double_quantization, model.dtype)
    if job.method == "selection":
        sz.sparsify(model, regions(), job.placement)
    else:
        make_peer(model, job.method, rank=job.lora_rank, targets=job.lora_targets)
    if job.gradient_checkpointing:
        checkpoint_activations(model)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": job.accumulation,
        "zero_optimization": {"stage": job.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": job.precision == "bf16"},
        "steps_per_print": 10**9,
    }
    settings["zero_optimization"] = with_defaults(model, {"stage": job.stage})

    optimizer = OptimizerConfig(
        per_module=tuple(ModuleOptimizerConfig(modules=each, weight_decay=0.5) for each in job.per_module)
    )

    def make_engine(fake: nn.Module) -> Any:
        if job.method != "selection":
            return peer_engine(fake, settings, optimizer)
        return sz.initialize(
            model=fake, config=settings, optimizer=lambda groups: build_optimizer(groups, optimizer, model=fake)
        )[0]

    def make_batch() -> dict[str, torch.Tensor]:
        tokens = torch.zeros(1, job.length, dtype=torch.int64)
        return {"input_ids": tokens, "labels": tokens}

    with masks_of_fake_tensors(needed=False):
        timeline = simulate_training(
            model,
            settings=settings,
            make_engine=make_engine,
            make_batch=make_batch,
            loss_fn=lambda engine, batch: engine(**batch, use_cache=False).loss,
            world_size=job.world_size,
            head="lm_head",
            trains_base=job.method == "full",
        )
    found = {
        phase: {"peak": timeline.peak(phase).num_bytes, "kinds": timeline.at_end(phase).by_kind,
                "end": timeline.at_end(phase).num_bytes}
        for phase in timeline.phases()
    }  # fmt: skip
    Path(out).write_text(json.dumps(found))


CASES = [
    {"stage": 1, "precision": "bf16", "world_size": 8, "accumulation": 2},
    {"stage": 2, "world_size": 2, "method": "lora"},
    {"stage": 2, "world_size": 64, "per_module": (("*.v_proj",), ("*.layers.0", "*.layers.2"))},
    {"stage": 3, "precision": "bf16", "world_size": 4},
]
MORE_CASES = [
    {"stage": 0, "world_size": 2},
    {"stage": 0, "precision": "bf16", "world_size": 2, "accumulation": 2},
    {"stage": 1, "world_size": 1},
    {"stage": 2, "precision": "bf16", "world_size": 64, "accumulation": 2, "placement": "delta"},
    {"stage": 3, "world_size": 2, "placement": "delta", "gradient_checkpointing": True},
    {"stage": 3, "precision": "bf16", "world_size": 64, "accumulation": 2},
    {"stage": 0, "precision": "bf16", "world_size": 2, "method": "full"},
    {"stage": 1, "world_size": 4, "method": "full", "accumulation": 2},
    {"stage": 2, "precision": "bf16", "world_size": 4, "method": "full"},
    {"stage": 3, "precision": "bf16", "world_size": 4, "method": "full"},
    {"stage": 1, "precision": "bf16", "world_size": 4, "method": "dora"},
    {"stage": 3, "precision": "bf16", "world_size": 4, "method": "lora"},
    {"stage": 2, "precision": "bf16", "world_size": 2, "quantization": "nf4", "placement": "delta"},
    {"stage": 2, "precision": "bf16", "world_size": 2, "quantization": "nf4", "method": "lora"},
    {"stage": 3, "precision": "bf16", "world_size": 2, "quantization": "nf4", "placement": "delta"},
]


@pytest.mark.parametrize(
    "changes",
    [*CASES, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE_CASES)],
    ids=lambda each: "-".join(map(str, each.values())),
)
def test_states_are_those_of_a_simulation(changes: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    process = preloaded_context().Process(target=simulate, args=(str(out),), kwargs=changes)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    simulated = json.loads(out.read_text())
    job = make_job(**changes)
    shape, found = decoder_shape(on_meta(job.precision)), forecast(job)
    # Phases without activations. Other ranks' values lie elsewhere than at random, and small indices count here.
    loose = 0.03 if job.stage == 3 else 0.01
    # A simulation begins with the shards of a quantized base, which a run loads whole.
    begins_whole = job.quantization != "none" and job.stage == 3
    alone: tuple[Phase, ...] = ("step",) if begins_whole else ("load", "engine", "step")
    for phase in alone:
        peak = found.peak(phase)
        assert peak.num_bytes() == pytest.approx(simulated[phase]["peak"], rel=loose), (phase, peak)
    # What is left when parts end, by kind, but that engines make what is called optimizer, whatever it is for.
    held = held_states(shape, job, trained_of(shape, job, regions()))
    left: dict[Phase, tuple[Term, ...]] = {
        "step": held.between_steps,
        "backward": (*held.held, *held.reduction.at_step(), Term(
            name="gathered", kind="gathered", num_bytes=held.persistent)),
    }  # fmt: skip
    for phase, terms in left.items():
        kinds = simulated[phase]["kinds"]
        mine = Moment(phase="step", name=phase, terms=tuple(terms)).by_kind()
        for kind in ("weights", "values", "gathered"):
            assert mine.get(kind, 0) == pytest.approx(kinds.get(kind, 0), rel=0.001), (phase, kind)
        made = [sum(each.get(kind, 0) for kind in ("gradients", "optimizer", "indices")) for each in (mine, kinds)]
        assert made[0] == pytest.approx(made[1], rel=0.015), (phase, mine, kinds)
    if job.method in ("lora", "dora") and job.stage == 3:
        return  # Adapters in fp32 beside a base in 16 bits are not in the closed form of activations.
    passes: tuple[Phase, ...] = ("forward", "backward")
    for phase in passes:
        peak = found.peak(phase)
        assert peak.num_bytes() == pytest.approx(simulated[phase]["peak"], rel=0.04), (phase, peak)


# -- what is trained, against the real thing


def test_values_and_indices_are_those_of_a_sparse_model() -> None:
    model, selection = tiny_llama(**SHAPE), regions()
    family = sz.default_module_map(model)
    trained = trained_of(decoder_shape(model), make_job(), selection, family.shared_inputs)
    sz.sparsify(model, selection, module_map=family)
    groups = sz.parameter_groups(model)
    assert [group["kind"] for group in groups] == list(trained.kinds)
    sizes = [[values.numel() for values in group["params"]] for group in groups]
    assert sizes == [[each.numel for each in group] for group in trained.groups]
    layers = [[int(name.split(".")[2]) for name, carrier in carriers(model) if kind in carrier.values()]
              for kind in trained.kinds]  # fmt: skip
    assert layers == [[each.layer for each in group] for group in trained.groups]
    indices = sum(buffer.nbytes for _, carrier in carriers(model) for buffer in carrier.buffers())
    assert indices == 8 * sum(each.index_entries for each in trained.tensors())
    whole = {name: carrier.keep_input for name, carrier in carriers(model) if hasattr(carrier, "keep_input")}
    assert {name: linear.keeps_input for name, linear in trained.linears.items()} == whole


def test_hooked_parameters_have_a_position_for_each_entry() -> None:
    model = tiny_llama(**SHAPE)
    selection = Selection({
        "model.embed_tokens.weight": sz.WeightSelection(shape=(1000, 256), rows=[3, 5]),
        "model.layers.1.input_layernorm.weight": sz.WeightSelection(shape=(256, 1), whole=True),
    })  # fmt: skip
    trained = trained_of(decoder_shape(model), make_job(), selection)
    sz.sparsify(model, selection)
    positions = sum(buffer.nbytes for _, carrier in carriers(model) for buffer in carrier.buffers())
    assert positions == 8 * (2 * 256 + 256) == 8 * sum(each.index_entries for each in trained.tensors())
    assert [[each.layer for each in group] for group in trained.groups] == [[-1], [1]]
    assert trained.others == {"model.embed_tokens": 512, "model.layers.1.input_layernorm": 256}


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_peers_train_what_peft_makes(method: Any) -> None:
    model = on_meta()
    shape, job = decoder_shape(model), make_job(method=method)
    make_peer(model, method, rank=4, targets=TARGETS)
    real = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    trained = trained_of(shape, job, None)
    found = [each.numel for each in trained.tensors()]
    assert (sorted(found) if method == "full" else found) == (sorted(real) if method == "full" else real)
    assert trained.num_parameters == sum(real)


@pytest.mark.parametrize(
    "changes", [{}, {"method": "full"}, {"method": "lora"}, {"quantization": "nf4", "placement": "delta"}]
)
def test_sizes_of_buckets_are_those_of_the_engine(changes: dict[str, Any]) -> None:
    model, job = on_meta(), make_job(stage=3, **changes)
    shape = decoder_shape(model)
    trained = trained_of(shape, job, regions())
    if job.quantization != "none":
        quantize_shapes(model, job.quantization, job.double_quantization, model.dtype)
    if job.method == "selection":
        sz.sparsify(model, regions(), job.placement)
    else:
        make_peer(model, job.method, rank=4, targets=TARGETS)
    expected = {name.removeprefix("stage3_"): size for name, size in with_defaults(model, {"stage": 3}).items()}
    expected.pop("stage")
    assert zero_sizes(base_of(shape, job), trained, job) == expected
    own = make_job(stage=3, zero_options={"stage3_prefetch_bucket_size": 7, "reduce_bucket_size": "auto"}, **changes)
    assert zero_sizes(base_of(shape, own), trained, own) == {**expected, "prefetch_bucket_size": 7}


@pytest.mark.parametrize(("form", "double"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_a_quantized_base_takes_what_bitsandbytes_makes(form: Any, double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_llama(**SHAPE)
    job = make_job(quantization=form, double_quantization=double, placement="delta")
    base = base_of(decoder_shape(model), job)
    quantize(model, "nf4-double" if double else form)
    assert sum(each.num_bytes for each in base) == sum(parameter.nbytes for parameter in model.parameters())
    stored = {constant.untyped_storage().data_ptr(): constant.nbytes for constant in constants_of(model)}
    assert constant_bytes(base) == sum(stored.values())


# -- arithmetic


def _trained(*groups: tuple[int, ...]) -> Trained:
    made = tuple(tuple(TrainedTensor(module="", numel=numel, layer=0) for numel in group) for group in groups)
    kinds: tuple[Kind, ...] = ("block", "row")
    return Trained(linears={}, others={}, groups=made, kinds=kinds[: len(groups)], num_parameters=sum(map(sum, groups)))


def test_flat_groups_are_padded_and_cut() -> None:
    block, row = partitions_of(_trained((5, 8, 10), (3,)), make_job(stage=2, world_size=3))
    # 23 entries, in multiples of six; the first rank has eight: all of the first parameter, a part of the second.
    assert (block.whole, block.own, block.reached, block.largest_piece, block.num_pieces) == (24, 8, 13, 5, 2)
    assert (row.whole, row.own, row.reached, row.largest_piece) == (6, 2, 3, 2)
    (whole,) = partitions_of(_trained((5, 8)), make_job(stage=0, world_size=3))
    assert (whole.whole, whole.own) == (13, 13)
    (shards,) = partitions_of(_trained((5, 8)), make_job(stage=3, world_size=3))
    assert (shards.whole, shards.own, shards.largest_piece) == (15, 5, 3)


def _modules() -> tuple[Module, Parameter, Parameter]:
    first, second = (Parameter(numel=100, itemsize=2) for _ in range(2))
    values = Parameter(numel=11, itemsize=2, requires_grad=True)
    low = Module(name="0.a", parameters=[first])
    high = Module(name="0.b", parameters=[second, values])
    return Module(name="", children=[Module(name="0", children=[low, high])]), first, second


def test_modules_are_gathered_one_at_a_time_without_prefetching() -> None:
    root, *_ = _modules()
    found = walk(root, 4, Limits(prefetch=0, live=1000, reuse=0))
    # 11 values are three to a rank, twelve in all; two that come together are copied out of one buffer.
    assert found.forward == {"": 0, "0": 0, "0.a": 200, "0.b": 222, "end": 0}
    assert found.copying_forward["0.b"] == 224 + 222
    assert found.backward["0.a"] == 200
    assert found.backward["end"] == 0
    assert walk(root, 1, Limits(prefetch=0, live=1000, reuse=0)).forward == {}


def test_what_is_read_again_soon_stays() -> None:
    root, *_ = _modules()
    found = walk(root, 4, Limits(prefetch=0, live=1000, reuse=1000))
    assert found.forward["end"] == 422
    assert found.backward["0.b"] == 422


def test_prefetching_keeps_to_its_limits() -> None:
    root, *_ = _modules()
    # One parameter ahead whenever a module begins: all three are there, or arrive, when the first is at work.
    ahead = walk(root, 4, Limits(prefetch=1, live=1000, reuse=0))
    assert ahead.forward["0.a"] == 200 + 200 + 24
    # Nothing ahead of the one that fills the limit.
    held = walk(root, 4, Limits(prefetch=1, live=100, reuse=0))
    assert held.forward["0.a"] == 200


def test_a_repetition_keeps_frozen_weights_until_its_backward_has_ended() -> None:
    root, *_ = _modules()
    found = walk(root, 4, Limits(prefetch=0, live=1000, reuse=0), repeated=frozenset({"0"}))
    assert found.backward["0.b"] == 422
    assert found.backward["end"] == 0


# DeepSpeed compiles those for CPUs when they are first used.
COMPILED = ("deepspeed_adamw", "lion")


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[pytest.mark.slow] * (each in COMPILED)) for each in get_args(OptimizerName)],
)
def test_moments_are_those_that_the_optimizer_makes(name: Any) -> None:
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    model, selection = tiny_llama(**SHAPE), regions()
    sz.sparsify(model, selection)
    groups = sz.parameter_groups(model)
    optimizer = build_optimizer(groups, OptimizerConfig(name=name), model=model)
    for group in groups:
        for values in group["params"]:
            values.grad = torch.ones_like(values)
    optimizer.step()
    stored = {
        tensor.untyped_storage().data_ptr(): tensor.nbytes
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    }
    sizes = [(group["kind"], [values.numel() for values in group["params"]]) for group in groups]
    expected = sum(moments_bytes(name, kind, each, on_host=True) for kind, each in sizes)
    if name == "adamw_8bit":
        # All groups share one pair of tables.
        expected -= 2048 * max(sum(any(size >= 4096 for size in each) for _, each in sizes) - 1, 0)
    assert sum(stored.values()) == expected


# -- the whole


def test_more_ranks_hold_less() -> None:
    for stage in (1, 2, 3):
        found = [forecast(make_job(stage=stage, world_size=ranks, precision="bf16")) for ranks in (1, 4, 16)]
        steps = [each.peak("step").num_bytes() for each in found]
        assert steps[0] > steps[1] > steps[2]
    whole = forecast(make_job(stage=2, world_size=16)).peak("step").by_kind()["weights"]
    shards = forecast(make_job(stage=3, world_size=16)).peak("step").by_kind()["weights"]
    assert shards == pytest.approx(whole / 16, rel=0.001)


def test_offloading_moves_states_to_the_host() -> None:
    near, far = (forecast(make_job(stage=2, world_size=2, offload_optimizer=where)) for where in ("none", "cpu"))
    moved = near.peak("step").by_kind()["optimizer"]
    assert "optimizer" not in far.peak("step").by_kind()
    assert far.peak("step", "host").by_kind("host")["optimizer"] == moved
    base = forecast(make_job(stage=3, world_size=2, offload_base="cpu"))
    assert "weights" not in base.peak("step").by_kind()
    shards = forecast(make_job(stage=3, world_size=2)).peak("step").by_kind()["weights"]
    assert base.peak("step", "host").by_kind("host")["weights"] == shards


def test_a_forecast_is_a_sum_of_named_terms() -> None:
    found = forecast(make_job(stage=3, world_size=4, precision="bf16"))
    peak = found.peak()
    assert found.peak_bytes == peak.num_bytes() == sum(term.num_bytes for term in peak.terms if term.place == "device")
    assert {"base weights (shards)", "values", "moments", "masters"} <= {term.name for term in peak.terms}
    told = json.loads(json.dumps(found.to_json()))
    assert list(told) == found.phases()
    for row in told.values():
        assert row["peak_bytes"] == sum(row["by_kind"].values())
    with pytest.raises(KeyError):
        found.peak("calibration")


def test_what_has_no_forecast_is_refused() -> None:
    shape = decoder_shape(on_meta())
    with pytest.raises(sz.InputError, match="the method 'selection' is forecast for a selection"):
        forecast_memory(shape, make_job())
    with pytest.raises(sz.InputError, match="no linear bears such a name, but down_proj, gate_proj"):
        forecast_memory(shape, make_job(method="lora", lora_targets=("query",)))
    assert math.isfinite(forecast_memory(shape, make_job(method="lora")).peak_bytes)
