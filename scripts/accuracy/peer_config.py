"""What does the config of a run say whose model another method trains: the section ``peer``, instead of ``selection``?

All other sections are those of ``sparse-zero train``, and mean the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from launcher.config import NOT_WRITTEN, RunConfig, parse_config, read_with_overrides
from models.peer_models import Adapter
from sparse_zero.errors import InputError
from sparse_zero.selection.config import RegionConfig, SelectionConfig

PeerMethod = Literal["full", "frozen", "lora", "dora", "rslora", "shira", "trainable_tokens"]
METHODS: tuple[PeerMethod, ...] = get_args(PeerMethod)
ADAPTERS: tuple[Adapter, ...] = get_args(Adapter)
# Whose adapters are factors, scaled by lora_alpha.
FACTORED = ("lora", "dora", "rslora")
# In the place of a selection: the launcher's checks know kinds of region, and read no more of it for a peer.
_NO_SELECTION = SelectionConfig(regions=(RegionConfig(kind="whole", modules=("*",)),))


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """By which method is trained instead, what, and how much."""

    # full: all parameters, or all of the modules; frozen: nothing; the others are PEFT's.
    method: PeerMethod
    # Patterns over names of modules, as in selections: "*.self_attn.{q,k,v}_proj". lora, dora, rslora, shira: the
    # linears that have adapters. full: what is trained, weights and biases; None: everything. The others have none.
    modules: tuple[str, ...] | None = None
    # Of the adapters; shira: r, of r (in + out) entries per matrix; trainable_tokens: how many tokens, the most
    # frequent ones of the training data. Exactly one of rank and fraction is set, but for full and frozen.
    rank: int | None = None
    # Share of the model's parameters: the rank that comes nearest to it without surpassing it. Without the head.
    fraction: float | None = None
    # lora_alpha as a multiple of the rank (lora, dora, rslora). 2 is a common choice.
    alpha_over_rank: float = 2.0
    # Patterns over names of parameters that are trained whole beside it, such as "classifier.*".
    head: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sized = {"rank": self.rank, "fraction": self.fraction}
        given = [name for name, value in sized.items() if value is not None]
        if self.method not in METHODS:
            raise InputError(f"peer.method is {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.method in ADAPTERS and len(given) != 1:
            raise InputError(
                f"peer has rank={self.rank} and fraction={self.fraction}: {self.method} needs exactly one of them"
            )
        if self.method not in ADAPTERS and given:
            raise InputError(f"peer.{given[0]} is {sized[given[0]]} with method {self.method}: leave it out")
        if self.method in ADAPTERS and self.method != "trainable_tokens" and not self.modules:
            raise InputError(
                f"peer.modules is missing: name what {self.method} adapts, as ['*.self_attn.{{q,k,v}}_proj']"
            )
        if self.method in ("frozen", "trainable_tokens") and self.modules is not None:
            raise InputError(f"peer.modules is set with method {self.method}, which has none: leave it out")
        if self.modules is not None and not self.modules:
            raise InputError("peer.modules is empty: name at least one pattern, or leave it out")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"peer.rank is {self.rank}: it must be at least 1")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise InputError(f"peer.fraction is {self.fraction}: it must lie in (0, 1], 0.01 is one percent")
        if not (math.isfinite(self.alpha_over_rank) and self.alpha_over_rank > 0):
            raise InputError(f"peer.alpha_over_rank is {self.alpha_over_rank}: it must be a positive number")
        if self.alpha_over_rank != 2.0 and self.method not in FACTORED:
            raise InputError(
                f"peer.alpha_over_rank is {self.alpha_over_rank} with method {self.method}, which has no lora_alpha: "
                "leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class PeerRunConfig(RunConfig):
    """Everything that decides one run of a peer."""

    peer: PeerConfig
    selection: SelectionConfig = field(default=_NO_SELECTION, metadata={NOT_WRITTEN: True})

    def __post_init__(self) -> None:
        super().__post_init__()
        again = "a peer that was stopped is trained anew"
        for name, value, usual, why in (
            ("selection", self.selection, _NO_SELECTION, "peer takes its place"),
            ("model.quantization", self.model.quantization, "none", "peers are trained on plain weights"),
            ("training.prefix_cache", self.training.prefix_cache, None, "peers compute every layer"),
            ("checkpoint.every", self.checkpoint.every, None, again),
            ("checkpoint.keep_best", self.checkpoint.keep_best, "none", again),
            ("checkpoint.resume", self.checkpoint.resume, "auto", again),
            ("memory.simulate", self.memory.simulate is True, False, "simulations know selections only"),
            ("output.report", self.output.report, False, "reports are drawn of selections"),
        ):
            if value != usual:
                raise InputError(f"{name} is set with a section peer, and {why}: leave {name} out")
        if self.training.per_kind.named():
            raise InputError("training.per_kind is set with a section peer, which has no kinds of region: leave it out")
        if self.training.optimizer == "muon":
            raise InputError(
                "training.optimizer is 'muon', which is for blocks of selections: choose another for peers"
            )
        if self.zero.stage not in (1, 2):
            raise InputError(f"zero.stage is {self.zero.stage}: peers are trained at stage 1 or 2; set one of them")
        if self.zero.placement != "inplace" or self.zero.rounding != "nearest":
            raise InputError(
                "zero.placement and zero.rounding are of selections, and peer takes their place: leave them out"
            )


def load_peer_config(path: str | Path, overrides: Sequence[str] = ()) -> PeerRunConfig:
    """The run that a YAML file with a section ``peer`` describes; arguments as :func:`launcher.config.load_config`.

    ``selection: null`` takes away the section of a file that is extended.

    Raises:
        InputError: names the field, its value and the remedy.
    """
    mapping = read_with_overrides(path, overrides)
    if mapping.get("selection") is not None:
        raise InputError(
            f"{path} has a section selection, and peers have a section peer in its place: leave it out, or write "
            "`selection: null` where it comes from a file that is extended"
        )
    mapping.pop("selection", None)
    return parse_config(mapping, str(path), PeerRunConfig)
