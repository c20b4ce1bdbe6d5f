"""What does ``model.save_pretrained`` do while the model is sparse? It refuses, and names what to call instead.

It would write the frozen base with the values apart from it: a folder that loads as a model, without what was trained.
"""

import types
from pathlib import Path
from typing import Any

from torch import nn

from sparse_zero.errors import InputError
from sparse_zero.layers.carriers import carriers


def _save_pretrained(model: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
    """``model.save_pretrained``: of a dense model what it was."""
    if any(True for _ in carriers(model)):
        raise InputError(
            f"save_pretrained({str(save_directory)!r}) would store the base without what was trained: "
            "sz.save_adapter(engine_or_model, folder) writes an adapter, and after sz.merge(model) a plain model is "
            "saved"
        )
    return type(model).save_pretrained(model, save_directory, *args, **kwargs)


def refuse_save_pretrained(model: nn.Module) -> None:
    """Let ``model.save_pretrained`` raise :class:`InputError` until :func:`sparse_zero.merge`."""
    if hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = types.MethodType(_save_pretrained, model)
