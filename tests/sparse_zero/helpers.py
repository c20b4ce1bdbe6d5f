"""Plain references and tiny models that the tests of the library share."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection


def owner_matrix(selection: WeightSelection) -> Tensor:
    """[O, I] int: 0 where nobody owns the entry, 1 block, 2 row, 3 column. By loops, the slow and plain way."""
    owner = torch.zeros(selection.shape, dtype=torch.int64)
    height, width = selection.block_shape
    for column in selection.columns.tolist():
        owner[:, column] = 3
    for row in selection.rows.tolist():
        owner[row, :] = 2
    for i, j in selection.blocks.tolist():
        owner[i * height : (i + 1) * height, j * width : (j + 1) * width] = 1
    return owner


def plain_entries(matrix: Tensor, selection: WeightSelection) -> dict[str, Tensor]:
    """The owned entries of a dense matrix per kind in the order of the values, by Python loops."""
    owner, (height, width) = owner_matrix(selection), selection.block_shape
    out_features, in_features = selection.shape
    found: dict[str, list[Tensor]] = {"block": [], "row": [], "column": []}
    for i, j in selection.blocks.tolist():
        for r in range(i * height, min((i + 1) * height, out_features)):
            found["block"] += [matrix[r, c] for c in range(j * width, min((j + 1) * width, in_features))]
    for r in selection.rows.tolist():
        found["row"] += [matrix[r, c] for c in range(in_features) if owner[r, c] == 2]
    for c in selection.columns.tolist():
        found["column"] += [matrix[r, c] for r in range(out_features) if owner[r, c] == 3]
    return {kind: torch.stack(entries) for kind, entries in found.items() if entries}


class TinyAttention(nn.Module):
    """Three projections of one input, as in attention, then an output projection."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden, bias=True)
        self.k_proj = nn.Linear(hidden, hidden // 2, bias=False)
        self.v_proj = nn.Linear(hidden, hidden // 2, bias=False)
        self.o_proj = nn.Linear(hidden // 2, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = torch.tanh(self.k_proj(x)) * self.v_proj(x)
        return x + torch.tanh(self.q_proj(x)) + self.o_proj(mixed)


class TinyModel(nn.Module):
    """Embedding, a few layers named as in Llama, and a head; no dropout."""

    def __init__(self, hidden: int = 20, layers: int = 3, vocabulary: int = 32, tie: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            layer.self_attn = TinyAttention(hidden)
            self.layers.append(layer)
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)
        if tie:
            self.lm_head.weight = self.embed_tokens.weight
        self.checkpointing = False

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            if self.checkpointing:
                x = torch.utils.checkpoint.checkpoint(layer.self_attn, x, use_reentrant=False)
            else:
                x = layer.self_attn(x)
        logits: Tensor = self.lm_head(x)
        return logits


def tiny_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss over a batch of token ids [B, L]."""
    logits = model(tokens)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def mixed_selection(model: nn.Module, block_size: int = 6) -> Selection:
    """Blocks (ragged ones too), rows and columns that overlap, in the upper layers' projections."""
    weights: dict[str, WeightSelection] = {}
    shapes: Mapping[str, tuple[int, ...]] = {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if "_proj.weight" in name and "layers.0" not in name
    }
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        grid = (-(-shape[0] // block_size), -(-shape[1] // block_size))
        blocks = [[0, 0], [grid[0] - 1, grid[1] - 1], [0, grid[1] - 1]] if number % 3 != 1 else []
        rows = [1, shape[0] - 1] if number % 3 != 2 else []
        columns = [0, shape[1] - 2] if number % 2 == 0 else []
        weights[name] = WeightSelection(
            shape=(shape[0], shape[1]), block_size=block_size, blocks=torch.tensor(blocks), rows=rows, columns=columns
        )
    return Selection(weights)
