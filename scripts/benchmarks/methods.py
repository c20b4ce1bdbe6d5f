"""What is compared, and how does each method make a model ready for training?

Every method trains the same random Llama; those that train a part, the same number of parameters of q, k and v as far
as they can:

    floor, floor2    nothing is trained: forward, and the gradients of the activations; the second is the control
    full             every parameter
    lora, dora, shira, tokens      PEFT's; tokens trains rows of the embedding, as many parameters as the others
    copies, concat, masked, diagonal      the published ways, see :mod:`scripts.benchmarks.peers`
    blocks, rows, columns, mixed, small_blocks      ours, written into the weight after each step (inplace)
    blocks_delta, ...      ours, added to the product (delta)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

import sparse_zero as sz
from models.peer_models import Adapter, add_adapters
from scripts.benchmarking import LlamaSettings, check_clock, random_llama
from scripts.benchmarks.peers import ConcatenatedRows, CopiedBlocks, DiagonalBlocks, MaskedLinear, Peer
from sparse_zero.errors import InputError
from sparse_zero.zero.config import Placement

FLOORS = ("floor", "floor2")
PEFT = ("lora", "dora", "shira", "tokens")
PUBLISHED = ("copies", "concat", "masked", "diagonal")
OURS = ("blocks", "rows", "columns", "mixed", "small_blocks")
DELTA = tuple(f"{method}_delta" for method in OURS)
METHODS = (*FLOORS, "full", *PEFT, *PUBLISHED, *OURS)
MODULES = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class Settings(LlamaSettings):
    """One comparison: the model, the batch, how much is trained, and how often it is measured."""

    rows: int = 64  # rows trained per matrix; the other methods train as many parameters
    block_size: int = 64
    small_blocks: int = 32  # blocks of that size per matrix, for the method small_blocks, whatever they add up to
    depth_from: float = 0.0  # ours train only layers from this share of the depth on, as many parameters in all
    steps: int = 20  # timed steps per method
    warmup: int = 3  # steps before, not counted
    max_seconds: float = 0.0  # no further round is begun after so many; 0: no limit
    memory_steps: int = 3  # steps in the process that measures memory
    clock: str = "wall"  # cpu: what the process worked; steadier beside other processes, for one thread

    def __post_init__(self) -> None:
        check_clock(self.clock, self.threads, self.device)
        if not 0.0 <= self.depth_from < 1.0:
            raise InputError(f"--depth-from {self.depth_from} must be a share of the layers: 0 <= share < 1")
        if self.rows * self.layers % (self.layers - self.first_layer):
            raise InputError(
                f"--depth-from {self.depth_from} leaves {self.layers - self.first_layer} of {self.layers} layers, over "
                f"which --rows {self.rows} per layer cannot be divided evenly: choose another of them"
            )
        block = self.block_size**2
        for rows in (self.rows, self.own(self.rows)):
            if rows * self.hidden % (2 * block) or rows % 4:
                raise InputError(
                    f"--rows {rows} of {self.hidden} entries must be a multiple of 4 and make an even "
                    f"number of blocks of {self.block_size}: choose another --rows or --block-size"
                )
        if self.hidden % self.rows:
            raise InputError(
                f"--rows {self.rows} is no divisor of --hidden {self.hidden}, so that no diagonal of equal blocks has "
                "as many entries: choose another of them"
            )
        if self.own(self.small_blocks) > (self.hidden // self.block_size) ** 2:
            raise InputError(
                f"--small-blocks {self.own(self.small_blocks)} of side {self.block_size} do not fit into "
                f"{self.hidden} x {self.hidden}: choose fewer"
            )

    @property
    def first_layer(self) -> int:
        """The first layer in which ours train something."""
        return min(math.ceil(self.depth_from * self.layers), self.layers - 1)

    def own(self, number: int) -> int:
        """Regions that ours train per matrix: as many as ``number`` in every layer, in the layers that they train."""
        return number * self.layers // (self.layers - self.first_layer)

    @property
    def lora_rank(self) -> int:
        """Two factors of this rank have as many entries as the rows: the matrices are square."""
        return self.rows // 2


SMALL = Settings(
    hidden=64,
    layers=2,
    heads=4,
    intermediate=160,
    vocab=128,
    length=16,
    rows=4,
    block_size=8,
    steps=3,
    warmup=1,
    memory_steps=2,
)


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for training; ``step`` is ``learn`` and ``update`` and returns the loss."""

    model: Any
    num_trained: int
    learn: Callable[[Tensor], Tensor]  # forward and backward; returns the loss, a scalar
    update: Callable[[], None]  # the optimizer, and what puts the values where they act

    def step(self, tokens: Tensor) -> float:
        """One training step; reading the loss waits for the device, too."""
        loss = self.learn(tokens)
        self.update()
        return float(loss)


def prepare(method: str, model: Any, settings: Settings) -> Prepared:
    """Make ``model``, which is changed, ready for a method."""
    num_trained: int | None = None
    if method in FLOORS:
        return prepare_floor(model)
    if method in PEFT:
        model = _with_peft(method, model, settings)
    elif method in PUBLISHED:
        num_trained = _with_published(method, model, settings)
    elif method != "full":
        placement: Placement = "delta" if method in DELTA else "inplace"
        config = sz.SelectionConfig(regions=regions(method.removesuffix("_delta"), settings), seed=settings.seed)
        sz.sparsify(model, sz.select(model, None, config), placement=placement)
    return ready(model, write_back=method in (*OURS, *DELTA), decay=method != "masked", num_trained=num_trained)


