"""Does the closed form hold, in forward and backward, what the real code holds on tensors without data?

Gradients of what is trained are let go at once, which leaves the activations. Few positions have logits, so that the
layers hold the most, and not the loss.
"""

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch

from models.compat import masks_of_fake_tensors
from models.decoder_shapes import decoder_shape
from models.families import module_map
from models.loading import checkpoint_activations
from models.loss import nll_at
from models.peer_models import make_peer
from sparse_zero.layers.region_products import MOST_VIEWS
from sparse_zero.layers.sparsify import sparsify
from sparse_zero.memory.closed_form.activations import activation_moments
from sparse_zero.memory.closed_form.job import MemoryJob
from sparse_zero.memory.closed_form.moments import Moment
from sparse_zero.memory.closed_form.trained import trained_of
from sparse_zero.memory.simulation.simulate import simulated
from sparse_zero.selection.candidates import expand_braces
from sparse_zero.selection.config import RegionConfig, SelectionConfig
from sparse_zero.selection.select import select
from tests.models.decoders import decoder

ATTENTION = ("*.{q,k,v,o}_proj", "*.{query_key_value,dense}")
MLP = ("*.mlp.{gate,up,down}_proj", "*.mlp.dense_*")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def regions(name: str) -> tuple[RegionConfig, ...]:
    """Of one recipe; patterns that match nothing in a family are left out by the caller."""
    made: dict[str, tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...]] = {
        "blocks": (("block", ATTENTION, {"block_size": 16, "per_matrix": 3}),),
        "rows": (("row", (*ATTENTION, *MLP), {"per_matrix": 3}),),
        "columns": (("column", (*ATTENTION, *MLP), {"per_matrix": 3}),),
        "mixed": (("block", ATTENTION, {"block_size": 16, "per_matrix": 3}), ("row", MLP[:1], {"per_matrix": 2})),
        "many": (("block", (*ATTENTION, *MLP), {"blocks_per_side": 8, "per_matrix": 8}),),
        # More than are multiplied one by one.
        "small": (("block", (*ATTENTION, *MLP), {"block_size": 8, "per_matrix": MOST_VIEWS + 2}),),
        # By hooks on the parameters.
        "vectors": (
            ("block", ATTENTION[:1], {"block_size": 16, "per_matrix": 3}),
            ("whole", ("*layernorm*",), {}),
        ),
        "embedding": (("row", ("*embed_tokens",), {"per_matrix": 3}),),
        "experts": (("block", ("*experts*",), {"block_size": 16, "per_matrix": 2}),),
        "head": (("row", ("lm_head",), {"per_matrix": 8}), ("row", ATTENTION[:1], {"per_matrix": 3})),
        "head only": (("block", ("lm_head",), {"block_size": 16, "per_matrix": 3}),),
        # Nothing below the second layer's queries.
        "upper": (("row", ("*.1.self_attn.q_proj",), {"per_matrix": 3}),),
        "top": (("block", ("*.1.mlp.*",), {"block_size": 8, "per_matrix": 4}),),
    }
    return tuple(RegionConfig(kind=kind, modules=list(modules), **more) for kind, modules, more in made[name])  # type: ignore[arg-type]


