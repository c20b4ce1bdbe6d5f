"""Which linears of a model are quantized, and what do they store, without its weights?

transformers puts the linears of bitsandbytes into a model, and bitsandbytes quantizes their weights: both on the meta
device, where a tensor has a shape and a dtype and nothing in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from models.compat import put_quantized_linears
from models.quantization import Quantized, loading_options, need_package

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def quantize_shapes(
    model: PreTrainedModel, quantization: Quantized, double_quantization: bool, dtype: torch.dtype
) -> None:
    """Have in ``model``, which is on the meta device, what ``from_pretrained`` quantizes, as it is after loading.

    Args:
        model: dense; changed in place.
        quantization: see :class:`models.loading.ModelConfig`.
        double_quantization: of the constants of nf4.
        dtype: of the dense weights, and of what is computed.

    Raises:
        InputError: bitsandbytes is missing.
    """
    need_package(quantization)
    options = loading_options(quantization, double_quantization, dtype, "cpu")
    if not options:
        return
    put_quantized_linears(model, options["quantization_config"])
    import bitsandbytes
    import torch

    # bitsandbytes remembers a table by its first use, which is without numbers here.
    with patch.dict(bitsandbytes.functional.name2qmap):
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                _store_four_bits(module, dtype)
            elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
                _store_eight_bits(module)
            else:
                continue
            if module.bias is not None:
                module.bias = torch.nn.Parameter(module.bias.to(dtype), requires_grad=False)


def _store_four_bits(module: Any, dtype: torch.dtype) -> None:
    import bitsandbytes
    import torch

    weight = module.weight
    codes, state = bitsandbytes.functional.quantize_4bit(
        torch.empty(module.out_features, module.in_features, dtype=dtype, device="meta"),
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )
    module.weight = bitsandbytes.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state


def _store_eight_bits(module: Any) -> None:
    import bitsandbytes
    import torch

    codes = torch.empty(module.out_features, module.in_features, dtype=torch.int8, device="meta")
    scales = torch.empty(module.out_features, dtype=torch.float32, device="meta")
    module.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, SCB=scales)
