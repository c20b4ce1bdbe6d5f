"""Which parts of transformers that it does not document are relied on?

``tests/models/test_compat.py`` says what broke when a new version changes one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import BitsAndBytesConfig, PreTrainedModel


def transformers_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str] | None:
    """How transformers would call the tensors of a checkpoint in ``model``; None if it would also change their form.

    Its rules rename (a prefix, names of older versions), and for some models stack or split tensors, as with experts
    that lie apart in the checkpoint and in one parameter in the model.

    Args:
        model: of transformers, with or without its weights.
        names: in the checkpoint.

    Returns:
        From each name to that in the model, or to one that the model does not have.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    prefix, own = str(model.base_model_prefix), model.state_dict()
    found = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, converter = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed, converter = rename_source_key(name, [], [], prefix, own)
        if converter is not None:
            return None
        found[name] = renamed
    return found


def ignored_names(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Regular expressions of names that a checkpoint of ``model`` may lack, and that it may have beyond the model's."""
    missing = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
    unexpected = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    # Buffers that older versions saved with the weights.
    buffers = [name for name, _ in model.named_buffers()]
    unexpected += [
        pattern
        for pattern, ending in (
            (r"rotary_emb\.inv_freq", "rotary_emb.inv_freq"),
            (r"(^|\.)position_ids$", "position_ids"),
        )
        if any(name.endswith(ending) for name in buffers)
    ]
    return missing, unexpected


def unsaved_names(model: PreTrainedModel) -> frozenset[str]:
    """Names that transformers leaves out when it saves ``model``."""
    return frozenset(getattr(model, "_keys_to_ignore_on_save", None) or ())


def keeps_float32(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether transformers loads parts of ``model`` in float32 where the rest is in ``dtype``."""
    return bool(model._get_dtype_plan(dtype)) if hasattr(model, "_get_dtype_plan") else False


def saved_names(model: PreTrainedModel, described: Mapping[str, Tensor]) -> dict[str, str] | None:
    """How transformers calls the tensors of ``model`` when it saves them; None if it also changes their form.

    Args:
        model: of transformers.
        described: names and tensors of the model; the meta device will do.

    Returns:
        From each name in the files to that in the model, in the order of the files.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names = {id(tensor): name for name, tensor in described.items()}
    saved = revert_weight_conversion(model, dict(described))
    if len(saved) != len(names) or any(id(tensor) not in names for tensor in saved.values()):
        return None
    return {name: names[id(tensor)] for name, tensor in saved.items()}


def supports_sdpa(model: PreTrainedModel) -> bool:
    """Whether the code of the model's family can call torch's attention kernels."""
    return bool(getattr(model, "_supports_sdpa", False))


@contextmanager
def masks_of_fake_tensors(*, needed: bool = True) -> Iterator[None]:
    """Let transformers treat tensors without data as it treats those with data, where it decides on attention masks.

    It takes them for a compilation, and then makes a mask in any case.

    Args:
        needed: whether rows are padded, or hold several samples: then it makes a mask, where a padding mask or
            positions are given. Else it makes one only where it always does: by eager attention, and where a window
            is shorter than the rows.
    """
    from transformers import masking_utils

    def is_tracing(tensor: Tensor | None = None) -> bool:
        return needed and tensor is not None and not tensor.dtype.is_floating_point

    def is_all(mask: Tensor) -> bool:
        return not needed

    with patch.object(masking_utils, "is_tracing", is_tracing), patch.object(masking_utils, "fast_all", is_all):
        yield


def put_quantized_linears(model: PreTrainedModel, config: BitsAndBytesConfig) -> None:
    """Put the linears that ``config`` asks for into ``model`` on the meta device, as ``from_pretrained`` does.

    Their weights are still dense; what is not quantized (the head, what is tied to the embedding) is transformers'
    choice.
    """
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    quantizer.postprocess_model(model)
