"""Published selection rules, written down again as plain loops over dense gradients: does select choose the same?

Each reference is written from the paper's description alone. It shares no code with the package: gradients are
autograd's, accumulated densely; regions are slices in Python loops; rankings are sorted lists.
"""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import sparse_zero as sz

QKV = "*.{q,k,v}_proj"


class Attention(nn.Module):
    """Projections between widths 768 and 512, so that the published block size of 256 divides them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = torch.tanh(self.q_proj(x)) * torch.tanh(self.k_proj(x)) + self.v_proj(x)
        return x + self.o_proj(mixed)


class Model(nn.Module):
    def __init__(self, width: int, inner: int, num_layers: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(24, width)
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": Attention(width, inner)}) for _ in range(num_layers))
        self.lm_head = nn.Linear(width, 24, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer["self_attn"](x)
        logits: Tensor = self.lm_head(x)
        return logits


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def make(width: int = 768, inner: int = 512, dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(3)
    return Model(width, inner).to(dtype)


def batches(number: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, 24, (2, 7), generator=generator) for _ in range(number)]


def weights(model: nn.Module, endings: Iterable[str]) -> dict[str, Tensor]:
    found = {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: weight for name, weight in found.items() if name.removesuffix(".weight").endswith(tuple(endings))}


def gradients(model: nn.Module, endings: Iterable[str], data: Iterable[Tensor]) -> list[dict[str, Tensor]]:
    """The dense gradient of every micro-batch."""
    found = []
    for batch in data:
        model.zero_grad()
        loss(model, batch).backward()
        found.append({name: weight.grad.clone() for name, weight in weights(model, endings).items()})
    model.zero_grad()
    return found


def accumulated(model: nn.Module, endings: Iterable[str], data: Iterable[Tensor]) -> dict[str, Tensor]:
    steps = gradients(model, endings, data)
    return {name: torch.stack([step[name] for step in steps]).sum(0) for name in steps[0]}


def block_means(matrix: Tensor, size: int) -> list[tuple[float, int, int]]:
    """(mean of the block, i, j) of all blocks of a grid whose last ones may be smaller."""
    return [
        (float(matrix[top : top + size, left : left + size].mean()), top // size, left // size)
        for top in range(0, matrix.shape[0], size)
        for left in range(0, matrix.shape[1], size)
    ]


def chosen_blocks(selection: sz.Selection) -> dict[str, list[tuple[int, int]]]:
    return {name: [(i, j) for i, j in weight.blocks.tolist()] for name, weight in selection.weights.items()}


def grouped(triples: Iterable[tuple[str, int, int]]) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for name, i, j in triples:
        found.setdefault(name, []).append((i, j))
    return {name: sorted(found[name]) for name in sorted(found)}


# -- SMT, arXiv 2405.15525


def smt_candidates(model: nn.Module, score: str, size: int) -> list[tuple[float, str, int, int]]:
    """Section 3.2: gradients of q, k and v, summed over the steps, averaged within each sub-matrix."""
    summed = accumulated(model, ("q_proj", "k_proj", "v_proj"), batches())
    found = []
    for name, gradient in summed.items():
        means = block_means(gradient if score == "abs_of_mean" else gradient.abs(), size)
        found += [(abs(mean), name, i, j) for mean, i, j in means]
    return found


SHAPES = [(768, 512, 256, 9), (768, 512, 64, 77), (100, 70, 16, 30)]


@pytest.mark.parametrize("score", ["abs_of_mean", "mean_of_abs"])
@pytest.mark.parametrize(("width", "inner", "size", "number"), SHAPES)
def test_smt_takes_the_highest_blocks_of_all_matrices(score, width, inner, size, number):
    model = make(width, inner)
    ranked = sorted(smt_candidates(model, score, size), reverse=True)
    config = sz.SelectionConfig(
        regions=(sz.RegionConfig(kind="block", modules=(QKV,), block_size=size),),
        score=score,
        accumulator_dtype="float64",
        budget=sz.BudgetConfig(regions=number),
    )
    selection = sz.select(model, batches(), config, loss)
    assert chosen_blocks(selection) == grouped((name, i, j) for _, name, i, j in ranked[:number])


@pytest.mark.parametrize("score", ["abs_of_mean", "mean_of_abs"])
def test_smt_in_fp32_with_the_published_block_size(score):
    """As above where sums are rounded; the cut is far wider than that."""
    model = make(dtype=torch.float32)
    ranked = sorted(smt_candidates(model, score, 256), reverse=True)
    assert ranked[8][0] > ranked[9][0] * (1 + 1e-4)
    config = sz.SelectionConfig(
        regions=(sz.RegionConfig(kind="block", modules=(QKV,), block_size=256),),
        score=score,
        budget=sz.BudgetConfig(regions=9),
    )
    selection = sz.select(model, batches(), config, loss)
    assert chosen_blocks(selection) == grouped((name, i, j) for _, name, i, j in ranked[:9])


@pytest.mark.parametrize("score", ["abs_of_mean", "mean_of_abs"])
@pytest.mark.parametrize(("width", "inner", "size", "number"), SHAPES)
def test_smt_norm_dist_takes_equally_many_blocks_of_every_matrix(score, width, inner, size, number):
    model = make(width, inner)
    candidates = smt_candidates(model, score, size)
    names = sorted({name for _, name, _, _ in candidates})
    each = number // len(names)
    expected = [
        (name, i, j)
        for wanted in names
        for _, name, i, j in sorted((c for c in candidates if c[1] == wanted), reverse=True)[:each]
    ]
    config = sz.SelectionConfig(
        regions=(sz.RegionConfig(kind="block", modules=(QKV,), block_size=size),),
        score=score,
        accumulator_dtype="float64",
        budget=sz.BudgetConfig(regions=each * len(names), over="matrix"),
    )
    selection = sz.select(model, batches(), config, loss)
    assert chosen_blocks(selection) == grouped(expected)


def test_smt_scores_the_gradients_of_real_fine_tuning():
    """The paper's calibration: full fine-tuning with AdamW meanwhile, here two steps of two micro-batches."""
    model, trained = make(dtype=torch.float32), make(dtype=torch.float32)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3, weight_decay=0.0)
    summed: dict[str, Tensor] = {}
    for step in (batches()[:2], batches()[2:]):
        optimizer.zero_grad()
        (sum(loss(trained, batch) for batch in step) / 2).backward()
        for name, weight in weights(trained, ("q_proj", "k_proj", "v_proj")).items():
            assert weight.grad is not None
            summed[name] = weight.grad.clone() if name not in summed else summed[name] + weight.grad
        optimizer.step()
    ranked = sorted(
        ((abs(mean), name, i, j) for name, each in summed.items() for mean, i, j in block_means(each, 256)),
        reverse=True,
    )
    assert ranked[8][0] > ranked[9][0] * (1 + 1e-3)
    config = sz.SelectionConfig(
        regions=(sz.RegionConfig(kind="block", modules=(QKV,), block_size=256),),
        score="abs_of_mean",
        calibration_weights="full",
        full_calibration=sz.FullCalibrationConfig(learning_rate=3e-3, batches_per_step=2),
        budget=sz.BudgetConfig(regions=9),
    )
    frozen = replace(config, calibration_weights="frozen")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    selection = sz.select(model, batches(), config, loss)
    assert chosen_blocks(selection) == grouped((name, i, j) for _, name, i, j in ranked[:9])
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    # The training matters: frozen weights choose others here.
    assert sz.select(model, batches(), frozen, loss) != selection


