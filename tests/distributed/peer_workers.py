"""What is started in the tests of peers: runs of ours and theirs, and the plain loop that they are held to."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from tests.distributed.spawn import run_program


def start_run(script: str, config: Path, *overrides: str, num_ranks: int = 1) -> None:
    """Run a script on ranks that have imported everything, until they end well.

    Args:
        script: train (launcher/train.py) or train_peer.
        config: its config.
        overrides: of the config.
        num_ranks: 1: it is started alone, without a launcher.
    """
    module = "scripts.accuracy.train_peer" if script == "train_peer" else "launcher.train"
    run_program(module, ["--config", str(config), *overrides], num_ranks=0 if num_ranks == 1 else num_ranks)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of the metrics of training."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def plain_lora(config: str, rank: int, modules: list[str]) -> list[float]:
    """Losses of PEFT's LoRA in a plain loop: torch's AdamW, gradients clipped at 1, the schedule by hand."""
    import peft

    from models.collate import collate
    from models.data import IGNORED, load_samples
    from models.loading import load_model, load_tokenizer
    from models.sampler import BatchSampler
    from scripts.accuracy.peer_config import load_peer_config

    settings = load_peer_config(config)
    training, steps = settings.training, settings.training.steps
    assert steps is not None
    tokenizer, model = load_tokenizer(settings.model), load_model(settings.model)
    samples = load_samples(settings.data, tokenizer, "train").samples
    torch.manual_seed(training.seed)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
    size = training.global_batch_size
    sampler = BatchSampler(len(samples), size, size, 1, 0, training.seed, True, [len(s.input_ids) for s in samples])
    warmup = math.ceil(training.warmup_fraction * steps)
    losses = []
    for step in range(steps):
        chosen = [samples[index] for index in sampler.step(step).global_indices]
        batch = collate(chosen, batching="pad", pad_token_id=tokenizer.pad_token_id)
        logits = adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        share = (step + 1) / warmup if step < warmup else 1 - (step - warmup) / (steps - warmup)
        optimizer.param_groups[0]["lr"] = training.learning_rate * share
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def reloaded(folder: str, base: str) -> dict[str, float]:
    """How far the merged model's logits are from those of the base with PEFT's adapter, and from the base's own."""
    import peft
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    run_folder = Path(folder)
    with torch.no_grad():
        of_base = AutoModelForCausalLM.from_pretrained(base)(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(run_folder / "merged")(tokens).logits
        model: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run_folder / "adapter")
        adapted = model(input_ids=tokens).logits
    return {"adapter": float((adapted - merged).abs().max()), "base": float((of_base - merged).abs().max())}
