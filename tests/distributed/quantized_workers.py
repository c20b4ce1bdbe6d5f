"""What the spawned ranks do in the tests of quantized bases."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparse_zero as sz
from scripts.dense_reference import adamw_on_entries
from sparse_zero.errors import InputError
from sparse_zero.layers.quantized import quantization_of
from sparse_zero.layers.sparsify import trainable_parameters
from sparse_zero.zero.compat import make_plain
from sparse_zero.zero.state import read_masters
from tests.distributed.workers import (
    CLIP,
    DECAY,
    GLOBAL_BATCH,
    LEARNING_RATE,
    make_batches,
    make_engine,
    make_model,
    train,
    train_whole,
)
from tests.sparse_zero.helpers import mixed_selection, owner_matrix, tiny_loss
from tests.sparse_zero.quantizing import dequantized, quantize, stored_bytes


def quantized_model(form: str, bf16: bool = False) -> Any:
    """The tiny model of the other tests, its projections quantized."""
    model = make_model(bf16)
    quantize(model, form)
    return model


def without_values(stored: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in stored.items() if "values" not in name}


def dense_losses(form: str, steps: int, bf16: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """AdamW on the dense form of the quantized model, in one process, and none of the library."""
    model = quantized_model(form, bf16)
    dequantized(model)
    masks = {name: owner_matrix(weight) > 0 for name, weight in mixed_selection(make_model()).weights.items()}
    return adamw_on_entries(
        model, masks, tiny_loss, make_batches(steps), "delta", learning_rate=LEARNING_RATE, decay=DECAY, clip=CLIP
    )


def like_the_dense_form(steps: int) -> list[dict[str, Any]]:
    """Stages and forms against the dense reference, and what is stored, bit for bit."""
    report = []
    world_size = dist.get_world_size()
    for stage, form, accumulation, checkpointing in (
        (0, "nf4", 1, False),
        (1, "int8", 4, False),
        (2, "nf4-double", 1, True),
        (2, "int8", 1, False),
        (3, "nf4-double", 1, True),
    ):
        expected, weights = dense_losses(form, steps)
        model = quantized_model(form)
        model.checkpointing = checkpointing
        sz.sparsify(model, mixed_selection(make_model()), "delta")
        before = without_values(stored_bytes(model))
        micro_batch = GLOBAL_BATCH // (world_size * accumulation)
        engine = make_engine(model, stage, micro_batch, accumulation)
        losses = train(engine, make_batches(steps), micro_batch, accumulation)
        if stage == 3:
            refused = ""
            try:
                sz.merge(model)
            except InputError as error:
                refused = str(error)
            assert "sharded by ZeRO-3" in refused, refused
            model = make_plain(engine)
        after = without_values(stored_bytes(model))
        undo = sz.merge(model)
        found = {name: model.get_parameter(name).detach() for name in undo.selection.weights}
        untrained = quantized_model(form)
        dequantized(untrained)
        report.append(
            {
                "combination": [stage, form, accumulation, checkpointing],
                "loss_difference": max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)),
                "weight_difference": max(float((found[name] - weights[name]).abs().max()) for name in found),
                "effect_of_training": abs(expected[-1] - tiny_loss(untrained, make_batches(steps)[-1]).item()),
                "unchanged": after == before,
            }
        )
        if stage < 3:
            engine.destroy()
    return report


def precisions(steps: int) -> list[dict[str, Any]]:
    """A bf16 base under a bf16 engine (bf16 values, fp32 masters), and under an fp32 one with fp32 values."""
    report = []
    for form, values_dtype, bf16_engine in (
        ("nf4-double", None, True),
        ("int8", torch.float32, True),
        ("nf4", torch.float32, False),
    ):
        expected, _ = dense_losses(form, steps, bf16=True)
        model = quantized_model(form, bf16=True)
        sz.sparsify(model, mixed_selection(make_model()), "delta", values_dtype=values_dtype)
        before = without_values(stored_bytes(model))
        engine = make_engine(model, 2, GLOBAL_BATCH // dist.get_world_size(), 1, bf16=bf16_engine)
        losses = train_whole(engine, make_batches(steps))
        masters, values = read_masters(engine), trainable_parameters(model)
        report.append(
            {
                "loss_difference": max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)),
                "effect_of_training": abs(losses[-1] - losses[0]),
                "values_dtypes": sorted({str(each.dtype) for each in values.values()}),
                "masters_rounded": max(
                    float((master - values[name].detach().float()).abs().max()) for name, master in masters.items()
                ),
                "unchanged": without_values(stored_bytes(model)) == before,
            }
        )
        engine.destroy()
    return report


def continued_and_reselected(folder: str) -> dict[str, Any]:
    """A checkpoint continues bit for bit; a re-selection reads what acts, and what it drops acts on."""
    path = Path(folder)
    report: dict[str, Any] = {}

    def new_engine(model: nn.Module) -> Any:
        return make_engine(model, 2, GLOBAL_BATCH // dist.get_world_size(), 1)

    def new_model() -> Any:
        model = quantized_model("nf4-double")
        sz.sparsify(model, mixed_selection(make_model()), "delta")
        return model

    batches = make_batches(6)
    engine = new_engine(new_model())
    train_whole(engine, batches[:2])
    sz.save_checkpoint(engine, path / "checkpoint")
    uninterrupted = train_whole(engine, batches[2:4])
    engine.destroy()
    engine = new_engine(new_model())
    sz.load_checkpoint(engine, path / "checkpoint")
    report["continued"] = train_whole(engine, batches[2:4]) == uninterrupted

    model = engine.module
    before = without_values(stored_bytes(model))
    sz.save_adapter(engine, path / "adapter")
    merged = quantized_model("nf4-double")
    sz.load_adapter(merged, path / "adapter", placement="delta")
    sz.merge(merged)
    regions = (sz.RegionConfig(kind="row", modules=("layers.2.*_proj",)),)
    config = sz.SelectionConfig(
        regions=regions,
        score="gradient_times_weight",
        budget=sz.BudgetConfig(parameters=200),
        reselect=sz.ReselectConfig(every=1),
    )
    data = list(batches[:3])
    engine, found = sz.reselect(engine, data, config, make_engine=new_engine, loss_fn=tiny_loss, step=4)
    assert found.scores is not None, found.problem
    expected = sz.score_regions(merged, data, sz.config_at(config, 4), tiny_loss)
    differences = [
        float(((found.scores.scores[key] - scores).abs() / scores.abs().max()).max())
        for key, scores in expected.scores.items()
    ]
    report["score_difference"] = max(differences)
    report["changed"], report["dropped"] = found.changed, found.entries.dropped
    with torch.no_grad():
        report["output_difference"] = float((model(batches[0]) - merged(batches[0])).abs().max())
    train_whole(engine, batches[4:])
    report["unchanged"] = without_values(stored_bytes(model)) == before
    trained = model(batches[0]).detach()
    sz.merge(model)
    report["merged_difference"] = float((model(batches[0]) - trained).abs().max())
    engine.destroy()
    return report


def differing_constants() -> str:
    """What is said where the constants of one rank are others: no broadcast would repair that."""
    model = quantized_model("nf4")
    sz.sparsify(model, mixed_selection(make_model()), "delta")
    if dist.get_rank() == 1:
        quantization_of(model, "layers.0.self_attn.v_proj.weight").constants()[0][0] += 1e-3
    try:
        make_engine(model, 2, 4, 1)
    except RuntimeError as error:
        return str(error)
    return ""


def everything(folder: str) -> dict[str, Any]:
    return {
        "differing": differing_constants(),
        "dense": like_the_dense_form(5),
        "precisions": precisions(5),
        "continued": continued_and_reselected(folder),
    }
