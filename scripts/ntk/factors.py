"""What must be kept of one pass over the samples so that every gradient of every matrix can be formed later?

The gradient of a matrix that a linear layer uses is dY.T @ X, and that of an embedding adds rows of dY up: X (or the
tokens) and dY are kept, which is less than the gradients are by the number of features over that of tokens. Gradients
of all other parameters (norms, biases) are kept as they are.

Legend: N samples, C outputs of the function, T tokens, O and I rows and columns of a matrix (a vector has I = 1).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

from scripts.ntk.functions import Inputs, SampleFunction
from sparse_zero.errors import InputError

# A call of a module in one forward pass: its name, and how often it was called before.
Call = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of a matrix by one sample."""

    # [T, I] inputs of a linear, or None.
    inputs: Tensor | None
    # [T] rows that were looked up, or None.
    ids: Tensor | None
    # [C, T, O] of a linear, [C, T, I] of a lookup: gradients of what came out.
    deltas: Tensor


@dataclass
class Factors:
    """Gradients of some parameters for all samples, in factors. Made by :func:`collect`."""

    num_samples: int
    num_outputs: int
    dtype: torch.dtype
    # (O, I) by parameter name.
    shapes: dict[str, tuple[int, int]]
    # By parameter name, the uses by each sample; and [N, C, O, I] of parameters kept as they are.
    uses: dict[str, list[list[Use]]] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)

    def active_rows(self, name: str) -> Tensor:
        """The rows whose gradient is not zero for all samples, as far as the kind of use tells."""
        uses = [use for sample in self.uses.get(name, ()) for use in sample]
        if name in self.dense or any(use.ids is None for use in uses):
            return torch.arange(self.shapes[name][0])
        return torch.cat(
            [use.ids for use in uses if use.ids is not None] or [torch.zeros(0, dtype=torch.int64)]
        ).unique()

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """[N, C, R, I]: these rows of the gradients, in their order."""
        if name in self.dense:
            return self.dense[name][:, :, rows]
        places = torch.full((self.shapes[name][0],), -1)
        places[rows] = torch.arange(len(rows))

        def add(found: Tensor, use: Use) -> None:
            if use.inputs is not None:
                found += use.deltas[:, :, rows].mT @ use.inputs
            elif use.ids is not None:
                targets = places[use.ids]
                found.index_add_(1, targets[targets >= 0], use.deltas[:, targets >= 0])

        return self._sum(name, len(rows), self.shapes[name][1], add)

    def columns(self, name: str, columns: Tensor) -> Tensor:
        """[N, C, O, number of columns]: these columns of the gradients, in their order."""
        if name in self.dense:
            return self.dense[name][..., columns]

        def add(found: Tensor, use: Use) -> None:
            if use.inputs is not None:
                found += use.deltas.mT @ use.inputs[:, columns]
            elif use.ids is not None:
                found.index_add_(1, use.ids, use.deltas[..., columns])

        return self._sum(name, self.shapes[name][0], len(columns), add)

    def times(self, name: str, right: Tensor) -> Tensor:
        """[N, C, O, r]: the gradients times ``right`` [I, r]."""
        if name in self.dense:
            return self.dense[name] @ right

        def add(found: Tensor, use: Use) -> None:
            if use.inputs is not None:
                found += use.deltas.mT @ (use.inputs @ right)
            elif use.ids is not None:
                found.index_add_(1, use.ids, use.deltas @ right)

        return self._sum(name, self.shapes[name][0], right.shape[1], add)

    def projected(self, name: str, left: Tensor) -> Tensor:
        """[N, C, a, I]: ``left`` [a, O] times the gradients."""
        if name in self.dense:
            return left @ self.dense[name]

        def add(found: Tensor, use: Use) -> None:
            if use.inputs is not None:
                found += (left @ use.deltas.mT) @ use.inputs
            elif use.ids is not None:
                found += left[:, use.ids] @ use.deltas

        return self._sum(name, left.shape[0], self.shapes[name][1], add)

    def _sum(self, name: str, height: int, width: int, add: Callable[[Tensor, Use], None]) -> Tensor:
        found = torch.zeros(self.num_samples, self.num_outputs, height, width, dtype=self.dtype)
        for index, uses in enumerate(self.uses.get(name, ())):
            for use in uses:
                add(found[index], use)
        return found


@dataclass(frozen=True, kw_only=True)
class CallShape:
    """One call of a module, as a first sample showed it."""

    parameter: str
    is_lookup: bool
    # Rows of the input, of which there are as many as tokens, or so many for every sample.
    num_rows: int
    per_token: bool
    # Numbers kept for one row, without the outputs' gradients, and of these for one output.
    width_in: int
    width_out: int


