"""Which layers lie below everything that is trained, and how does a forward pass start above them?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparse_zero.errors import InputError
from sparse_zero.layers.sparsify import trainable_parameters
from sparse_zero.module_map import layer_index

# Settings of modules that make them random in training: attention_dropout, layerdrop, router_jitter_noise.
_RANDOM = ("drop", "jitter")


def layer_list(model: nn.Module) -> str:
    """Name of the ``nn.ModuleList`` whose entries are the model's layers.

    Raises:
        InputError: there is none, or there are several (an encoder and a decoder).
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and layer_index(name) is None
    ]
    if len(found) != 1:
        what = "no list of layers" if not found else f"{len(found)} lists of layers ({', '.join(found[:3])})"
        raise InputError(
            f"training.prefix_cache is set, but the model has {what}, so it is not known what comes first: leave "
            "training.prefix_cache out"
        )
    return found[0]


def _layer_of(name: str, layers: str) -> int | None:
    """The layer that a module or parameter is part of."""
    return layer_index(name.removeprefix(layers)) if name.startswith(f"{layers}.") else None


def lowest_trained(model: nn.Module) -> tuple[int, str]:
    """Number of layers that no trained value acts in or before, and the name of the values that end them.

    What is registered before the layers (embeddings, positions, their norms) is taken to act before them. The last
    layer is never counted: hidden states are taken where they enter a layer.

    Raises:
        InputError: the model has no values, or :func:`layer_list` fails.
    """
    layers = layer_list(model)
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    top = len(model.get_submodule(layers)) - 1  # type: ignore[arg-type]
    found: list[tuple[int, str]] = []
    for name in trainable_parameters(model):
        layer = _layer_of(name, layers)
        if layer is None:
            layer = 0 if order[name.rpartition(".")[0]] < order[layers] else top
        found.append((min(layer, top), name))
    return min(found)


def random_setting(model: nn.Module, num_layers: int) -> str | None:
    """A setting that makes the lowest ``num_layers`` layers, or what is outside of layers, random in training."""
    layers = layer_list(model)
    for name, module in model.named_modules():
        layer = _layer_of(name, layers)
        if layer is not None and layer >= num_layers:
            continue
        is_dropout = "dropout" in type(module).__name__.lower()
        for setting, value in vars(module).items():
            is_random = any(part in setting for part in _RANDOM) or (is_dropout and setting == "p")
            if is_random and isinstance(value, float) and value > 0:
                return f"{name}.{setting} = {value:g}"
    return None


class PrefixLayers:
    """The lowest layers of a model, whose output is taken from a forward pass or put in its place.

    The model's own forward runs in any case, and makes position ids, masks and rotary embeddings for the layers above.

    Args:
        model: the model itself, not an engine.
        num_layers: how many of its layers; at least one, and not all.
    """

    def __init__(self, model: nn.Module, num_layers: int) -> None:
        layers = list(model.get_submodule(layer_list(model)).children())
        assert 0 < num_layers < len(layers)
        self.num_layers = num_layers
        self._below, self._above = layers[:num_layers], layers[num_layers]
        # What a layer returns besides the hidden states: None for the bare tensor, else how many more. Not known before
        # the first capture.
        self._num_more: int | None = None
        self._is_known = False

    @property
    def can_skip(self) -> bool:
        """Whether a forward pass was captured already, which told what the layers return."""
        return self._is_known

    @contextmanager
    def captured(self) -> Iterator[list[Tensor]]:
        """For one forward pass in the block: the list gets the hidden states [B, L, H] that enter the layer above.

        Raises:
            InputError: they depend on something that is trained, or the layers hand over more than one tensor.
        """
        found: list[Tensor] = []

        def on_output(module: nn.Module, args: Any, output: Any) -> None:
            more = list(output[1:]) if isinstance(output, tuple) else []
            self._num_more = len(more) if isinstance(output, tuple) else None
            self._is_known = True

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Gradient checkpointing comes by again in backward only, which is behind the block.
            assert not found, "a layer has run twice in one forward pass"
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.requires_grad:
                raise InputError(
                    f"training.prefix_cache is set, but what enters layer {self.num_layers} is no plain hidden state "
                    "that nothing trained acts on: leave training.prefix_cache out"
                )
            found.append(hidden)

        hooks = [
            self._below[-1].register_forward_hook(on_output),
            self._above.register_forward_pre_hook(on_input, with_kwargs=True),
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def skipped(self, hidden_BLH: Tensor) -> Iterator[None]:
        """For one forward pass in the block: the layers compute nothing, and return these hidden states."""
        assert self._is_known
        output: Any = hidden_BLH
        if self._num_more is not None:
            output = (hidden_BLH, *[None] * self._num_more)

        def hand_over(*_: Any, **__: Any) -> Any:
            return output

        # On the instances: what something else has put there (an offloading hook, say) comes back.
        before = [vars(layer).get("forward") for layer in self._below]
        for layer in self._below:
            layer.forward = hand_over
        try:
            yield
        finally:
            for layer, forward in zip(self._below, before, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward


def from_tokens(states_SH: Tensor, lengths: Sequence[int], length: int | None) -> Tensor:
    """[B, L, H] of samples one behind the other: a row for each, filled up with zeros; or [1, S, H], all in one.

    Args:
        states_SH: of all tokens.
        lengths: tokens of each sample.
        length: L of a padded micro-batch; None: packed.
    """
    if length is None:
        return states_SH.unsqueeze(0)
    # Nothing reads what stands at padding: it is behind the tokens and masked.
    hidden_BLH = states_SH.new_zeros(len(lengths), length, states_SH.shape[1])
    for row, states in enumerate(states_SH.split(list(lengths))):
        hidden_BLH[row, : len(states)] = states
    return hidden_BLH


def to_tokens(hidden_BLH: Tensor, lengths: Sequence[int], *, is_packed: bool) -> list[Tensor]:
    """What :func:`from_tokens` put together, as views: [length, H] of each sample."""
    if is_packed:
        return list(hidden_BLH[0].split(list(lengths)))
    return [hidden_BLH[row, :length] for row, length in enumerate(lengths)]
