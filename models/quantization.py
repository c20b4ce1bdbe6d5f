"""How does a base come in 4 or 8 bits, and what must hold for that?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from sparse_zero.errors import InputError
from sparse_zero.optional import require

if TYPE_CHECKING:
    import torch
    from torch import nn

Quantized = Literal["none", "nf4", "int8"]
QUANTIZATIONS: tuple[Quantized, ...] = get_args(Quantized)


def check_quantization(quantization: str, double_quantization: bool, gguf_file: str | None) -> None:
    """Raise unless the settings agree with each other.

    Raises:
        InputError: an unknown form, constants to be quantized that there are none of, or a source that is refused.
    """
    if quantization not in QUANTIZATIONS:
        raise InputError(f"model.quantization is {quantization!r}: use one of {', '.join(QUANTIZATIONS)}")
    if double_quantization and quantization != "nf4":
        raise InputError(
            f"model.double_quantization is true with model.quantization {quantization!r}, whose constants are not "
            "quantized: use nf4, or set it to false"
        )
    if quantization != "none" and gguf_file is not None:
        raise InputError(
            f"model.quantization is {quantization!r} with model.gguf_file {gguf_file!r}, whose weights are rounded "
            "already: name a model in safetensors, or set model.quantization to none"
        )


def need_package(quantization: Quantized) -> None:
    """Raise unless what quantizes is installed.

    Raises:
        InputError: names the extra.
    """
    if quantization != "none":
        purpose = f"load the base in {quantization} (model.quantization)"
        require("bitsandbytes", extra="quant", purpose=purpose)


def loading_options(
    quantization: Quantized, double_quantization: bool, dtype: torch.dtype, device: str | torch.device
) -> dict[str, Any]:
    """What ``from_pretrained`` is to be told; nothing for a base that is not quantized.

    Linears are quantized one by one as their weights are read, on ``device``; the embedding, the head and what is tied
    to it stay as they are (transformers' choice).
    """
    from transformers import BitsAndBytesConfig

    if quantization == "none":
        return {}
    if quantization == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=double_quantization,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    # Without a map, transformers takes the first GPU if there is one.
    return {"quantization_config": config, "device_map": {"": device}}


def adopt_quantized(model: nn.Module) -> None:
    """Have every quantized linear of ``model`` compute ``x @ W.T`` of the dense form of its weight, whatever is done
    with the model: it is evaluated, calibrated, trained and merged as one and the same function.

    Raises:
        InputError: nothing in the model was quantized.
    """
    from sparse_zero.layers.quantized_linear import adopt

    if not adopt(model):
        raise InputError(
            "model.quantization found no linear to quantize in this model: set it to none, or name another model"
        )
