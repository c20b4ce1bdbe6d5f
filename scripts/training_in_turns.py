"""How does each side of an end-to-end comparison train, one step whenever it is its turn?

Each in a process of its own: ours is the real `sparse-zero train`, whose log of metrics waits after every step; the
other is PEFT's LoRA under transformers' Trainer, with a callback that waits: as it comes, and with micro-batches as
small as ours. All see the same samples in the same batches.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarking import check_clock
from sparse_zero.errors import InputError

# What each method of ours has.
#   logits: logits at labels only.  packing: the micro-batch is one row.
#   lengths: a step is cut into small micro-batches of like length.  depth: only upper layers are trained.
PARTS: Mapping[str, frozenset[str]] = {
    "sparse": frozenset(),
    "logits": frozenset({"logits"}),
    "packing": frozenset({"logits", "packing"}),
    "lengths": frozenset({"logits", "lengths"}),
    "depth": frozenset({"logits", "lengths", "depth"}),
}
# LoRA under Trainer; with small micro-batches, as those of the method lengths, whose flag Trainer has too.
LORA = ("lora", "lora_small")
# The method that each is the next one after.
PREVIOUS = {
    "lora_small": "lora",
    "sparse": "lora",
    "logits": "sparse",
    "packing": "logits",
    "lengths": "lora_small",
    "depth": "lengths",
}
METHODS = (*LORA, *PARTS)


def device() -> str:
    """Where every side trains: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison."""

    model: str = ""  # folder of a model; none: SmolLM2-135M-Instruct, got once
    data: str = ""  # folder with train and validation records; none: they are made
    question: str = "instruction"  # field of the records
    answer: str = "output"  # field of the records
    modules: str = "q_proj,k_proj,v_proj"  # trained, joined by commas
    rank: int = 16  # of LoRA; ours trains at most as many parameters
    block_size: int = 64
    min_depth: float = 0.5  # of the method depth
    calibration_batches: int = 8  # of two samples
    batch: int = 8  # samples of a step
    micro_batch: int = 8  # samples of a forward pass
    small_batch: int = 1  # the same of the methods lora_small, lengths and depth
    max_length: int = 512
    steps: int = 12  # of every method
    warmup: int = 2  # of them, not timed
    validation: int = 32  # records
    learning_rate: float = 1e-3  # of ours, constant
    lora_learning_rate: float = 1e-3  # of LoRA, constant
    threads: int = 2
    # wall: the time of a turn. cpu: what the process has computed in it, without what others do on the machine; on a
    # machine of one's own the two are alike. For one thread, and without a GPU.
    clock: str = "wall"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise InputError(f"--warmup {self.warmup} of --steps {self.steps} leaves nothing to time: raise --steps")
        check_clock(self.clock, self.threads, device())
        for name in ("micro_batch", "small_batch"):
            if self.batch % getattr(self, name):
                flag = name.replace("_", "-")
                raise InputError(f"--batch {self.batch} is no multiple of --{flag} {getattr(self, name)}: make it one")

    def micro_batch_of(self, method: str) -> int:
        """Samples of a forward pass."""
        is_small = method == "lora_small" or "lengths" in PARTS.get(method, frozenset())
        return self.small_batch if is_small else self.micro_batch


SMALL = Settings(rank=4, block_size=8, batch=4, micro_batch=2, steps=3, warmup=1, validation=4, threads=1)


class Turns:
    """This process's side of taking turns: it tells that it is ready or has done a step, and waits for its turn."""

    def __init__(self, connection: Connection, num_steps: int) -> None:
        self.connection, self.num_steps, self.done = connection, num_steps, 0

    def begin(self, **facts: Any) -> None:
        """All is loaded; the next thing is the first step."""
        self.connection.send(facts)
        self._wait()

    def step(self) -> None:
        """A step is over, the GPU's part of it too."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.done += 1
        self.connection.send(time.process_time() - self._began)
        if self.done < self.num_steps:
            self._wait()

    def _wait(self) -> None:
        self.connection.recv()
        self._began = time.process_time()


def run_config(settings: Settings, folder: str, method: str, num_values: int) -> dict[str, Any]:
    """The YAML of our run."""
    parts = PARTS[method]
    return {
        "model": {"name_or_path": settings.model, "dtype": "float32", "attention": "sdpa"},
        "data": {
            **data_section(settings, "pack" if "packing" in parts else "pad"),
            "group_by_length": "lengths" in parts,
        },
        "selection": {
            "regions": [
                {
                    "kind": "block",
                    "block_size": settings.block_size,
                    "modules": [f"*.{name}" for name in settings.modules.split(",")],
                }
            ],
            "budget": {"parameters": num_values},
            "min_depth": settings.min_depth if "depth" in parts else 0.0,
            "calibration_batches": settings.calibration_batches,
            "calibration_batch_size": 2,
        },
        "training": {
            "steps": settings.steps,
            "global_batch_size": settings.batch,
            "micro_batch_size": settings.micro_batch_of(method),
            "learning_rate": settings.learning_rate,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "seed": settings.seed,
        },
        "zero": {"stage": 2, "placement": "inplace"},
        # Else a long run is simulated beside its first steps, which would be others' turns.
        "memory": {"simulate": False},
        "output": {"folder": f"{folder}/{method}", "adapter": False},
    }


def data_section(settings: Settings, batching: str = "pad") -> dict[str, Any]:
    """What both sides read."""
    return {
        "train": settings.data,
        "validation": settings.data,
        "fields": {"instruction": settings.question, "output": settings.answer},
        "template": "plain",
        "max_length": settings.max_length,
        "batching": batching,
    }


def replace_in(module: Any, name: str, value: Any) -> None:
    """Let a module use something else under a name that it has imported."""
    if name not in vars(module):
        raise RuntimeError(f"{module.__name__} has no {name} any more: this benchmark must be mended")
    vars(module)[name] = value


def all_positions(labels_BL: Tensor) -> Tensor:
    """[L - 1] int64: every position that has a next one, in the place of `models.loss.label_positions`."""
    return torch.arange(labels_BL.shape[1] - 1, device=labels_BL.device)


def train_ours(method: str, settings: Settings, folder: str, num_values: int, turns: Turns) -> float:
    """`sparse-zero train`, whose log of metrics is told of every step; its validation loss."""
    import yaml

    import launcher.train as worker
    import launcher.training_loop as loop
    from launcher.config import load_config
    from launcher.metrics import MetricsLog
    from sparse_zero import Selection

    run = run_config(settings, folder, method, num_values)
    path = Path(folder) / f"{method}.yaml"
    path.write_text(yaml.safe_dump(run))
    losses: list[float] = []

    class LogThatWaits(MetricsLog):
        def __init__(self, run_folder: Path, **options: Any) -> None:
            super().__init__(run_folder, **options)
            selection = Selection.load(run_folder / "selection.safetensors")
            turns.begin(trained=selection.num_parameters, lowest=selection.metadata["depth"]["lowest_layer"])

        def write(self, row: Mapping[str, object]) -> None:
            super().write(row)
            if row["kind"] == "train":
                turns.step()
            elif row["kind"] == "validation":
                losses.append(float(row["loss"]))  # type: ignore[arg-type]

    replace_in(worker, "MetricsLog", LogThatWaits)
    if "logits" not in PARTS[method]:
        replace_in(loop, "label_positions", all_positions)
    if worker.run(load_config(path, [])) != 0:
        raise RuntimeError(f"{method} failed")
    return losses[-1]


def train_lora(method: str, settings: Settings, folder: str, samples: Any, turns: Turns) -> float:
    """PEFT's LoRA under Trainer on the same batches; its validation loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from models.collate import collate_pad, response_tokens
    from models.loss import response_nll

    tokenizer, train, validation, order = samples
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32, attn_implementation="sdpa")
    model = get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            lora_dropout=0.0,
            target_modules=settings.modules.split(","),
            task_type="CAUSAL_LM",
        ),
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    class TakesTurns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.begin(trained=trained, lowest=0)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step()

    size = settings.micro_batch_of(method)
    arguments = TrainingArguments(
        f"{folder}/{method}",
        max_steps=settings.steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=settings.batch // size,
        learning_rate=settings.lora_learning_rate,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=device() == "cpu",
        disable_tqdm=True,
        seed=settings.seed,
    )
    rows = [{"input_ids": train[at].input_ids, "labels": train[at].labels} for at in order]
    collator = DataCollatorForSeq2Seq(tokenizer)
    Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[TakesTurns()]).train()
    model.eval()
    total = 0.0
    with torch.no_grad():
        for sample in validation:
            batch = {name: tensor.to(model.device) for name, tensor in collate_pad([sample], 0).items()}
            total += float(response_nll(model, batch))
    return total / response_tokens(validation)


