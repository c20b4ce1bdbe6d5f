"""How many floating-point operations a second can a device do at most, by what its maker says?

Dense products, accumulated in fp32, in TFLOP/s; sparsity, which data sheets like to count, is taken out. From NVIDIA's
data sheets of B200 (HGX), GH200, H200, H100, A100, A40, A30, A10, L40S, L40, L4, V100 and T4, its white papers on GA102
and Ada for GeForce and RTX, and AMD's data sheet of MI300X. An MFU divides by these, reached or not.
"""

import re
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]

# Words of a device's name that do not tell its speed: makers, brands, memory, and sockets where all have one speed.
_NOISE = re.compile(r"nvidia|tesla|geforce|amd|instinct|rtx|hgx|\d+gb|hbm\w+|sxm\d?|oam")
# By the words that are left: (bf16, fp16, fp32 as TF32, fp32), None where no core knows it.
_TERAFLOPS: dict[frozenset[str], tuple[float | None, float, float | None, float]] = {
    frozenset(name.split()): peaks
    for name, peaks in {
        "b200": (2250.0, 2250.0, 1125.0, 75.0),
        "gh200": (989.4, 989.4, 494.7, 66.9),
        "h200": (989.4, 989.4, 494.7, 66.9),
        "h100": (989.4, 989.4, 494.7, 66.9),
        "h100 nvl": (835.5, 835.5, 417.5, 60.0),
        "h100 pcie": (756.0, 756.0, 378.0, 51.2),
        "a100": (312.0, 312.0, 156.0, 19.5),
        "a100 pcie": (312.0, 312.0, 156.0, 19.5),
        "a40": (149.7, 149.7, 74.8, 37.4),
        "a30": (165.0, 165.0, 82.0, 10.3),
        "a10": (125.0, 125.0, 62.5, 31.2),
        "a6000": (154.8, 154.8, 77.4, 38.7),
        "l40s": (362.1, 362.1, 183.0, 91.6),
        "l40": (181.1, 181.1, 90.5, 90.5),
        "l4": (121.0, 121.0, 60.0, 30.3),
        "v100": (None, 125.0, None, 15.7),
        "v100 pcie": (None, 112.0, None, 14.0),
        "t4": (None, 65.0, None, 8.1),
        "4090": (165.2, 165.2, 82.6, 82.6),
        "3090": (71.0, 71.0, 35.6, 35.6),
        "mi300x": (1307.4, 1307.4, 653.7, 163.4),
    }.items()
}


def peak_flops_per_second(device_name: str, precision: Precision, *, tf32: bool) -> float | None:
    """What a device can do at most; None if it is not known, as of a part of a device or of a laptop's.

    Args:
        device_name: as ``torch.cuda.get_device_name`` says: "NVIDIA A100-SXM4-80GB".
        precision: of the products.
        tf32: whether fp32 products may be computed as TF32.
    """
    words = frozenset(word for word in re.split(r"[^a-z0-9]+", device_name.lower()) if word)
    found = _TERAFLOPS.get(frozenset(word for word in words if not _NOISE.fullmatch(word)))
    if found is None:
        return None
    bf16, fp16, as_tf32, fp32 = found
    in_fp32 = as_tf32 if tf32 and as_tf32 is not None else fp32
    peak = {"bf16": bf16, "fp16": fp16, "fp32": in_fp32}[precision]
    return None if peak is None else peak * 1e12
