"""What does the model card of an adapter say, and what of this machine must it and its files not say?"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from models.loading import ModelConfig
from models.records import HUB_NAME as DATA_NAME
from models.records import SUFFIXES
from models.source import HUB_NAME, is_hub_name
from sparse_zero.checkpoint.adapter import Adapter
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.errors import InputError
from sparse_zero.selection.selection import Selection

# Settings of a selection that name files and folders.
_PATHS = ("file", "accumulator_folder", "keep_weights_in")
# What of the base's own card holds for everything made from it.
_INHERITED = ("license", "license_name", "license_link", "language")


def base_model_name(model: ModelConfig, base: BaseIdentity | None, given: str | None) -> str | None:
    """The hub name of an adapter's base; None where nothing tells it.

    Args:
        model: the base of the run.
        base: as the adapter has it.
        given: by the user, who knows best.

    Raises:
        InputError: ``given`` is no hub name.
    """
    if given is not None:
        if "/" not in given or not HUB_NAME.fullmatch(given):
            raise InputError(f"--base-model is {given!r}: give the base's name on the hub, owner/model")
        return given
    if is_hub_name(model.name_or_path):
        return model.name_or_path
    # A snapshot of the hub's cache has the hub's name.
    return base.name if base is not None and "/" in base.name and HUB_NAME.fullmatch(base.name) else None


def _without_paths(value: Any, key: str = "") -> Any:
    """JSON values with only the last part of what names files."""
    if isinstance(value, Mapping):
        return {str(name): _without_paths(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(entry, key) for entry in value]
    if isinstance(value, str) and (key in _PATHS or value.startswith(("/", "~", "./", "../"))):
        return Path(value).name
    return value


def for_others(adapter: Adapter, base_model: str | None) -> Adapter:
    """The adapter without paths of this machine, its base under the hub's name."""
    base = adapter.base
    if base is not None:
        base = dataclasses.replace(base, name=base_model or base.name.rpartition("/")[2])
    metadata = _without_paths(adapter.selection.metadata)
    if isinstance(metadata.get("base"), dict) and base is not None:
        metadata["base"] = dataclasses.asdict(base)
    return dataclasses.replace(adapter, selection=Selection(adapter.selection.weights, metadata), base=base)


def _data_sets(config: RunConfig) -> tuple[list[str], list[str]]:
    """(names on the hub, words for all of it) of the data that was trained on."""
    source = config.data.train
    is_file = Path(source).expanduser().exists() or Path(source).suffix.lower() in SUFFIXES
    found = None if is_file and config.data.format != "hub" else DATA_NAME.fullmatch(source)
    if found is None:
        return [], [f"`{Path(source).name}` (local), split `{config.data.train_split}`"]
    return [found["path"]], [f"`{source}`, split `{config.data.train_split}`"]


def _inherited(model_folder: Path | None) -> dict[str, Any]:
    """Licence and language of the base, as far as a card lies beside its files."""
    if model_folder is None or not (model_folder / "README.md").is_file():
        return {}
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(model_folder / "README.md").data.to_dict()
    except Exception as error:  # Anybody's text and YAML.
        raise InputError(
            f"{model_folder / 'README.md'} cannot be read as a model card ({error}): correct or remove it"
        ) from error
    return {key: data[key] for key in _INHERITED if data.get(key)}


def adapter_card(config: RunConfig, adapter: Adapter, base_model: str | None, model_folder: Path | None) -> str:
    """The text of README.md, with its metadata.

    Args:
        config: the run that the adapter comes from.
        adapter: see :func:`for_others`.
        base_model: hub name of the base; None where it is not known.
        model_folder: where the base's files lie, if they are here.
    """
    from huggingface_hub import ModelCard, ModelCardData

    hub_data, data_words = _data_sets(config)
    inherited = _inherited(model_folder)
    pipeline = "text-classification" if config.model.classifies else "text-generation"
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="adapter",
        library_name="sparse-zero",
        pipeline_tag=pipeline,
        tags=["sparse-zero", "peft", pipeline],
        datasets=hub_data or None,
        **inherited,
    )
    selection, training = adapter.selection, config.training
    total = selection.metadata.get("num_parameters_model")
    share = (
        f", {100 * selection.num_parameters / total:.3g}% of the model's" if isinstance(total, int) and total else ""
    )
    is_quantized = config.model.quantization != "none"
    base_name = base_model or (adapter.base.name if adapter.base else "the base")
    kinds = ", ".join(f"{number:,} in {kind}s" for kind, number in selection.num_parameters_by_kind().items())
    length = f"{training.steps} steps" if training.steps is not None else f"{training.epochs:g} epochs"
    rows = {
        "base": f"`{base_name}`" + (f", SHA-256 of its files `{adapter.base.sha256}`" if adapter.base else ""),
        "trained parameters": f"{selection.num_parameters:,}{share} ({kinds}, in {len(selection.weights)} weights)",
        "frozen entries of earlier selections": f"{adapter.retired.num_entries:,}",
        "placement": f"`{adapter.placement}`",
        "held in": config.model.dtype
        + ("" if config.model.quantization == "none" else f", {config.model.quantization}"),
        "data": "; ".join(data_words),
        "prompts": f"template `{config.data.template}`, at most {config.data.max_length} tokens",
        "training": f"{length}, {training.global_batch_size} samples a step, {training.optimizer}, learning rate "
        f"{training.learning_rate:g} ({training.schedule}), {training.precision}, seed {training.seed}",
    }
    if adapter.retired.num_entries == 0:
        del rows["frozen entries of earlier selections"]
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    licence = (
        ""
        if "license" in inherited
        else "\nThe licence of the base holds for what is made from it. It was not found beside the base's files: add "
        "it above as `license`.\n"
    )
    text = _TEXT.format(
        base=base_name,
        base_argument=base_model or "folder of the base",
        dtype=config.model.dtype,
        auto_class="AutoModelForSequenceClassification" if config.model.classifies else "AutoModelForCausalLM",
        table=table,
        licence=licence,
        quantized=_QUANTIZED.format(form=config.model.quantization) if is_quantized else "",
        argument=', placement="delta"' if is_quantized else "",
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


_QUANTIZED = "It was trained over the base in {form}:\ngive `from_pretrained` the `quantization_config` for that.\n"

_TEXT = """
# Sparse adapter of {base}

Values for selected blocks, rows, columns and vectors of the base's weights, trained with sparse-zero; all other weights
are those of the base.

| what | |
|---|---|
{table}
{licence}
## How to load it

`pip install 'sparse-zero[peft]'`. The adapter's files name the base by hashes of the entries that they change: on any
other base they are refused. {quantized}
The base, and the adapter's files:

```python
from huggingface_hub import snapshot_download
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{base_argument}", dtype="{dtype}")
adapter = snapshot_download("owner/this-adapter")  # or a folder with its files
```

With sparse-zero:

```python
import sparse_zero as sz

sz.load_adapter(model, adapter{argument})
```

With PEFT:

```python
import sparse_zero as sz
from peft import PeftModel

sz.register_peft()
model = PeftModel.from_pretrained(model, adapter)
```

As a plain model, after either of them:

```python
sz.merge(model)  # with PEFT: model = model.merge_and_unload()
model.save_pretrained("merged")
```
"""
