"""How does a model become one that full fine-tuning or a method of PEFT trains, to compare with?

The adapters are PEFT's own, so that what is told of their accuracy, memory and time is told of the code that people
run.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

from sparse_zero.errors import InputError
from sparse_zero.optional import require

if TYPE_CHECKING:
    from torch import nn

Peer = Literal["full", "lora", "dora"]
Adapter = Literal["lora", "dora", "rslora", "shira", "trainable_tokens"]


def make_peer(model: nn.Module, method: Peer, *, rank: int, targets: Sequence[str]) -> nn.Module:
    """Freeze and add what ``method`` asks for.

    Args:
        model: dense or quantized, with data or without; changed in place.
        method: full: every parameter requires grad. lora, dora: see :func:`add_adapters`.
        rank: of the adapters.
        targets: last components of the names of the linears that have adapters.

    Returns:
        ``model`` with its adapters; it computes what the model does.

    Raises:
        InputError: a target that the model has no module of, or PEFT is missing.
    """
    if method == "full":
        return model.requires_grad_(True)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for target in targets:
        if target not in names:
            linears = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "in_features")})
            raise InputError(
                f"lora_targets has {target!r}, and the model has no such module: its linears are {', '.join(linears)}"
            )
    # The model itself holds the adapters' layers then; PEFT's own wrapper only passes calls on to it.
    add_adapters(model, method, rank=rank, targets=targets)
    return model


def add_adapters(
    model: nn.Module,
    method: Adapter,
    *,
    rank: int = 0,
    targets: Sequence[str],
    alpha_over_rank: float = 2.0,
    tokens: Sequence[int] = (),
    whole: Sequence[str] = (),
    seed: int | None = None,
) -> Any:
    """Freeze a model, and add adapters that PEFT leaves in fp32 where it is in 16 bits; without dropout.

    Args:
        model: dense or quantized, with data or without; changed in place.
        method: of PEFT. rslora: LoRA whose product is scaled by alpha / sqrt(rank). shira: r (in + out) random entries
            of every matrix. trainable_tokens: rows of the embedding, and of a head that is tied to it.
        rank: of the adapters; SHiRA's r. trainable_tokens has none.
        targets: names of the linears that have adapters, or their last components; of trainable_tokens the embedding.
        alpha_over_rank: lora_alpha as a multiple of the rank, of the three LoRAs.
        tokens: trainable_tokens: which rows.
        whole: names of modules that are trained as a whole, beside the adapters (PEFT's modules_to_save, which
            trainable_tokens does not have).
        seed: of SHiRA's entries; None: others each time. What else is drawn comes from torch's stream.

    Returns:
        PEFT's wrapper, which saves and merges the adapters; the layers of ``model`` itself have been replaced.

    Raises:
        InputError: PEFT is missing.
    """
    peft: Any = require("peft", extra="peft", purpose=f"make a model with adapters ({method})")
    common: dict[str, Any] = {"target_modules": list(targets)}
    if hasattr(model, "prepare_inputs_for_generation"):
        common["task_type"] = "CAUSAL_LM"
    if method == "trainable_tokens":
        settings = peft.TrainableTokensConfig(token_indices=list(tokens), **common)
    elif method == "shira":
        settings = peft.ShiraConfig(r=rank, random_seed=seed, modules_to_save=list(whole) or None, **common)
    else:
        settings = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha_over_rank * rank,
            use_dora=method == "dora",
            use_rslora=method == "rslora",
            modules_to_save=list(whole) or None,
            **common,
        )
    with _codes_are_read_only(), warnings.catch_warnings():
        # Asked by PEFT under its older name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(model, settings)


@contextmanager
def _codes_are_read_only() -> Iterator[None]:
    """Let a quantized linear be copied with its codes: PEFT copies it to read them, which fails without data."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        yield
        return

    def same(codes: Any, memo: Any) -> Any:
        return codes

    with patch.object(bitsandbytes.nn.Params4bit, "__deepcopy__", same):
        yield