class Collector:
    """Collects the factors of a function's parameters over some samples, in groups that a memory bound allows.

    Args:
        function: f.
        samples: at least one; its base must not have a gradient wanted.
        max_bytes: of the factors of one group.

    Raises:
        InputError: the factors of one parameter alone take more.
    """

    def __init__(self, function: SampleFunction, samples: Sequence[Inputs], max_bytes: int) -> None:
        self.function, self.samples = function, samples
        base = function.base
        self.parameters: dict[str, nn.Parameter] = dict(base.named_parameters())
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        # Modules whose weight's gradient follows from what goes in and comes out; exactly these classes' own forward.
        self.modules: dict[str, tuple[nn.Module, str]] = {}
        for module_name, module in base.named_modules():
            forward = getattr(type(module), "forward", None)
            plain = forward is nn.Linear.forward or (
                isinstance(module, nn.Embedding)
                and forward is nn.Embedding.forward
                and module.max_norm is None
                and not module.scale_grad_by_freq
            )
            if plain and id(module.weight) in names:
                self.modules[module_name] = (module, names[id(module.weight)])
        self.factored = {name for _, name in self.modules.values()}
        self.calls = self._calls(samples[0])
        with torch.no_grad():
            self.num_outputs = len(function(samples[0]))
        self.shapes = {
            name: (parameter.shape[0], parameter.numel() // parameter.shape[0])
            for name, parameter in self.parameters.items()
        }
        self.groups = self._groups(max_bytes)
        self._probe_shapes: dict[tuple[Any, ...], dict[Call, torch.Size]] = {}

    # -- what is where

    def _calls(self, inputs: Inputs) -> dict[Call, CallShape]:
        found: dict[Call, CallShape] = {}
        num_tokens = inputs["input_ids"].shape[1]
        with self._hooks(set(self.modules)) as record, torch.no_grad():
            self.function(inputs)
        for call, (given, output) in record.seen.items():
            module, parameter = self.modules[call[0]]
            is_lookup = isinstance(module, nn.Embedding)
            rows = given.numel() if is_lookup else given.numel() // given.shape[-1]
            found[call] = CallShape(
                parameter=parameter,
                is_lookup=is_lookup,
                num_rows=rows,
                per_token=rows == num_tokens,
                width_in=2 if is_lookup else given.shape[-1],
                width_out=output.shape[-1],
            )
        return found

    def _bytes(self, name: str) -> int:
        """Of all samples' factors of one parameter."""
        item = self.parameters[name].element_size()
        if name not in self.factored:
            return len(self.samples) * self.num_outputs * self.parameters[name].numel() * item
        total = 0
        for call in self.calls.values():
            if call.parameter == name:
                width = call.width_in + self.num_outputs * call.width_out
                lengths = (inputs["input_ids"].shape[1] if call.per_token else call.num_rows for inputs in self.samples)
                total += sum(lengths) * width * item
        return total

    def _groups(self, max_bytes: int) -> list[list[str]]:
        groups: list[list[str]] = []
        free = 0
        for name in self.parameters:
            needed = self._bytes(name)
            if needed > max_bytes:
                raise InputError(
                    f"kernel.max_memory_gib is too small: {name} alone needs {needed / 2**30:.2g} GiB for "
                    f"{len(self.samples)} samples, of {max_bytes / 2**30:.2g}; raise it, or take fewer samples"
                )
            if not groups or needed > free:
                groups.append([])
                free = max_bytes
            groups[-1].append(name)
            free -= needed
        return groups

    # -- one pass

    @contextmanager
    def _hooks(self, module_names: set[str]) -> Iterator[_Record]:
        record = _Record()
        handles = [
            self.modules[name][0].register_forward_hook(record.hook(name)) for name in sorted(module_names)
        ]  # fmt: skip
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()

    def collect(self, group: Sequence[str], on_sample: Callable[[], None] | None = None) -> Factors:
        """Factors of the parameters of one group, by one forward and backward pass of every sample.

        Raises:
            InputError: the model uses a matrix otherwise than by calling its module.
        """
        found = Factors(
            num_samples=len(self.samples),
            num_outputs=self.num_outputs,
            dtype=next(iter(self.parameters.values())).dtype,
            shapes={name: self.shapes[name] for name in group},
        )
        kept = [name for name in group if name not in self.factored]
        for name in kept:
            found.dense[name] = torch.zeros(
                found.num_samples, found.num_outputs, *self.shapes[name], dtype=found.dtype
            )  # fmt: skip
        modules = {name for name, (_, parameter) in self.modules.items() if parameter in group}
        for index, inputs in enumerate(self.samples):
            uses, gradients = self._pieces(inputs, modules, kept)
            for name in group:
                if name in self.factored:
                    found.uses.setdefault(name, []).append(uses[name])
            for name, each in gradients.items():
                found.dense[name][index] = each.reshape(found.num_outputs, *self.shapes[name])
            if index == 0:
                self._check_first(found, [name for name in group if name in self.factored])
            if on_sample is not None:
                on_sample()
        return found

    def _pieces(
        self, inputs: Inputs, modules: set[str], kept: Sequence[str]
    ) -> tuple[dict[str, list[Use]], dict[str, Tensor]]:
        """Uses by parameter, and [C, ...] gradients of the parameters in ``kept``, of one sample."""
        key = (frozenset(modules), *(each.shape for each in inputs.values()))
        with self._hooks(modules) as record:
            if key not in self._probe_shapes:
                with torch.no_grad():
                    self.function(inputs)
                self._probe_shapes[key] = {call: output.shape for call, (_, output) in record.seen.items()}
            dtype = next(iter(self.parameters.values())).dtype
            probes = {call: torch.zeros(shape, dtype=dtype) for call, shape in self._probe_shapes[key].items()}

            # Zeros are added to what every module gives: the gradient of the zeros is dY.
            def outputs_of(added: dict[Call, Tensor], own: dict[str, Tensor]) -> tuple[Tensor, dict[Call, Tensor]]:
                record.begin(added)
                outputs = functional_call(self.function, {f"base.{name}": own[name] for name in own}, (inputs,))
                return outputs, {call: given for call, (given, _) in record.seen.items()}

            own = {name: self.parameters[name].detach() for name in kept}
            with_inputs: Any = vjp(outputs_of, probes, own, has_aux=True)
            outputs, pull, given = with_inputs
            pulled = [pull(row) for row in torch.eye(len(outputs), dtype=outputs.dtype)]
        uses: dict[str, list[Use]] = defaultdict(list)
        for call, read in given.items():
            module, parameter = self.modules[call[0]]
            deltas = torch.stack([deltas[call].flatten(0, -2) for deltas, _ in pulled])
            if isinstance(module, nn.Embedding):
                ids = read.flatten()
                # As in torch, the padding's row has no gradient.
                real = (
                    torch.ones_like(ids, dtype=torch.bool) if module.padding_idx is None else ids != module.padding_idx
                )
                uses[parameter].append(Use(inputs=None, ids=ids[real], deltas=deltas[:, real]))
            else:
                states = _of_own(read.flatten(0, -2))
                uses[parameter].append(Use(inputs=states, ids=None, deltas=deltas))
        return uses, {name: torch.stack([each[name] for _, each in pulled]) for name in own}

    def _check_first(self, found: Factors, names: Sequence[str]) -> None:
        """Compare with the gradients of autograd for the first sample."""
        own = {name: self.parameters[name].detach() for name in names}

        def summed(own: dict[str, Tensor]) -> Tensor:
            renamed = {f"base.{name}": tensor for name, tensor in own.items()}
            outputs: Tensor = functional_call(self.function, renamed, (self.samples[0],))
            return outputs.sum()

        expected = torch.func.grad(summed)(own) if own else {}
        for name, gradient in expected.items():
            first = Factors(
                num_samples=1,
                num_outputs=found.num_outputs,
                dtype=found.dtype,
                shapes={name: self.shapes[name]},
                uses={name: found.uses[name][:1]},
            )
            rows = first.active_rows(name)
            formed = first.rows(name, rows).sum((0, 1))
            rest = math.sqrt(max(0.0, float(gradient.norm()) ** 2 - float(gradient[rows].norm()) ** 2))
            error = float((formed - gradient[rows]).norm()) + rest
            # The root of a rounding error where nothing is left out.
            if error > 2e-3 * float(gradient.norm()) + 1e-10:
                raise InputError(
                    f"model.name_or_path: the model uses {name} otherwise than by calling its module (its gradient is "
                    f"off by {error:.2g} of {float(gradient.norm()):.2g}); its kernel cannot be computed here"
                )


class _Record:
    """What modules were given and gave in the forward pass since ``begin``."""

    def __init__(self) -> None:
        self.seen: dict[Call, tuple[Tensor, Tensor]] = {}
        self._added: Mapping[Call, Tensor] = {}

    def begin(self, added: Mapping[Call, Tensor]) -> None:
        """Forget the last pass, and add these to the outputs of the next."""
        self.seen, self._added = {}, added

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        """The forward hook of the module ``name``."""

        def after(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            number = 0
            while (name, number) in self.seen:
                number += 1
            call = (name, number)
            self.seen[call] = (given[0], output)
            return output + self._added[call] if call in self._added else output

        return after


def _of_own(tensor: Tensor) -> Tensor:
    """Not a view that keeps a larger tensor alive."""
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()
