"""What does a shipped run look like at reduced depth and width, with data of its form, so that a CPU does two steps?"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from launcher.config import RunConfig, load_config
from models.known_shapes import known_shape, transformers_config
from tests.models.tiny import tiny_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 2
_WORDS = ("pear", "apple", "train", "river", "stone", "cloud", "paper", "glass")
# By the names of whichever family has them.
_SMALL = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": None,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def write_model(config: RunConfig, folder: Path) -> Path:
    """The published model's config at 2 layers and hidden size 128, random weights, and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = known_shape(config.model.name_or_path)
    assert shape is not None, config.model.name_or_path
    values = {name: value for name, value in _SMALL.items() if name in shape.config and value is not None}
    kv_heads = shape.config.get("num_key_value_heads")
    if kv_heads is not None:
        values["num_key_value_heads"] = 4 if kv_heads == shape.config["num_attention_heads"] else 2
    small = dataclasses.replace(shape, config={**shape.config, **values})
    is_encoder = shape.config["model_type"] == "roberta"
    kind: Any = AutoModelForMaskedLM if is_encoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind.from_config(transformers_config(small)).float().save_pretrained(folder)
    tiny_tokenizer(pairs=is_encoder).save_pretrained(folder)
    return folder


def write_data(config: RunConfig, folder: Path, num_records: int = 70) -> dict[str, Path]:
    """Records of the form that the run's task has: training, and test where the run evaluates."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, fields = random.Random(0), config.data.fields

    def sentence() -> str:
        return " ".join(numbers.choices(_WORDS, k=numbers.randint(3, 8)))

    def record(index: int) -> dict[str, Any]:
        if config.model.classifies:
            classes = config.model.num_labels
            assert classes is not None
            assert fields.text is not None
            assert fields.label is not None
            label = round(numbers.uniform(0, 5), 1) if classes == 1 else index % classes
            pair = {} if fields.second_text is None else {fields.second_text: sentence()}
            return {fields.text: sentence(), **pair, fields.label: label}
        if fields.instruction == "question":  # GSM8K
            return {"question": f"{sentence()}?", "answer": f"{sentence()}. #### {index}"}
        return {
            "instruction": f"{sentence()}?\n\nAnswer format: true/false",
            "input": "",
            "output": f"the correct answer is {'true' if index % 2 else 'false'}",
            "answer": "true" if index % 2 else "false",
        }

    made = {"train": folder / "train.json", "test": folder / "test.json"}
    for path, number in zip(made.values(), (num_records, 6), strict=True):
        path.write_text(json.dumps([record(index) for index in range(number)]))
    return made


def reduced(path: Path, folder: Path) -> list[str]:
    """Overrides that make two steps on a CPU of a shipped run, in ``folder``; all else is as shipped."""
    config = load_config(path)
    model, data = write_model(config, folder / "model"), write_data(config, folder / "data")
    overrides = [
        f"--model.name_or_path={model}",
        "--model.dtype=float32",
        "--model.quantization=none",
        "--model.double_quantization=false",
        f"--data.train={data['train']}",
        "--training.epochs=null",
        f"--training.steps={STEPS}",
        # What CPUs are fast with.
        "--training.precision=fp32",
        f"--output.folder={folder / 'run'}",
    ]
    if config.data.test is not None:
        overrides.append(f"--data.test={data['test']}")
    if config.selection.needs_data:
        overrides += ["--selection.calibration_batches=2"]
    # A block of 256 would be all of a matrix, and more than the budget.
    overrides += [
        f"--selection.regions.{index}.block_size=16"
        for index, region in enumerate(config.selection.regions)
        if region.block_size is not None
    ]
    return overrides