# -- RoCoFT, arXiv 2410.10075


@pytest.mark.parametrize("kind", ["row", "column"])
@pytest.mark.parametrize("number", [1, 3])
def test_rocoft_takes_the_first_rows_or_columns(kind, number):
    model = make(100, 70)
    config = sz.SelectionConfig(
        regions=(sz.RegionConfig(kind=kind, modules=("*.{q,k,v,o}_proj",), per_matrix=number),), score="first"
    )
    selection = sz.select(model, None, config)
    assert len(selection.weights) == 8
    for weight in selection.weights.values():
        assert (weight.rows if kind == "row" else weight.columns).tolist() == list(range(number))
        assert weight.num_parameters == number * (weight.shape[1] if kind == "row" else weight.shape[0])


def test_random_takes_every_row_about_equally_often():
    """RoCoFT's ablation. Each of 70 rows is taken with chance 0.1 in 300 draws; 5.2 is its standard deviation."""
    model = make(100, 70)
    counts: dict[str, Tensor] = {}
    for seed in range(300):
        config = sz.SelectionConfig(
            regions=(sz.RegionConfig(kind="row", modules=("layers.0.*.{q,v}_proj",), per_matrix=7),),
            score="random",
            seed=seed,
        )
        selection = sz.select(model, None, config)
        for name, weight in selection.weights.items():
            assert len(weight.rows) == 7
            counts.setdefault(name, torch.zeros(70))[weight.rows] += 1
    assert len(counts) == 2
    for count in counts.values():
        assert float((count - 30).abs().max()) < 5 * 5.2
    assert not torch.equal(*counts.values())


