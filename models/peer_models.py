"""How does a model become one that full fine-tuning, LoRA or DoRA trains, to compare with?

The adapters are PEFT's own, so that what is told of their memory is told of the code that people run.
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


def make_peer(model: nn.Module, method: Peer, *, rank: int, targets: Sequence[str]) -> nn.Module:
    """Freeze and add what ``method`` asks for.

    Args:
        model: dense or quantized, with data or without; changed in place.
        method: full: every parameter requires grad. lora, dora: PEFT's adapters, which it leaves in fp32 where the
            model is in 16 bits, without dropout; an engine for 16 bits casts them to its own.
        rank: of the adapters.
        targets: last components of the names of the linears that have adapters.

    Returns:
        ``model`` with its adapters; it computes what the model does.

    Raises:
        InputError: a target that the model has no module of, or PEFT is missing.
    """
    if method == "full":
        return model.requires_grad_(True)
    peft: Any = require("peft", extra="peft", purpose=f"make a model with adapters ({method})")
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for target in targets:
        if target not in names:
            linears = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "in_features")})
            raise InputError(
                f"lora_targets has {target!r}, and the model has no such module: its linears are {', '.join(linears)}"
            )
    settings = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(targets), use_dora=method == "dora", task_type="CAUSAL_LM"
    )
    # The model itself holds the adapters' layers then; PEFT's own wrapper only passes calls on to it.
    with _codes_are_read_only(), warnings.catch_warnings():
        # Asked by PEFT under its older name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        peft.get_peft_model(model, settings)
    return model


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
