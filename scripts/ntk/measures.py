"""How close are two kernels, and how well does one classify?

Legend: N training samples, M test samples, C classes. Kernels are fp64: K[N, N] of the training samples, and of the
test samples against them, [M, N].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Ridge terms that are tried, over the mean of the kernel's diagonal.
RIDGES: Sequence[float] = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 5))


def relative_distance(restricted: Tensor, full: Tensor, p: float) -> float:
    """‖K_S - K‖_p / ‖K‖_p with the norms over entries, without any scaling.

    A kernel of few parameters is a small part of the sum that the full one is, so that this is near 1 whatever its
    form.
    """
    return float((restricted - full).norm(p) / full.norm(p))


def scaled_distance(restricted: Tensor, full: Tensor) -> float:
    """min over c of ‖c K_S - K‖_F / ‖K‖_F: the distance when the scale, which a learning rate takes up, is left out.

    It is sqrt(1 - alignment²); 0 for equal forms, 1 for a kernel without common form.
    """
    return max(0.0, 1.0 - alignment(restricted, full) ** 2) ** 0.5


def trace_distance(restricted: Tensor, full: Tensor) -> float:
    """‖K_S / tr(K_S) - K / tr(K)‖_F over ‖K / tr(K)‖_F."""
    trace = restricted.trace()
    if not trace:
        return 1.0
    return relative_distance(restricted / trace, full / full.trace(), 2)


def alignment(restricted: Tensor, full: Tensor) -> float:
    """The cosine between two kernels as vectors, <K_S, K> / (‖K_S‖ ‖K‖); 0 if one of them is 0."""
    norms = restricted.norm() * full.norm()
    return float((restricted * full).sum() / norms) if norms else 0.0


def centred_alignment(restricted: Tensor, full: Tensor) -> float:
    """The cosine after both have lost their mean over samples (CKA): what all samples have in common does not count."""
    return alignment(_centred(restricted), _centred(full))


def _centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


@dataclass(frozen=True, kw_only=True)
class RidgeFit:
    """Kernel ridge regression on centred one-hot labels."""

    # [N, C]: scores of classes are K[M, N] @ weights + offset.
    weights: Tensor
    # [C]
    offset: Tensor
    # The ridge term over the mean of the diagonal.
    ridge: float
    # Mean squared error of leave-one-out.
    loo_error: float

    def predict(self, kernel: Tensor) -> Tensor:
        """[M] class numbers for a kernel [M, N]."""
        return (kernel @ self.weights + self.offset).argmax(1)


def ridge_fit(kernel: Tensor, labels: Tensor, num_classes: int) -> RidgeFit:
    """Fit with the ridge term of :data:`RIDGES` that has the least leave-one-out error on the training samples.

    With w = (K + r I)^-1 y, the residual of a sample that was left out is w_i / ((K + r I)^-1)_ii.

    Args:
        kernel: [N, N], symmetric.
        labels: [N] class numbers.
        num_classes: C.
    """
    targets = torch.nn.functional.one_hot(labels, num_classes).double()
    offset = targets.mean(0)
    targets = targets - offset
    values, vectors = torch.linalg.eigh(kernel.double())
    # Rounding leaves eigenvalues of -1e-16 of the largest.
    values = values.clamp(min=0.0)
    scale = float(kernel.diagonal().mean()) or 1.0
    found: RidgeFit | None = None
    for ridge in RIDGES:
        inverse = 1.0 / (values + ridge * scale)
        weights = (vectors * inverse) @ (vectors.T @ targets)
        residuals = weights / ((vectors**2) @ inverse).unsqueeze(1)
        error = float(residuals.square().mean())
        if found is None or error < found.loo_error:
            found = RidgeFit(weights=weights, offset=offset, ridge=ridge, loo_error=error)
    assert found is not None
    return found