@pytest.mark.parametrize("kind", ["row", "column"])
@pytest.mark.parametrize("pick", ["max", "min", "mixed"])
@pytest.mark.parametrize("number", [4, 5])
def test_rocoft_wanda_takes_the_highest_lowest_or_half_of_each(kind, pick, number):
    """Scores |w| times the norm of the input channel (Wanda, arXiv 2306.11695), added up over the row or column."""
    model = make(100, 70)
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, inputs, __, name=name: seen.setdefault(f"{name}.weight", []).append(inputs[0].flatten(0, -2))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches():
            model(batch)
    for handle in handles:
        handle.remove()
    expected = {}
    for name, weight in weights(model, ("q_proj", "o_proj")).items():
        norms = [float(column.square().sum().sqrt()) for column in torch.cat(seen[name]).T]
        out_features, in_features = weight.shape
        table = weight.abs().tolist()
        if kind == "row":
            scores = [sum(table[o][i] * norms[i] for i in range(in_features)) for o in range(out_features)]
        else:
            scores = [sum(table[o][i] for o in range(out_features)) * norms[i] for i in range(in_features)]
        falling = sorted(range(len(scores)), key=lambda index: -scores[index])
        upper = {"max": number, "min": 0, "mixed": (number + 1) // 2}[pick]
        expected[name] = sorted(falling[:upper] + falling[len(falling) - (number - upper) :])
    config = sz.SelectionConfig(
        regions=(sz.RegionConfig(kind=kind, modules=("*.{q,o}_proj",), per_matrix=number, pick=pick),), score="wanda"
    )
    selection = sz.select(model, batches(), config, loss)
    found = {n: (w.rows if kind == "row" else w.columns).tolist() for n, w in selection.weights.items()}
    assert found == expected


# -- DiaBlo, arXiv 2506.03230


@pytest.mark.parametrize(
    ("width", "inner", "number"), [(96, 96, 8), (768, 512, 64), (100, 70, 10), (512, 512, 2), (96, 32, 1)]
)
def test_diablo_trains_the_diagonal_of_a_grid(width, inner, number):
    model = make(width, inner)
    config = sz.SelectionConfig(
        regions=(sz.RegionConfig(kind="block", modules=("*.{q,o}_proj",), blocks_per_side=number, per_matrix=number),),
        score="diagonal",
    )
    selection = sz.select(model, None, config)
    assert len(selection.weights) == 4
    for name, weight in weights(model, ("q_proj", "o_proj")).items():
        height, width_of_block = weight.shape[0] // number, weight.shape[1] // number
        expected = torch.zeros(weight.shape, dtype=torch.bool)
        for index in range(number):
            rows = slice(index * height, (index + 1) * height)
            expected[rows, index * width_of_block : (index + 1) * width_of_block] = True
        found = torch.zeros(weight.numel(), dtype=torch.bool)
        found[selection.weights[name].flat_indices("block")] = True
        assert torch.equal(found.reshape(weight.shape), expected)
        assert selection.weights[name].num_parameters == weight.numel() // number


# -- Fisher information over mixed kinds, and SNIP


@pytest.mark.parametrize("score", ["squared", "gradient_times_weight"])
def test_kinds_compete_by_statistics_of_every_micro_batch(score):
    """The mean over micro-batches of g^2 (FISH mask, arXiv 2111.09839) or |g w| (SNIP, arXiv 1810.02340) per entry."""
    model = make(50, 30)
    steps = gradients(model, ("q_proj", "k_proj"), batches())
    ranked: list[tuple[float, str, str, list[int]]] = []
    for name, weight in weights(model, ("q_proj", "k_proj")).items():
        per_step = [step[name] ** 2 if score == "squared" else (step[name] * weight.detach()).abs() for step in steps]
        matrix = torch.stack(per_step).mean(0)
        numbers = torch.arange(weight.numel()).reshape(weight.shape)
        parts = [("row", slice(r, r + 1), slice(None)) for r in range(weight.shape[0])]
        parts += [("column", slice(None), slice(c, c + 1)) for c in range(weight.shape[1])]
        parts += [
            ("block", slice(top, top + 8), slice(left, left + 8))
            for top in range(0, weight.shape[0], 8)
            for left in range(0, weight.shape[1], 8)
        ]
        for kind, rows, columns in parts:
            mean, inside = float(matrix[rows, columns].mean()), numbers[rows, columns].flatten()
            ranked.append((mean, name, kind, inside.tolist()))
    ranked.sort(reverse=True)
    budget = 1500
    covered: dict[str, set[int]] = {}
    for _, name, _, entries in ranked:
        added = set(entries) - covered.get(name, set())
        if sum(map(len, covered.values())) + len(added) > budget:
            break
        covered.setdefault(name, set()).update(added)
    config = sz.SelectionConfig(
        regions=(
            sz.RegionConfig(kind="row", modules=("*.{q,k}_proj",)),
            sz.RegionConfig(kind="column", modules=("*.{q,k}_proj",)),
            sz.RegionConfig(kind="block", modules=("*.{q,k}_proj",), block_size=8),
        ),
        score=score,
        accumulate="per_step",
        budget=sz.BudgetConfig(parameters=budget),
    )
    selection = sz.select(model, batches(), config, loss)
    found = {
        name: {at for kind in weight.kinds() for at in weight.flat_indices(kind).tolist()}
        for name, weight in selection.weights.items()
    }
    assert found == covered
    assert set(selection.num_parameters_by_kind()) == {"block", "row", "column"}
