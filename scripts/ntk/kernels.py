"""What are the neural tangent kernels of all parameters and of parts of them, from one pass of gradients?

K[i, j] is the sum over the function's outputs c and over the parameters of df_c(x_i)/dθ df_c(x_j)/dθ, for all samples i
against the training samples j, which come first.

Memory: factors of gradients take at most half of the bound, and the gradients that are formed from them, for some rows
of one matrix at a time, a quarter each with their gathered entries.

Sketch: the output side of a matrix is projected on ``a`` random directions of signs, so that the product of two
gradients G, H becomes the mean of a terms r.T G H.T r. Its variance is at most 2/a ‖G‖² ‖H‖² (each term has the
variance 2 sum over p != q of S_pq², with S the symmetric part of G H.T), and matrices are independent. So the root mean
square of ‖K̂ - K‖_F is at most sqrt(2/a sum over matrices of tr(K_m)²) for the training samples. What it is in fact is
told by four independent parts of the directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scripts.ntk.factors import Collector, Factors
from scripts.ntk.functions import Inputs, SampleFunction
from sparse_zero.errors import InputError
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection

SKETCH_PARTS = 4


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Trained parameters: exactly one of the other three fields says which."""

    name: str
    # Whole parameters, by name.
    parameters: tuple[str, ...] | None = None
    selection: Selection | None = None
    # By matrix, A [r, I] of a LoRA whose B is zero: the gradient of B is dW A.T, and that of A is zero.
    lora: Mapping[str, Tensor] | None = None


@dataclass
class Kernel:
    """A kernel under construction: [parts, M, N] in fp64; there are parts where it is sketched."""

    parts: Tensor
    # Sum over sketched matrices of 2/a tr(K_m)², of the training samples.
    variance_bound: float = 0.0

    @property
    def value(self) -> Tensor:
        """[M, N]"""
        return self.parts.mean(0)


