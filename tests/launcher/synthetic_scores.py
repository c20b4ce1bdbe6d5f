"""What do the scores of a calibration look like? Made-up ones of a Llama-like model, and a selection chosen by them."""

import torch
from torch import Tensor

from sparse_zero.module_map import Matrix
from sparse_zero.selection.candidates import Candidates
from sparse_zero.selection.config import Kind
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.regions import BlockShape, WeightSelection
from sparse_zero.selection.selection import Selection

SHAPES = {
    "self_attn.q_proj": (512, 512),
    "self_attn.k_proj": (128, 512),
    "self_attn.v_proj": (128, 512),
    "self_attn.o_proj": (512, 512),
    "mlp.gate_proj": (1376, 512),
    "mlp.up_proj": (1376, 512),
    "mlp.down_proj": (512, 1376),
}
# How much more a module matters than the others: values above queries, as SMT finds.
_LEVELS = {"v_proj": 6.0, "o_proj": 2.5, "down_proj": 1.5}


def _values(candidates: Candidates, layer: float, generator: torch.Generator) -> Tensor:
    """Log-normal scores with a few hot channels, larger in the middle layers (``layer`` in [0, 1])."""
    level = _LEVELS.get(candidates.module.rpartition(".")[2], 1.0) * (0.2 + 4 * layer * (1.05 - layer))
    scores = torch.full(candidates.grid, 1e-4 * level, dtype=torch.float64)
    for side, size in enumerate(candidates.grid):
        shape = [1] * len(candidates.grid)
        shape[side] = size
        scores = scores * torch.exp(0.6 * torch.randn(size, generator=generator, dtype=torch.float64)).reshape(shape)
    return scores * torch.exp(0.5 * torch.randn(candidates.grid, generator=generator, dtype=torch.float64))


def synthetic_scores(
    num_layers: int = 8,
    *,
    kinds: dict[str, tuple[Kind, ...]] | None = None,
    block_shape: BlockShape = (32, 32),
    scale: int = 1,
    num_experts: int | None = None,
    score: str = "abs_of_mean",
    seed: int = 0,
) -> RegionScores:
    """Scores of regions in every layer.

    Args:
        num_layers: layers of the model.
        kinds: region kinds by module name; default: blocks in attention and MLP, and rows in down_proj.
        block_shape: of the blocks.
        scale: factor of all sides of the weights.
        num_experts: if given, ``mlp.experts.gate_up_proj`` is a stack of so many matrices, with blocks.
        score: name of the rule.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    if kinds is None:
        kinds = {module: ("block", "row") if module == "mlp.down_proj" else ("block",) for module in SHAPES}
    candidates: list[Candidates] = []
    layers: list[float] = []
    for layer in range(num_layers):
        shapes = {module: (height * scale, width * scale) for module, (height, width) in SHAPES.items()}
        if num_experts is not None:
            shapes["mlp.experts.gate_up_proj"] = (256 * scale, 512 * scale)
        for module, shape in shapes.items():
            stack = num_experts if "experts" in module else None
            owner = f"model.layers.{layer}.{module}"
            owners = ((owner, "weight"),) if stack is None else ((owner.rpartition(".")[0], "gate_up_proj"),)
            matrix = Matrix(name=owner, owners=owners, shape=shape, num_slices=stack, is_product=stack is None)
            for kind in ("block",) if stack is not None else kinds.get(module, ()):
                for slice_index in [None] if stack is None else range(stack):
                    candidates.append(
                        Candidates(
                            matrix=matrix,
                            slice_index=slice_index,
                            kind=kind,
                            block_shape=block_shape if kind == "block" else (0, 0),
                            score=score,
                            pick="max",
                            per_matrix=None,
                        )
                    )
                    layers.append(layer / max(num_layers - 1, 1))
    values = {(c.weight, c.kind): _values(c, layer, generator) for c, layer in zip(candidates, layers, strict=True)}
    return RegionScores(candidates, values, {"num_calibration_batches": 32})


def best_regions(scores: RegionScores, share: float = 0.02, whole: dict[str, int] | None = None) -> Selection:
    """The ``share`` of the regions of every kind with the highest scores, and vectors as a whole (name to length)."""
    chosen: dict[str, dict[str, Tensor]] = {}
    for kind in ("block", "row", "column"):
        members = [c for c in scores.candidates if c.kind == kind]
        if not members:
            continue
        flat = torch.cat([scores.scores[c.weight, kind].reshape(-1) for c in members])
        cut = float(flat.sort(descending=True).values[int(share * len(flat))])
        for c in members:
            mask = scores.scores[c.weight, kind] > cut
            if mask.any():
                found = mask.nonzero() if kind == "block" else mask.nonzero().squeeze(1)
                chosen.setdefault(c.weight, {})[f"{kind}s"] = found
    shapes = {c.weight: c.shape for c in scores.candidates}
    blocks = {c.weight: c.block_shape for c in scores.candidates if c.kind == "block"}
    weights = {
        name: WeightSelection(
            shape=shapes[name],
            block_size=blocks.get(name, 0),
            blocks=parts.get("blocks", ()),
            rows=parts.get("rows", ()),
            columns=parts.get("columns", ()),
        )
        for name, parts in chosen.items()
    }
    weights |= {name: WeightSelection(shape=(length, 1), whole=True) for name, length in (whole or {}).items()}
    num_layers = 1 + max(int(c.weight.split(".")[2]) for c in scores.candidates)
    return Selection(
        weights,
        {
            "num_layers": num_layers,
            "num_parameters_model": 30_000_000,
            "num_parameters_left": 812,
            "cut_margin": 3.1e-4,
        },
    )
