"""What do Triton's kernels give, and plain torch? In a process of its own: Triton reads the environment once.

    python -m tests.sparse_zero.triton_worker interpret     in its interpreter, on the host
    python -m tests.sparse_zero.triton_worker compile       for GPUs that need not be there

Prints one line of JSON for each case.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Tokens, (out, in), (height, width), blocks: ragged edges, tokens and sides that tiles do not divide, shared strips.
SHAPES: dict[str, tuple[int, tuple[int, int], tuple[int, int], list[list[int]]]] = {
    "even": (64, (64, 96), (32, 32), [[0, 0], [1, 2]]),
    "shared strips": (50, (64, 96), (32, 32), [[0, 1], [0, 2], [1, 1], [1, 2]]),
    "ragged edges": (37, (70, 83), (32, 16), [[0, 5], [2, 0], [2, 5]]),
    "small": (5, (9, 7), (3, 2), [[0, 0], [0, 3], [2, 1], [2, 3]]),
    "wide": (33, (40, 200), (40, 100), [[0, 1]]),
    "no tokens": (0, (64, 96), (32, 32), [[0, 0], [1, 2]]),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _layer(shape: tuple[int, int], sides: tuple[int, int], blocks: list[list[int]], keep_input: bool) -> Any:
    from sparse_zero.layers.sparse_linear import SparseLinear
    from sparse_zero.selection.regions import WeightSelection

    torch.manual_seed(0)
    selection = WeightSelection(shape=shape, block_size=sides, blocks=blocks)
    linear = torch.nn.Linear(shape[1], shape[0])
    layer = SparseLinear(linear, selection, "delta", keep_input=keep_input)
    for values in layer.values().values():
        torch.nn.init.normal_(values)
    return layer


def _errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference over the largest number."""
    return {
        name: float((found[name].double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
        if wanted.numel()
        else float(found[name].shape != wanted.shape)
        for name, wanted in expected.items()
    }


def _step(layer: Any, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_(True)
    y = layer(x)
    (y * upstream).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, "values": layer.values_block.grad}


def interpret() -> None:
    """A sparse linear under delta, with Triton's kernels and, in fp64, with plain ones."""
    from sparse_zero.layers import kernels, triton_kernels

    launches: list[str] = []

    def counted(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            launches.append(kernel.__name__)
            return kernel(*args, **more)

        return call

    for name in ("block_gradients", "add_block_products"):
        setattr(triton_kernels, name, counted(getattr(triton_kernels, name)))
    for case, (num_tokens, shape, sides, blocks) in SHAPES.items():
        for keep_input in (False, True):
            layer = _layer(shape, sides, blocks, keep_input)
            for dtype_name, dtype in DTYPES.items():
                layer.to(dtype)
                x, upstream = torch.randn(num_tokens, shape[1]).to(dtype), torch.randn(num_tokens, shape[0]).to(dtype)
                launches.clear()
                kernels.set_kernels("triton")
                found = _step(layer, x, upstream)
                kernels.set_kernels("plain")
                ran = list(launches)
                expected = _step(layer.double(), x.double(), upstream.double())
                line = {"case": case, "dtype": dtype_name, "keep_input": keep_input, "launches": ran}
                print(json.dumps({**line, "errors": _errors(found, expected)}), flush=True)


def compile_for_gpus() -> None:
    """Each kernel in every configuration, as far as the assembler for GPUs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sparse_zero.layers import triton_kernels

    pointers = {
        "gradient_kernel": {
            "dy": "*",
            "x": "*",
            "gradients": "*",
            "rows": "*i64",
            "columns": "*i64",
            "x_strips": "*i64",
        },
        "add_kernel": {"target": "*", "source": "*", "blocks": "*", "target_strips": "*i64", "source_strips": "*i64"},
    }
    for name, given in pointers.items():
        function = getattr(triton_kernels, name).fn
        for dtype in ("fp32", "bf16", "fp16"):
            for config in triton_kernels.CONFIGS:
                constants = {**config.kwargs, "PRECISION": "ieee", "WIDENS": False}
                signature = {
                    argument: "constexpr"
                    if argument in constants
                    else given.get(argument, "i32").replace("*", f"*{dtype}" if given.get(argument) == "*" else "*")
                    for argument in function.arg_names
                }
                if "in_features" in signature:
                    signature["in_features"] = "i64"
                made = triton.compile(
                    ASTSource(function, signature, {(function.arg_names.index(k),): v for k, v in constants.items()}),
                    target=GPUTarget("cuda", 80, 32),
                    options={"num_warps": config.num_warps, "num_stages": config.num_stages},
                )
                line = {"kernel": name, "dtype": dtype, "config": str(config), "shared_bytes": made.metadata.shared}
                print(
                    json.dumps({**line, "ptx": "mma" in made.asm["ptx"], "cubin": len(made.asm["cubin"])}), flush=True
                )


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_for_gpus}[sys.argv[1]]()
