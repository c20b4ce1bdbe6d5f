#!/usr/bin/env python3
"""Is training under ZeRO what plain AdamW on the dense model does, whatever the stage, placement and number of ranks?

Every combination is a real DeepSpeed engine on real ranks (gloo) that trains blocks, rows and columns of a tiny Llama
for some steps. Its losses are compared with those of one process that forms all gradients of the dense model and
updates (and decays) the selected entries only. In bf16 that reference, too, is run in bf16 (with fp32 masters; the
batch as one, in 4 and in 16 pieces): how far it is from fp32 says how far rounding alone leads. A combination that is
refused is listed with the reason.

By default gradient checkpointing and weight decay alternate over the combinations; --all crosses them as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import sparse_zero as sz
from models.loading import checkpoint_activations
from scripts.benchmarking import among_ranks, chosen_names, exit_code, start_ranks
from scripts.dense_reference import adamw_on_entries
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json
from sparse_zero.zero.config import PLACEMENTS, Placement

# What a step works on: it divides by every (ranks x accumulation) up to 4 x 4.
GLOBAL_BATCH, LENGTH, VOCABULARY = 48, 12, 64
LEARNING_RATE, DECAY, CLIP = 3e-3, 0.1, 0.5
# Largest relative difference of a loss in fp32; in bf16, in multiples of the dense reference's own distance to fp32.
# Under delta one product more is rounded.
TOLERANCE, TOLERANCE_BF16 = 1e-5, 3.0


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One way to train."""

    stage: Literal[0, 1, 2, 3]
    placement: Placement
    dtype: Literal["float32", "bfloat16"]
    offload: bool  # masters and moments on the host; at stage 3 the base's shards, too
    accumulation: int
    checkpointing: bool
    decay: float


def combinations(
    cross_all: bool, stages: Sequence[int] = (0, 1, 2, 3), dtypes: Sequence[str] = ("float32", "bfloat16")
) -> Iterator[Combination]:
    """All of them, or with checkpointing and decay alternating; at some stages, in some dtypes."""
    for number, (stage, placement, dtype, offload, accumulation) in enumerate(
        itertools.product((0, 1, 2, 3), PLACEMENTS, ("float32", "bfloat16"), (False, True), (1, 4))
    ):
        if stage not in stages or dtype not in dtypes:
            continue
        # Both of each meet every other setting: the bits of the number are the settings.
        odd, half = number.bit_count() % 2 == 1, (number ^ number >> 2 ^ number >> 4) % 2
        pairs = itertools.product((False, True), (0.0, DECAY)) if cross_all else [(odd, DECAY * half)]
        for checkpointing, decay in pairs:
            yield Combination(
                stage=stage,  # type: ignore[arg-type]
                placement=placement,
                dtype=dtype,  # type: ignore[arg-type]
                offload=offload,
                accumulation=accumulation,
                checkpointing=checkpointing,
                decay=decay,
            )


def make_model(dtype: str) -> Any:
    """The same tiny Llama, with weights that both dtypes can hold, on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).bfloat16().to(getattr(torch, dtype)).train()


def make_selection(model: Any) -> sz.Selection:
    """Overlapping blocks, rows and columns, some of them ragged, at random."""
    return sz.select(
        model,
        None,
        sz.SelectionConfig(
            regions=(
                sz.RegionConfig(kind="block", block_size=16, modules=("*.self_attn.*_proj",), per_matrix=3),
                sz.RegionConfig(kind="block", block_size=40, modules=("*.down_proj",), per_matrix=2),
                sz.RegionConfig(kind="row", modules=("*.{v,gate,up}_proj",), per_matrix=2),
                sz.RegionConfig(kind="column", modules=("*.{v,o,up}_proj",), per_matrix=2),
            ),
            score="random",
        ),
    )


def masks_of(selection: sz.Selection) -> dict[str, Tensor]:
    """[out, in] bool: the selected entries of each weight."""
    masks = {}
    for name, regions in selection.weights.items():
        mask = torch.zeros(regions.shape, dtype=torch.bool)
        mask[regions.rows, :] = True
        mask[:, regions.columns] = True
        height, width = regions.block_shape
        for i, j in regions.blocks.tolist():
            mask[i * height : (i + 1) * height, j * width : (j + 1) * width] = True
        masks[name] = mask
    return masks


def make_batches(steps: int) -> Tensor:
    """[steps, GLOBAL_BATCH, LENGTH] token ids."""
    return torch.randint(0, VOCABULARY, (steps, GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Mean next-token loss."""
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def reference(combination: Combination, steps: int, pieces: int = 1) -> list[float]:
    """Losses of the dense model in one process, without gradient checkpointing; the batch as one, or in pieces."""
    model = make_model(combination.dtype)

    def mean_loss(model: Any, tokens: Tensor) -> Tensor:
        return torch.stack([loss_of(model, piece) for piece in tokens.chunk(pieces)]).mean()

    return adamw_on_entries(
        model,
        masks_of(make_selection(model)),
        mean_loss,
        make_batches(steps),
        combination.placement,
        learning_rate=LEARNING_RATE,
        decay=combination.decay,
        clip=CLIP,
    )[0]