def read_samples(settings: Settings) -> tuple[Any, Any, Any, list[int]]:
    """Tokenizer, training and validation samples, and the order in which our sampler has the former."""
    from models.data import DataConfig, FieldConfig, load_samples
    from models.loading import ModelConfig, load_tokenizer
    from models.sampler import BatchSampler

    tokenizer = load_tokenizer(ModelConfig(name_or_path=settings.model))
    section = data_section(settings)
    config = DataConfig(**{**section, "fields": FieldConfig(**section["fields"])})
    train, validation = (load_samples(config, tokenizer, split).samples for split in ("train", "validation"))
    sampler = BatchSampler(len(train), settings.batch, settings.batch, 1, 0, settings.seed, True)
    order = [at for step in range(settings.steps) for at in sampler.step(step).global_indices]
    if len(order) < settings.steps * settings.batch:
        raise InputError(f"--data has {len(train)} records, an epoch of which ends in a smaller batch: lower --steps")
    return tokenizer, train, validation, order


def child(method: str, settings: Settings, folder: str, num_values: int, connection: Connection) -> None:
    """What the process of a method does."""
    torch.set_num_threads(settings.threads)
    sys.stdout = sys.stderr = open(Path(folder) / f"{method}.log", "w")  # noqa: SIM115
    turns = Turns(connection, settings.steps)
    if method in PARTS:
        loss = train_ours(method, settings, folder, num_values, turns)
    else:
        loss = train_lora(method, settings, folder, read_samples(settings), turns)
    connection.send(loss)
