"""How do full fine-tuning, LoRA and ours become DeepSpeed engines over the same random Llama, on ranks of their own?"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import sparse_zero as sz
from scripts.benchmarking import among_ranks, as_flags, chosen_names, random_llama, start_ranks
from sparse_zero.errors import InputError
from sparse_zero.memory.allocator import return_freed_blocks
from sparse_zero.optional import require
from sparse_zero.zero.config import Placement

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train."""

    method: Literal["full", "lora", "ours"]
    stage: Literal[0, 1, 2, 3]
    placement: Placement = "inplace"
    quantization: Literal["none", "nf4"] = "none"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model, the batch, and how much is trained; equal for all variants."""

    hidden: int = 1024
    layers: int = 16
    heads: int = 16
    intermediate: int = 3072
    vocab: int = 32000
    batch: int = 1  # samples in a micro-batch of one rank
    length: int = 256  # tokens in a sample
    lora: int = 8  # LoRA's r on all linears; blocks of as many parameters are trained
    block_size: int = 256
    accumulation: int = 1
    bucket: int = 500_000_000  # DeepSpeed's reduce_bucket_size at stages 1 and 2, its default
    steps: int = 3  # optimizer steps that are measured
    checkpointing: int = 0  # 1: gradient checkpointing
    world_size: int = 2
    threads: int = 1  # per rank
    device: str = "cpu"
    dtype: str = "float32"
    keep_freed: int = 0  # 1: leave glibc's allocator as it is; 0: tell it to return freed blocks, as the launcher does
    seed: int = 0

    @property
    def num_trained(self) -> int:
        """LoRA's parameters: r times the sum of both sides of every linear."""
        attention, mlp = 4 * 2 * self.hidden, 3 * (self.hidden + self.intermediate)
        return self.layers * self.lora * (attention + mlp)

    def __post_init__(self) -> None:
        if self.num_trained % self.block_size**2:
            raise InputError(
                f"--lora {self.lora} trains {self.num_trained} parameters, which is no number of whole blocks of "
                f"{self.block_size}: choose another --lora or --block-size"
            )


SMALL = Settings(
    hidden=64,
    layers=2,
    heads=4,
    intermediate=192,
    vocab=128,
    length=16,
    lora=4,
    block_size=16,
)


def zero_config(variant: Variant, settings: Settings, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """DeepSpeed's config of a variant; its defaults but for the bucket, and ``options`` of its ZeRO section."""
    zero = {"stage": variant.stage, **({} if variant.stage == 3 else {"reduce_bucket_size": settings.bucket})}
    return {
        "train_micro_batch_size_per_gpu": settings.batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**zero, **(options or {})},
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "fp16": {"enabled": settings.dtype == "float16"},
        "steps_per_print": 2**31 - 1,
    }


@contextmanager
def written_base(settings: Settings) -> Iterator[Path]:
    """A folder with the random Llama, for the block."""
    with tempfile.TemporaryDirectory(prefix="sparse_zero_base_") as folder:
        random_llama(replace(settings, device="cpu")).save_pretrained(folder)
        gc.collect()  # This process is to hold no model while others are measured.
        yield Path(folder)


def load_base(variant: Variant, settings: Settings, base: Path, config: Mapping[str, Any]) -> Any:
    """The model of the folder ``base``; at stage 3 every rank reads its shards only. Collective there."""
    from models.loading import ModelConfig, checkpoint_activations, load_model
    from models.sharded_loading import load_sharded

    source = ModelConfig(
        name_or_path=str(base),
        dtype=settings.dtype,  # type: ignore[arg-type]
        quantization=variant.quantization,
    )
    model = load_sharded(source, config) if variant.stage == 3 else load_model(source, device=settings.device)
    if settings.checkpointing:
        checkpoint_activations(model)
    return model.train()


def make_engine(variant: Variant, settings: Settings, base: Path, options: Mapping[str, Any] | None = None) -> Any:
    """The engine of a variant. Collective.

    Args:
        variant: what trains.
        settings: how much is trained, and how.
        base: folder of the model.
        options: further keys of DeepSpeed's ZeRO section.
    """
    import deepspeed

    config = zero_config(variant, settings, options)
    model = load_base(variant, settings, base, config)

    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=LEARNING_RATE)

    if variant.method == "ours":
        chosen = sz.SelectionConfig(
            regions=(
                sz.RegionConfig(kind="block", block_size=settings.block_size, modules=(f"*.{{{','.join(MODULES)}}}",)),
            ),
            budget=sz.BudgetConfig(parameters=settings.num_trained),
            score="random",
            seed=settings.seed,
        )
        sz.sparsify(model, sz.select(model, None, chosen), variant.placement)
        engine, *_ = sz.initialize(model=model, config=config, optimizer=adamw, broadcast_weights=False)
        return engine
    if variant.method == "lora":
        peft = require("peft", extra="dev", purpose="compare with LoRA")
        lora = peft.LoraConfig(
            r=settings.lora,
            lora_alpha=2 * settings.lora,
            lora_dropout=0.0,
            target_modules=list(MODULES),
            bias="none",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=adamw, model_parameters=trained)
    return engine


def train(engine: Any, settings: Settings, steps: int) -> None:
    """Optimizer steps on random tokens, of each rank its own. Collective."""
    import torch.distributed as dist

    generator = torch.Generator().manual_seed(settings.seed * 1000 + dist.get_rank())
    for _ in range(steps * settings.accumulation):
        tokens = torch.randint(0, settings.vocab, (settings.batch, settings.length), generator=generator)
        tokens = tokens.to(settings.device)
        loss: Tensor = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()


def add_rank_flags(parser: argparse.ArgumentParser, variants: Sequence[str]) -> None:
    """The flags of :func:`on_ranks`, hidden, and the one that chooses variants."""
    parser.add_argument("--variants", default=",".join(variants), help="joined by commas; the number is the ZeRO stage")
    parser.add_argument("--measure", choices=list(variants), default=None, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help=argparse.SUPPRESS)


def on_ranks(script: str, variant: str, settings: Settings, base: Path) -> Any:
    """What rank 0 of a new world wrote: ``script`` is started on every rank, told to measure one variant.

    Raises:
        RuntimeError: a rank failed; with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="sparse_zero_ranks_") as folder:
        out = Path(folder) / "result.json"
        arguments = ["--measure", variant, *as_flags(settings), "--base", str(base), "--out", str(out)]
        start_ranks(
            script,
            arguments,
            world_size=settings.world_size,
            threads=settings.threads,
            device=settings.device,
            what=variant,
        )
        return json.loads(out.read_text(encoding="utf-8"))


def on_fresh_ranks(
    script: str, options: argparse.Namespace, known: Sequence[str], settings: Settings
) -> dict[str, Any]:
    """What :func:`on_ranks` gives for each variant that the command line asks for, over one base.

    Raises:
        InputError: a variant is not among the ``known``.
    """
    names = chosen_names(options.variants, list(known), "--variants")
    found = {}
    with written_base(settings) as base:
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            found[name] = on_ranks(script, name, settings, base)
    return found


def as_rank(work: Callable[[], Any], settings: Settings, out: Path) -> None:
    """Join the other ranks, do ``work``, and let rank 0 write what it returned to ``out``."""
    if not settings.keep_freed:
        return_freed_blocks()
    with among_ranks(settings.threads, settings.device) as rank:
        found = work()
        if rank == 0:
            out.write_text(json.dumps(found), encoding="utf-8")