def engine_config(combination: Combination, micro_batch: int) -> dict[str, Any]:
    """DeepSpeed's config."""
    zero: dict[str, Any] = {"stage": combination.stage}
    if combination.offload:
        if combination.stage == 0:
            raise InputError("offload: at stage 0 DeepSpeed has nothing partitioned that it could offload")
        zero["offload_optimizer"] = {"device": "cpu"}
        if combination.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": combination.accumulation,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": combination.dtype == "bfloat16"},
        "steps_per_print": 2**31 - 1,
    }


def run(combination: Combination, steps: int) -> dict[str, Any]:
    """Losses of one combination on all ranks, and what its optimizer owns. Collective."""
    import torch.distributed as dist

    from sparse_zero.zero.compat import detach_engine, inner_optimizer

    rank, world_size = dist.get_rank(), dist.get_world_size()
    micro_batch = GLOBAL_BATCH // (world_size * combination.accumulation)
    try:
        config = engine_config(combination, micro_batch)
        model = make_model(combination.dtype)
        if combination.checkpointing:
            checkpoint_activations(model)
        selection = make_selection(model)
        sz.sparsify(model, selection, combination.placement)
        engine, *_ = sz.initialize(
            model=model,
            config=config,
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=combination.decay),
        )
    except InputError as error:
        return {"refused": str(error)}
    losses = []
    for tokens in make_batches(steps):
        total = torch.zeros((), dtype=torch.float64)
        for number in range(combination.accumulation):
            start = (number * world_size + rank) * micro_batch
            loss = loss_of(engine, tokens[start : start + micro_batch])
            engine.backward(loss)
            engine.step()
            total += loss.detach().double() / combination.accumulation
        dist.all_reduce(total)
        losses.append(float(total) / world_size)
    inner = inner_optimizer(engine)
    owned = torch.tensor(sum(part.numel() for part, state in inner.state.items() if "exp_avg" in state))
    dist.all_reduce(owned)
    detach_engine(engine)
    replicas = world_size if combination.stage == 0 else 1
    # Each of the groups is padded to come out even over the ranks, at stage 3 each of the values.
    padding = 2 * world_size * len(sz.trainable_parameters(model)) if combination.stage == 3 else 8 * world_size
    excess = int(owned) // replicas - selection.num_parameters
    return {"losses": losses, "owns_values_only": 0 <= excess <= padding, "trained": selection.num_parameters}


def work(options: argparse.Namespace, out: Path) -> None:
    """What each rank does: all combinations, one line of JSON each."""
    with among_ranks(1, "cpu") as rank:
        for combination in combinations(options.all, options.stages, options.dtypes):
            found = run(combination, options.steps)
            if rank == 0:
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**asdict(combination), **found}) + "\n")


