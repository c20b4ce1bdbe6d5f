"""What does a finished run folder look like? A made-up one, with the shapes and noise of a real run."""

import json
import math
import random
from pathlib import Path
from typing import Any

import torch

from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.selection import Selection

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def train_rows(num_steps: int = 150, skipped: tuple[int, ...] = (), seed: int = 0) -> list[dict[str, Any]]:
    """Training rows with a falling, noisy loss, a linear schedule with warm-up, and gaps where skipped."""
    noise = random.Random(seed)
    rows = []
    for step in range(1, num_steps + 1):
        done = step / num_steps
        is_skipped = step in skipped
        rows.append(
            {
                "kind": "train",
                "step": step,
                "loss": None if is_skipped else 0.35 + 2.4 * math.exp(-6 * done) + noise.gauss(0, 0.06),
                "learning_rate": 3e-3 * min(step / max(0.05 * num_steps, 1), (1 - done) / 0.95 + 1e-9),
                "gradient_norm": None if is_skipped else (0.4 + 3 * math.exp(-8 * done)) * noise.lognormvariate(0, 0.3),
                "tokens_per_second": 610 * noise.uniform(0.9, 1.1) * (0.4 if step == 1 else 1),
                "flops_per_second": 118e9 * noise.uniform(0.9, 1.1),
                "response_tokens": 1900 + noise.randrange(300),
                "step_seconds": 3.1 * noise.uniform(0.9, 1.1),
                "forward_seconds": 1.0 * noise.uniform(0.9, 1.1),
                "backward_seconds": 1.9 * noise.uniform(0.9, 1.1),
                "update_seconds": 0.1 * noise.uniform(0.9, 1.1),
                "peak_memory_bytes": int(1.31 * 2**30 + 4e7 * min(done * 4, 1)),
                "epoch": step * 16 / 4000,
                "skipped": is_skipped,
            }
        )
    return rows


def validation_rows(num_steps: int = 150, every: int = 30) -> list[dict[str, Any]]:
    """Validation rows along the same curve."""
    return [
        {
            "kind": "validation",
            "step": s,
            "loss": 0.41 + 2.4 * math.exp(-6 * s / num_steps),
            "response_tokens": 5120,
        }
        for s in range(every, num_steps + 1, every)
    ]


def selection(num_layers: int = 30, kinds: tuple[str, ...] = ("block", "row", "column"), seed: int = 0) -> Selection:
    """Random 64x64 blocks in q, k, v of the upper half, rows in the MLP, columns in down_proj."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(num_layers):
        for module, shape in SHAPES.items():
            grid = (shape[0] // 64, shape[1] // 64)
            blocks = rows = columns = torch.zeros(0, dtype=torch.int64)
            if "block" in kinds and module[-6] in "qkv" and "attn" in module and layer >= num_layers // 2:
                number = 1 + int(torch.randint(0, 8, (1,), generator=generator)) * (2 if "v_" in module else 1)
                chosen = torch.randperm(grid[0] * grid[1], generator=generator)[:number]
                blocks = torch.stack([chosen // grid[1], chosen % grid[1]], 1)
            if "row" in kinds and "mlp" in module:
                rows = torch.randperm(shape[0], generator=generator)[: 1 + layer % 3]
            if "column" in kinds and "down" in module:
                columns = torch.randperm(shape[1], generator=generator)[:2]
            weights[f"model.layers.{layer}.{module}.weight"] = WeightSelection(
                shape=shape,
                block_size=64 if len(blocks) else 0,
                blocks=blocks.reshape(-1, 2),
                rows=rows,
                columns=columns,
            )
    return Selection(weights, {"score": "abs_of_mean", "num_layers": num_layers})


def summary() -> dict[str, Any]:
    """The summary of the run."""
    return {
        "phases": {
            "load": 4.1, "evaluate_base": 62.0, "calibrate": 31.4, "train": 471.2, "evaluate_tuned": 48.8, "save": 3.9,
        },
        "accuracy": {"base": 0.0, "tuned": 0.47, "num_problems": 200},
        "forgetting": {"base": 2.3125, "tuned": 2.375, "num_tokens": 16_384},
        "parameters": {"total": 134_515_008, "trained": 1_376_256},
        "peak_memory_bytes_per_rank": [1_450_000_000, 1_430_000_000],
        "communication_bytes_per_step": {"gradients": 5_505_024, "values": 5_505_024, "weights": 0, "constants": 5},
        "tokens_per_second": 612.4,
        "adapter_bytes": 5_560_320,
        "merged_bytes": 538_090_408,
        "world_size": 2,
        "steps": 150,
        "final_loss": 0.3622,
    }  # fmt: skip


def predictions(correct: tuple[bool, ...]) -> dict[str, Any]:
    """An evaluation with one prediction per entry; texts contain what must be escaped in HTML."""
    entries = [
        {
            "index": index,
            "instruction": f"Tom has {index + 3} apples & gives <b>{index}</b> away. How many are left?",
            "answer": "3.0",
            "prediction": "3.0" if right else "",
            "text": "He has 3 left. The answer is 3.0"
            if right
            else "<script>alert('x')</script> I think it's 7 & more",
            "correct": right,
        }
        for index, right in enumerate(correct)
    ]
    return {
        "kind": "generate",
        "accuracy": sum(correct) / len(correct),
        "num_problems": len(correct),
        "correct": sum(correct),
        "predictions": entries,
    }


CONFIG = """\
model:
  name_or_path: /models/smollm2-135m
  dtype: float32
data:
  train: data/train.json
  fields: {instruction: instruction, output: output}
selection:
  regions:
  - {kind: block, modules: ['*.self_attn.{q,k,v}_proj'], block_size: 64}
  - {kind: row, modules: ['*.mlp.*'], per_matrix: 2}
training: {steps: 150, learning_rate: 0.003}
output: {folder: runs/quickstart}
"""


def write_run(folder: Path) -> Path:
    """Write all of it into ``folder``."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    rows = [
        {"kind": "event", "step": 0, "event": "started on 2 ranks"},
        *train_rows(skipped=(40, 41)),
        *validation_rows(),
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summary()))
    selection().save(folder / "selection.safetensors")
    (folder / "evaluation").mkdir()
    base = predictions((False, False, True, False, True, False))
    tuned = predictions((True, False, False, True, True, True))
    (folder / "evaluation" / "base.json").write_text(json.dumps(base))
    (folder / "evaluation" / "tuned.json").write_text(json.dumps(tuned))
    return folder