@dataclass(frozen=True, kw_only=True)
class SketchError:
    """Root mean square of ‖K̂ - K‖_F over ‖K̂‖_F for the training samples."""

    # At most, by the bound above; and as the parts differ.
    bound: float
    estimate: float


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels of one function, by the names of the subsets."""

    values: dict[str, Tensor] = field(default_factory=dict)
    # Of the sketched ones.
    errors: dict[str, SketchError] = field(default_factory=dict)
    # Passes over the samples that it took.
    num_passes: int = 1


@dataclass
class _Work:
    """What is fixed while kernels add up."""

    num_train: int
    max_bytes: int
    sketch: int
    seed: int

    def chunks(self, factors: Factors, indices: Tensor, width: int) -> Iterator[Tensor]:
        """``indices`` in pieces whose gradients, ``width`` numbers for each, fit into the bound."""
        bytes_of_one = factors.num_samples * factors.num_outputs * width * factors.dtype.itemsize
        if bytes_of_one > self.max_bytes:
            raise InputError(
                f"kernel.max_memory_gib is too small: one row or column of {width} gradients of "
                f"{factors.num_samples} samples needs {4 * bytes_of_one / 2**30:.2g} GiB; raise it, or take fewer"
            )
        yield from indices.split(self.max_bytes // bytes_of_one)

    def gram(self, gradients: Tensor) -> Tensor:
        """[M, N] of gradients [M, C, ...]."""
        flat = gradients.reshape(len(gradients), -1)
        return (flat @ flat[: self.num_train].T).double()


def compute_kernels(
    function: SampleFunction,
    samples: Sequence[Inputs],
    num_train: int,
    subsets: Sequence[Subset],
    *,
    max_bytes: int,
    sketch: int = 0,
    seed: int = 0,
    on_work: Callable[[float], None] | None = None,
) -> Kernels:
    """The kernels [M, N] of ``samples`` against the first ``num_train`` of them.

    Args:
        function: f; no parameter of its base wants a gradient.
        samples: without padding, training samples first.
        num_train: N.
        subsets: with different names.
        max_bytes: see above.
        sketch: 0 for exact kernels, else the number of directions for whole matrices with more rows.
        seed: of the directions.
        on_work: told the share of all work that is done.

    Raises:
        InputError: the bound is too small, or a subset names what the model does not have.
    """
    collector = Collector(function, samples, max_bytes // 2)
    work = _Work(num_train=num_train, max_bytes=max_bytes // 4, sketch=sketch, seed=seed)
    _check(subsets, collector)
    found: dict[str, Kernel] = {}
    for subset in subsets:
        num_parts = SKETCH_PARTS if sketch and subset.parameters is not None else 1
        found[subset.name] = Kernel(parts=torch.zeros(num_parts, len(samples), num_train, dtype=torch.float64))
    # A pass is about half of the work.
    total, done = len(collector.groups) * len(samples) + len(collector.parameters) * len(samples) / 40, 0.0

    def worked(amount: float) -> None:
        nonlocal done
        done += amount
        if on_work is not None:
            on_work(done / total)

    for group in collector.groups:
        factors = collector.collect(group, lambda: worked(1))
        for name in group:
            concerned = _Concerned.of(name, subsets, found)
            if not sketch:
                _add_formed(concerned, factors, name, work)
            else:
                _add_from_factors(concerned, factors, name, work)
            worked(len(samples) / 40)
        del factors
    return Kernels(
        values={name: kernel.value for name, kernel in found.items()},
        errors={name: _sketch_error(kernel, num_train) for name, kernel in found.items() if len(kernel.parts) > 1},
        num_passes=len(collector.groups),
    )


def _check(subsets: Sequence[Subset], collector: Collector) -> None:
    for subset in subsets:
        for name in (
            subset.selection.weights if subset.selection is not None else subset.lora or subset.parameters or ()
        ):
            if name not in collector.parameters:
                raise InputError(f"the subset {subset.name} has {name}, which is no parameter of the model")
            if subset.selection is not None and subset.selection.weights[name].shape != collector.shapes[name]:
                raise InputError(
                    f"the subset {subset.name} has {name} as {subset.selection.weights[name].shape}, and the model "
                    f"stores it as {collector.shapes[name]}: name other modules in subsets.modules"
                )


@dataclass(frozen=True, kw_only=True)
class _Concerned:
    """The kernels that one parameter adds to."""

    wholes: list[Kernel]
    regions: list[tuple[Kernel, WeightSelection]]
    loras: list[tuple[Kernel, Tensor]]

    @classmethod
    def of(cls, name: str, subsets: Sequence[Subset], kernels: Mapping[str, Kernel]) -> _Concerned:
        return cls(
            wholes=[kernels[each.name] for each in subsets if each.parameters is not None and name in each.parameters],
            regions=[
                (kernels[each.name], each.selection.weights[name])
                for each in subsets
                if each.selection is not None and name in each.selection.weights
            ],
            loras=[(kernels[each.name], each.lora[name]) for each in subsets if each.lora and name in each.lora],
        )


def _add_formed(concerned: _Concerned, factors: Factors, name: str, work: _Work) -> None:
    """Form all of the gradients, some rows at a time, and take every subset's part out of them."""
    rows, width = factors.active_rows(name), factors.shapes[name][1]
    regions = [
        (kernel, torch.cat([weight.flat_indices(kind) for kind in weight.kinds()]))
        for kernel, weight in concerned.regions
    ]
    loras = torch.cat([down for _, down in concerned.loras]).to(factors.dtype).T if concerned.loras else None
    for chunk in work.chunks(factors, rows, width):
        formed = factors.rows(name, chunk)
        if concerned.wholes:
            gram = work.gram(formed)
            for kernel in concerned.wholes:
                kernel.parts += gram
        # Where the rows of the chunk lie in it; others have no gradient in any sample, or their turn is another.
        places = torch.full((factors.shapes[name][0],), -1)
        places[chunk] = torch.arange(len(chunk))
        flat = formed.flatten(2)
        for kernel, positions in regions:
            place = places[positions // width]
            inside = place >= 0
            local = place[inside] * width + positions[inside] % width
            kernel.parts += work.gram(flat if len(local) == flat.shape[2] else flat[:, :, local])
        if loras is not None:
            ranks = [len(down) for _, down in concerned.loras]
            for (kernel, _), each in zip(concerned.loras, (formed @ loras).split(ranks, dim=3), strict=True):
                kernel.parts += work.gram(each)


def _add_from_factors(concerned: _Concerned, factors: Factors, name: str, work: _Work) -> None:
    """Sketch what is whole, and form no more than a subset's part of the gradients."""
    rows, width = factors.active_rows(name), factors.shapes[name][1]
    if concerned.wholes and len(rows) > work.sketch:
        _add_sketched(concerned.wholes, factors, name, work)
    elif concerned.wholes:
        for chunk in work.chunks(factors, rows, width):
            gram = work.gram(factors.rows(name, chunk))
            for kernel in concerned.wholes:
                kernel.parts += gram
    for kernel, weight in concerned.regions:
        _add_regions(kernel, factors, name, weight, work)
    for kernel, down in concerned.loras:
        _add_lora(kernel, factors, name, down, work)


def _add_sketched(kernels: Sequence[Kernel], factors: Factors, name: str, work: _Work) -> None:
    generator = torch.Generator().manual_seed(work.seed)
    # Of its own for every matrix, whatever the order.
    generator.manual_seed(int(torch.randint(2**62, (1,), generator=generator)) ^ _number_of(name))
    directions = torch.randint(2, (work.sketch, factors.shapes[name][0]), generator=generator) * 2 - 1
    squares = 0.0
    for part, own in enumerate(directions.to(factors.dtype).chunk(SKETCH_PARTS)):
        for chunk in work.chunks(factors, torch.arange(len(own)), factors.shapes[name][1]):
            projected = factors.projected(name, own[chunk])
            gram = work.gram(projected) / len(own)
            squares += float(gram[: work.num_train].trace()) / SKETCH_PARTS
            for kernel in kernels:
                kernel.parts[part] += gram
    for kernel in kernels:
        kernel.variance_bound += 2.0 / work.sketch * squares**2


def _number_of(name: str) -> int:
    """The same in every process, unlike ``hash``."""
    import hashlib

    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def _sketch_error(kernel: Kernel, num_train: int) -> SketchError:
    parts = kernel.parts[:, :num_train]
    norm = float(parts.mean(0).norm()) or 1.0
    variance = float(parts.var(0).sum()) / len(parts)
    return SketchError(bound=kernel.variance_bound**0.5 / norm, estimate=variance**0.5 / norm)


def _add_regions(kernel: Kernel, factors: Factors, name: str, weight: WeightSelection, work: _Work) -> None:
    """Every entry counts once, for the kind that owns it."""
    height, width = factors.shapes[name]
    for kind in weight.kinds():
        positions = weight.flat_indices(kind)
        rows, columns = positions // width, positions % width
        by_column = kind == "column"
        lines, other, length = (columns, rows, height) if by_column else (rows, columns, width)
        for chunk in work.chunks(factors, lines.unique(), length):
            inside = (lines >= chunk[0]) & (lines <= chunk[-1])
            places = torch.searchsorted(chunk, lines[inside])
            if by_column:
                gradients = factors.columns(name, chunk).flatten(2)
                local = other[inside] * len(chunk) + places
            else:
                gradients = factors.rows(name, chunk).flatten(2)
                local = places * width + other[inside]
            whole = len(local) == gradients.shape[2]
            kernel.parts += work.gram(gradients if whole else gradients[:, :, local])


def _add_lora(kernel: Kernel, factors: Factors, name: str, down: Tensor, work: _Work) -> None:
    for chunk in work.chunks(factors, torch.arange(len(down)), factors.shapes[name][0]):
        kernel.parts += work.gram(factors.times(name, down[chunk].to(factors.dtype).T))