def difference(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


def on_ranks(world_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of all combinations on ``world_size`` ranks, by a launcher that ends them together.

    Raises:
        RuntimeError: a rank failed; with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="verify_zero_") as folder:
        out = Path(folder) / "results.jsonl"
        arguments = ["--worker", str(out), f"--steps={options.steps}"]
        arguments += ["--stages", ",".join(map(str, options.stages)), "--dtypes", ",".join(options.dtypes)]
        arguments += ["--all"] if options.all else []
        what = f"{world_size} ranks"
        start_ranks(__file__, arguments, world_size=world_size, threads=1, device="cpu", what=what)
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def judge(results: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Put the difference to the dense reference beside each result, and whether it is small enough."""

    @functools.cache
    def expected(placement: Placement, decay: float, dtype: Literal["float32", "bfloat16"], pieces: int) -> list[float]:
        plain = Combination(
            stage=0,
            placement=placement,
            dtype=dtype,
            offload=False,
            accumulation=1,
            checkpointing=False,
            decay=decay,
        )
        return reference(plain, steps, pieces)

    for result in results:
        if "refused" in result:
            continue
        combination = Combination(**{field.name: result[field.name] for field in dataclasses.fields(Combination)})
        placement, decay = combination.placement, combination.decay
        exact = expected(placement, decay, "float32", 1)
        result["difference"] = difference(result.pop("losses"), exact)
        result["allowed"] = TOLERANCE
        if combination.dtype == "bfloat16":
            rounded = [expected(placement, decay, "bfloat16", pieces) for pieces in (1, 4, 16)]
            result["allowed"] = TOLERANCE_BF16 * max(difference(losses, exact) for losses in rounded)
        result["passed"] = result["owns_values_only"] and result["difference"] <= result["allowed"]
    return results


def print_tables(results: list[dict[str, Any]]) -> None:
    """Largest difference by number of ranks, stage, placement and dtype; what failed; what was refused, and why."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title="Largest relative loss difference to dense AdamW in one process")
    for heading in ("ranks", "stage", "placement", "dtype", "ran", "difference", "allowed", "passed"):
        table.add_column(heading, justify="left" if heading in ("placement", "dtype") else "right")
    ran = [result for result in results if "refused" not in result]
    for key, group in itertools.groupby(ran, lambda r: (r["ranks"], r["stage"], r["placement"], r["dtype"])):
        members = list(group)
        worst = max(members, key=lambda member: member["difference"] / member["allowed"])
        passed = sum(member["passed"] for member in members)
        table.add_row(
            *map(str, key), str(len(members)), f"{worst['difference']:.1e}", f"{worst['allowed']:.1e}",
            f"{passed} of {len(members)}",
        )  # fmt: skip
    console.print(table)
    for result in ran:
        if not result["passed"]:
            console.print(f"[red]FAILED[/red] {result}")
    reasons: dict[str, int] = {}
    for result in results:
        if "refused" in result:
            reasons[result["refused"]] = reasons.get(result["refused"], 0) + 1
    for reason, number in reasons.items():
        console.print(f"refused {number} times: {reason}", highlight=False)
    passed = sum(result["passed"] for result in ran)
    console.print(f"{passed} of {len(ran)} combinations passed, {len(results) - len(ran)} were refused")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options.

    Raises:
        InputError: a number of ranks that does not divide the batch.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-sizes", default="1,2,3,4", help="numbers of ranks (default: 1,2,3,4)")
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages (default: 0,1,2,3)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default: float32,bfloat16")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each (default: 20)")
    parser.add_argument("--all", action="store_true", help="cross checkpointing and decay with everything else")
    parser.add_argument("--json", type=Path, default=None, help="also write all results to this file")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = [str(size) for size in range(1, GLOBAL_BATCH) if GLOBAL_BATCH % (4 * size) == 0]
    options.world_sizes = [int(size) for size in chosen_names(options.world_sizes, known, "--world-sizes")]
    options.stages = [int(stage) for stage in chosen_names(options.stages, tuple("0123"), "--stages")]
    options.dtypes = chosen_names(options.dtypes, ("float32", "bfloat16"), "--dtypes")
    if options.steps < 1:
        raise InputError(f"--steps is {options.steps}: take at least 1")
    return options


def verify(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run, judge and show everything."""
    results = []
    for world_size in options.world_sizes:
        print(f"{world_size} ranks ...", file=sys.stderr, flush=True)
        results += [{"ranks": world_size, **result} for result in on_ranks(world_size, options)]
    judge(results, options.steps)
    print_tables(results)
    if options.json is not None:
        atomic_write_json(options.json, results)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a combination failed, 2 for wrong input."""
    passed = True

    def everything() -> None:
        nonlocal passed
        options = parse(arguments)
        if options.worker is not None:
            work(options, options.worker)
        else:
            passed = all(result.get("passed", True) for result in verify(options))

    return exit_code(everything) or (0 if passed else 1)


if __name__ == "__main__":
    sys.exit(main())
