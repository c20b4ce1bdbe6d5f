"""What does a Trainer store of a sparsified model, and what does it read again? The values, never the frozen base.

A ``Trainer`` saves ``model.state_dict()`` at each checkpoint, and DeepSpeed the same once more. Both would hold the
whole base, and a folder that loads as a model: with the values still apart from the weights under delta.
"""

import re
import types
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_zero.files import write_safetensors
from sparse_zero.layers.carriers import carriers, values_name

_MARK = "_sparse_zero_stores_values"
# The name under which a Trainer without DeepSpeed looks for what it stored.
FILE_NAME = "model.safetensors"


class ValuesOnlyWarning(UserWarning):
    """A folder was asked for a model and got its values only; the message says how to store all of it."""


def _value_names(model: nn.Module) -> set[str]:
    """State-dict keys of the values; none of a dense model."""
    return {values_name(name, kind) for name, carrier in carriers(model) for kind in carrier.values()}


def _drop_base(model: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Hook after ``model.state_dict()``: values and buffers stay, weights and what belongs to quantized ones go."""
    if values := _value_names(model):
        kept = {prefix + name for name in values | {name for name, _ in model.named_buffers()}}
        for name in [name for name in state_dict if name not in kept]:
            del state_dict[name]


def _expect_values_only(model: nn.Module, incompatible_keys: Any) -> None:
    """Hook after ``model.load_state_dict()``: only values can be missing."""
    if values := _value_names(model):
        incompatible_keys.missing_keys[:] = [name for name in incompatible_keys.missing_keys if name in values]


def _save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """``model.save_pretrained`` while the model is sparse: no config, so that nobody takes the folder for a model."""
    if not (names := _value_names(model)):
        type(model).save_pretrained(
            model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
        )
        return
    if not is_main_process:
        return
    folder = Path(save_directory)
    if re.fullmatch(r"checkpoint-\d+", folder.name) is None:
        warnings.warn(
            f"{folder} gets the trained values only: sz.save_adapter(engine_or_model, folder) writes an adapter, and "
            "after sz.merge(model) a plain model is saved",
            ValuesOnlyWarning,
            stacklevel=2,
        )
    found = model.state_dict() if state_dict is None else state_dict
    values = {name: found[name] for name in sorted(names) if name in found}
    if values:  # Stage 3 does not gather them, unless its config asks for it: the engine's own files have them then.
        write_safetensors(folder / FILE_NAME, values, {"format": "pt"})


def store_values_only(model: nn.Module) -> None:
    """Let ``state_dict()``, ``load_state_dict()`` and ``save_pretrained()`` of ``model`` be about its values only.

    Once more does nothing. After :func:`sparse_zero.merge` the model is dense, and all three are what they were.
    """
    if getattr(model, _MARK, False):
        return
    setattr(model, _MARK, True)
    model.register_state_dict_post_hook(_drop_base)
    model.register_load_state_dict_post_hook(_expect_values_only)
    if hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = types.MethodType(_save_pretrained, model)