def prepare_floor(model: Any) -> Prepared:
    """Forward, and the gradients of the activations down to the embeddings."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return ready(model, write_back=False)


def ready(model: Any, *, write_back: bool, decay: bool = True, num_trained: int | None = None) -> Prepared:
    """The training step of a model of which everything is trained that requires a gradient.

    Args:
        model: returns a loss.
        write_back: whether values of ours are put into their weights after the optimizer's step.
        decay: whether the optimizer decays what it holds; not if it holds more than is trained.
        num_trained: parameters; default: all that require a gradient.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # As runs have it (sparse_zero.zero.optimizers), for every method.
    settings: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01 if decay else 0.0, "fused": True}
    optimizer = torch.optim.AdamW(trained, **settings) if trained else None

    def learn(tokens: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def update() -> None:
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if write_back:
            sz.write_back(model)

    return Prepared(model, sum(p.numel() for p in trained) if num_trained is None else num_trained, learn, update)


def regions(method: str, settings: Settings) -> tuple[sz.RegionConfig, ...]:
    """What ours train of every q, k and v; mixed is half blocks, a quarter rows, a quarter columns."""
    rows = settings.own(settings.rows)
    blocks = rows * settings.hidden // settings.block_size**2
    shares = {
        "blocks": {"block": blocks},
        "rows": {"row": rows},
        "columns": {"column": rows},
        "mixed": {"block": blocks // 2, "row": rows // 4, "column": rows // 4},
        "small_blocks": {"block": settings.own(settings.small_blocks)},
    }[method]
    return tuple(
        sz.RegionConfig(
            kind=kind,  # type: ignore[arg-type]
            modules=(f"*.{{{','.join(MODULES)}}}",),
            per_matrix=number,
            score="random",
            block_size=settings.block_size if kind == "block" else None,
            min_layer=settings.first_layer or None,
        )
        for kind, number in shares.items()
    )


def _with_peft(method: str, model: Any, settings: Settings) -> Any:
    if method == "tokens":
        wanted = settings.layers * len(MODULES) * settings.rows  # rows of hidden entries, as of q, k and v
        tokens = range(min(wanted, settings.vocab))
        return add_adapters(model, "trainable_tokens", targets=["embed_tokens"], tokens=tokens)
    kind: Adapter = method  # type: ignore[assignment]
    return add_adapters(model, kind, rank=settings.lora_rank, targets=MODULES, seed=settings.seed)


def _with_published(method: str, model: Any, settings: Settings) -> int:
    """Put a peer in the place of every q, k and v; returns the number of trained entries."""
    model.requires_grad_(False)
    found = [(name, module) for name, module in model.named_modules() if name.endswith(MODULES)]
    generator = torch.Generator().manual_seed(settings.seed)
    peers = [published(method, linear, settings.rows, settings.block_size, generator) for _, linear in found]
    for (name, _), peer in zip(found, peers, strict=True):
        model.set_submodule(name, peer)
    return sum(peer.num_trained for peer in peers)


def published(
    method: str, linear: nn.Linear, num_rows: int, block_size: int, generator: torch.Generator | None = None
) -> Peer:
    """One of the published ways in the place of a square ``linear``, training as many entries as ``num_rows`` rows."""
    if method == "concat":
        return ConcatenatedRows(linear, num_rows)
    if method == "diagonal":
        return DiagonalBlocks(linear, linear.in_features // num_rows)
    blocks = random_blocks(linear, num_rows * linear.in_features // block_size**2, block_size, generator)
    if method == "copies":
        return CopiedBlocks(linear, blocks, block_size)
    mask = torch.zeros_like(linear.weight)
    for row, column in blocks:
        mask[row * block_size :, column * block_size :][:block_size, :block_size] = 1.0
    return MaskedLinear(linear, mask)


def random_blocks(
    linear: nn.Linear, number: int, size: int, generator: torch.Generator | None = None
) -> list[tuple[int, int]]:
    """(i, j) of so many blocks of the grid of ``size``, in the order of the grid."""
    across = linear.in_features // size
    total = linear.out_features // size * across
    chosen = torch.randperm(total, generator=generator)[:number].sort().values.tolist()
    return [divmod(block, across) for block in chosen]


def build_models(methods: dict[str, tuple[str, ...]], settings: Any) -> dict[str, Any]:
    """Equal random Llamas, which share the parameters that none of them changes.

    Args:
        methods: for each model, shell-style patterns over the names of the parameters that are its own.
        settings: of :func:`~scripts.benchmarking.random_llama`.
    """
    first = random_llama(settings)
    named = dict(first.named_parameters())
    models = {}
    for method, patterns in methods.items():
        shared = {id(p): p for name, p in named.items() if not any(fnmatchcase(name, each) for each in patterns)}
        models[method] = copy.deepcopy(first, shared)
    return models


def own_parameters(method: str) -> tuple[str, ...]:
    """Patterns over the names of the parameters that a method trains or writes to; for :func:`build_models`."""
    if method == "full":
        return ("*",)
    return tuple(f"*.{module}.*" for module in MODULES)