def held(family: str, recipe: str, job: MemoryJob, **changes: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes kept at the end of forward, and the most in forward and backward: simulated, and by the closed form."""
    attention = {"attn_implementation": "eager"} if job.attention == "eager" else {}
    model = decoder(family, DTYPES[job.precision], **attention, **changes)
    shape, family_map = decoder_shape(model), module_map(model)
    selection = None
    if job.method == "selection":
        named = [each.name for each in family_map.matrices]
        chosen = tuple(matching(each, named) for each in regions(recipe))
        config = SelectionConfig(regions=chosen, score="random")
        selection = select(model, None, config, module_map=family_map)
        sparsify(model, selection, job.placement, module_map=family_map)
    else:
        make_peer(model, job.method, rank=job.lora_rank, targets=job.lora_targets)
        if job.trained_bytes == job.element_bytes:
            model.to(DTYPES[job.precision])
    if job.gradient_checkpointing:
        checkpoint_activations(model)
    trained = trained_of(shape, job, selection, family_map.shared_inputs)
    found = forecast(activation_moments(shape, job, trained))
    with pytest.MonkeyPatch.context() as patch:
        if job.stage == 3:
            patch.setattr(torch.nn.functional, "linear", KeepingLinear.apply)
        return measured(model.train(), job), found


class KeepingLinear(torch.autograd.Function):
    """As DeepSpeed's at stage 3, keeps its input and its weight, whatever needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        out = x.matmul(weight.t())
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = gradient.flatten(0, -2).t().matmul(x.flatten(0, -2))
        return dx, dw, None


def matching(region: RegionConfig, names: list[str]) -> RegionConfig:
    """The region config with those of its patterns that match."""
    if region.kind == "whole":
        return region
    modules = tuple(
        pattern
        for whole in region.modules
        for pattern in expand_braces(whole)
        if any(fnmatchcase(name, pattern) for name in names)
    )
    return dataclasses.replace(region, modules=modules)


def measured(model: Any, job: MemoryJob) -> dict[str, int]:
    """On tensors without data."""
    shape = (job.rows, job.row_length)
    other = "position_ids" if job.batching == "pack" else "attention_mask"
    with masks_of_fake_tensors(needed=job.needs_mask), simulated(model) as recorder:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(drop)
        before = recorder.live_bytes
        recorder.peak_bytes = before
        batch = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels", other)}
        loss = nll_at(model, batch, torch.arange(job.logit_rows // job.rows), chunk=job.loss_chunk)
        del batch
        kept, forward = recorder.live_bytes, recorder.peak_bytes
        recorder.peak_bytes = kept
        loss.backward()
        backward = recorder.peak_bytes
    return {"kept": kept - before, "forward": forward - before, "backward": backward - before}


def drop(parameter: torch.Tensor) -> None:
    """Of a parameter whose gradient has been formed."""
    parameter.grad = None


def forecast(moments: list[Moment]) -> dict[str, int]:
    """By the closed form."""
    peaks = {
        phase: max(moment.num_bytes() for moment in moments if moment.phase == phase)
        for phase in ("forward", "backward")
    }
    loss = next(moment for moment in moments if moment.phase == "backward" and moment.name == "loss")
    kept = sum(term.num_bytes for term in loss.terms if term.kind in ("activations", "logits"))
    return {"kept": kept, **peaks}


def job(**changes: Any) -> MemoryJob:
    return MemoryJob(**{"micro_batch": 2, "length": 96, "label_positions": 4, "lora_rank": 4, **changes})


CASES = [
    ("llama", "blocks", job()),
    ("llama", "rows", job(precision="fp32")),
    ("llama", "columns", job(label_positions=None)),
    ("llama", "many", job(placement="delta", precision="fp32")),
    ("llama", "small", job(placement="delta", precision="fp32")),
    ("llama", "small", job()),
    ("llama", "top", job()),
    ("llama", "upper", job(gradient_checkpointing=True, length=400)),
    ("llama", "upper", job(gradient_checkpointing=True, precision="fp32")),
    ("llama", "mixed", job(gradient_checkpointing=True)),
    ("llama", "rows", job(gradient_checkpointing=True, precision="fp32", micro_batch=1)),
    ("llama", "blocks", job(micro_batch=1)),
    ("llama", "blocks", job(batching="pack", micro_batch=3, length=40)),
    ("llama", "rows", job(attention="eager")),
    ("llama", "blocks", job(attention="eager", gradient_checkpointing=True)),
    ("llama", "", job(method="full")),
    ("llama", "", job(method="full", gradient_checkpointing=True)),
    ("llama", "", job(method="lora")),
    ("llama", "", job(method="lora", stage=3)),
    ("llama", "", job(method="dora")),
    ("llama", "", job(method="dora", stage=3, gradient_checkpointing=True)),
    ("llama", "", job(method="dora", gradient_checkpointing=True, length=400)),
    ("llama", "", job(method="lora", stage=3, gradient_checkpointing=True, length=400)),
    ("llama", "vectors", job()),
    ("llama", "embedding", job()),
    ("mistral", "blocks", job(micro_batch=1)),
    *(
        ("llama", recipe, job(label_positions=None, loss_chunk=16, length=48, precision=precision, **more))
        for precision in ("fp32", "bf16")
        for recipe, more in (
            ("blocks", {}),
            ("rows", {"gradient_checkpointing": True}),
            ("head", {}),
            ("head only", {"micro_batch": 1}),
            ("", {"method": "lora", "stage": 3}),
        )
    ),
    ("qwen2", "columns", job(label_positions=None, loss_chunk=40)),
    ("bloom", "rows", job(label_positions=None, loss_chunk=16)),
    ("llama", "", job(label_positions=None, loss_chunk=16, method="full")),
    ("qwen2", "rows", job()),
    ("qwen3", "blocks", job()),
    ("mixtral", "blocks", job()),
    ("mixtral", "experts", job(placement="delta")),
    ("mixtral", "", job(method="full")),
    ("mixtral", "", job(method="lora", stage=3, lora_targets=("q_proj", "v_proj"))),
    ("qwen3_moe", "blocks", job(gradient_checkpointing=True)),
    ("bloom", "rows", job()),
    ("bloom", "blocks", job(gradient_checkpointing=True, length=48)),
]
MORE_CASES = [
    (family, recipe, job(precision=precision, gradient_checkpointing=checkpointing, micro_batch=micro_batch))
    for family in ("llama", "mistral", "qwen2", "qwen3", "bloom")
    for recipe in ("blocks", "rows", "columns", "many")
    for precision in ("fp32", "bf16")
    for checkpointing in (False, True)
    for micro_batch in (1, 3)
]


def name_of(case: Any) -> str:
    return case if isinstance(case, str) else f"{case.method}-{case.precision}-{case.gradient_checkpointing}"


# Of transformers, which PEFT asks.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("family", "recipe", "job"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)],
    ids=name_of,
)
def test_the_closed_form_holds_what_the_code_holds(family: str, recipe: str, job: MemoryJob) -> None:
    expected, found = held(family, recipe, job)
    assert found["kept"] == pytest.approx(expected["kept"], rel=0.01)
    assert found["forward"] == pytest.approx(expected["forward"], rel=0.01)
    assert found["backward"] == pytest.approx(expected["backward"], rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 192}, {"intermediate_size": 1000}, {"num_key_value_heads": 1}, {"num_hidden_layers": 5},
        {"num_attention_heads": 8, "num_key_value_heads": 8}, {"vocab_size": 9000, "hidden_size": 64},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("length", [33, 400])
def test_no_size_enters_by_way_of_another(changes: dict[str, int], length: int) -> None:
    expected, found = held("llama", "mixed", job(length=length), **changes)
    assert found == pytest.approx(expected, rel=0.01)
