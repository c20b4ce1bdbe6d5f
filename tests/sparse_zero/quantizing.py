"""How do the tests quantize a model, and what are its numbers by the formulas, without the library?"""

from typing import Any

import torch
from torch import Tensor, nn

FORMS = ("nf4", "nf4-double", "fp4", "int8")
# The sixteen numbers of NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantize_linear(linear: nn.Linear, form: str) -> Any:
    """The linear of bitsandbytes that transformers would put in the place of ``linear``."""
    import bitsandbytes

    has_bias = linear.bias is not None
    made: Any
    if form == "int8":
        made = bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=has_bias, has_fp16_weights=False, threshold=6.0
        )
    else:
        made = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=has_bias,
            quant_type=form.partition("-")[0],
            compress_statistics=form == "nf4-double",
            compute_dtype=linear.weight.dtype,
        )
    made = made.to(linear.weight.dtype)
    made.load_state_dict(linear.state_dict())
    made.to("cpu")
    made.weight.requires_grad_(False)
    return made


def quantize(model: nn.Module, form: str, ending: str = "_proj") -> None:
    """Quantize, in place, every linear whose name ends so."""
    for name, module in list(model.named_modules()):
        if name.endswith(ending) and isinstance(module, nn.Linear):
            model.set_submodule(name, quantize_linear(module, form))


def numbers_of(module: Any, dtype: torch.dtype) -> Tensor:
    """[out, in] of what the codes of a linear of bitsandbytes stand for, by the formulas, rounded to ``dtype``."""
    weight = module.weight
    shape = (module.out_features, module.in_features)
    if weight.dtype == torch.int8:
        scales = (weight.SCB if weight.SCB is not None else module.state.SCB).float()
        return (weight.data.float() * (scales / 127).unsqueeze(1)).to(dtype)
    state, data = weight.quant_state, weight.data.reshape(-1)
    codes = torch.stack([data >> 4, data & 15], 1).reshape(-1)[: shape[0] * shape[1]].long()
    constants = state.absmax
    if state.nested:
        inner = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(constants)]
        constants = state.state2.code[constants.long()] * inner + state.offset
    constants = constants.float().repeat_interleave(state.blocksize)[: len(codes)]
    table = torch.tensor(NF4) if state.quant_type == "nf4" else state.code.float()
    return (table[codes] * constants).reshape(shape).to(dtype)


def dequantized(model: nn.Module) -> None:
    """Make every linear of bitsandbytes a dense one, in place: the reference for everything else."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for name, module in list(model.named_modules()):
        if type(module).__module__.startswith("bitsandbytes") and isinstance(module, nn.Linear):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype)
            dense.weight.data = numbers_of(module, dtype)
            if module.bias is not None:
                dense.bias.data = module.bias.detach().clone()
            model.set_submodule(name, dense)


def stored_bytes(model: nn.Module) -> dict[str, bytes]:
    """What is stored of every parameter and of every constant of a quantized linear, by name."""
    found = {
        name: p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()
    }
    for name, module in model.named_modules():
        quantization = getattr(module, "quantization", None)
        if quantization is not None:
            for number, constant in enumerate(quantization.constants()):
                found[f"{name}.constant{number}"] = constant.cpu().numpy().tobytes()
    return found
