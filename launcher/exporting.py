"""How does an adapter become a plain model folder, which transformers loads without this package, or one to upload?"""

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from launcher.adapter_card import adapter_card, base_model_name, for_others
from launcher.config import RunConfig
from launcher.deepspeed_config import deepspeed_config
from launcher.kept_base import model_of
from models.base_identity import base_identity
from models.classification import set_up_classifier
from models.classified_data import Labels, find_labels, stored_labels
from models.heads import head_is_new, head_text
from models.loading import ModelConfig, load_model, load_tokenizer, model_folder, validate_model_source
from models.sharded_loading import load_sharded
from models.sharded_saving import save_sharded
from models.source import is_hub_name, local_folder
from sparse_zero.checkpoint.adapter import SELECTION, peft_config, read_adapter, read_adapter_base, write_adapter
from sparse_zero.checkpoint.adapter_set import load_adapter
from sparse_zero.checkpoint.folders import new_folder
from sparse_zero.collectives import failing_together, rank_and_world_size
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_text
from sparse_zero.layers.merge import merge
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.compat import has_shards

# In the metadata of an adapter's selection: the words of a classifier's classes, in their order.
_LABELS = "labels"


def _source(config: RunConfig, adapter: Path | None) -> ModelConfig:
    """What to load for an adapter: ``config.model``, or the base that calibration kept, if it was trained on that.

    Raises:
        InputError: the adapter was trained on another base.
    """
    stored = None if adapter is None else read_adapter_base(adapter)
    source = model_of(config, stored)
    validate_model_source(source)
    if stored is not None:
        folder = model_folder(source)
        head = head_text(source, folder, config.training.seed)
        found = base_identity(folder, source.gguf_file, head=head)
        if found.sha256 != stored.sha256:
            made = "" if head is None else f" with the {head} (training.seed)"
            raise InputError(
                f"{adapter} was trained on the base {stored.name} ({stored.sha256[:12]}), and "
                f"model.name_or_path is {found.name}{made} ({found.sha256[:12]}): name the base it was trained on"
            )
    return source


def load_with_adapter(config: RunConfig, adapter: Path | None) -> tuple[Any, Any]:
    """(model, tokenizer): the base, with an adapter acting on it if one is given. Works without a GPU.

    A quantized base stays one, with the adapter beside it; in any other the adapter is folded in.

    The base is ``config.model``, or, for an adapter that was trained on it, the one that calibration kept.

    Raises:
        InputError: the base or the adapter cannot be loaded, or they do not belong together.
    """
    source = _source(config, adapter)
    model, tokenizer = load_model(source, head_seed=config.training.seed), load_tokenizer(source)
    _set_up(config, source, model, tokenizer, adapter)
    if adapter is not None:
        quantized = source.quantization != "none"
        load_adapter(model, adapter, placement="delta" if quantized else "inplace")
        if not quantized:
            merge(model)
    return model, tokenizer


def _set_up(config: RunConfig, source: ModelConfig, model: Any, tokenizer: Any, adapter: Path | None) -> None:
    if config.model.classifies:
        set_up_classifier(model, tokenizer, labels_of(config, source, adapter=adapter))


def record_labels(metadata: MutableMapping[str, Any], labels: Labels) -> None:
    """Write the words of the classes into the metadata of a selection, which goes with its adapter."""
    if labels.names is not None:
        metadata[_LABELS] = list(labels.names)


def _recorded_labels(adapter: Path, num_labels: int) -> tuple[str, ...] | None:
    if not (adapter / SELECTION).is_file():
        return None  # That it is no adapter is told where it is loaded.
    found = Selection.load(adapter / SELECTION).metadata.get(_LABELS)
    if not isinstance(found, list) or len(found) != num_labels or not all(isinstance(each, str) for each in found):
        return None
    return tuple(found)


def labels_of(
    config: RunConfig,
    source: ModelConfig,
    records: Sequence[Mapping[str, str]] | None = None,
    adapter: Path | None = None,
) -> Labels:
    """What the labels of a classifier's data mean.

    Args:
        config: of the run.
        source: the model that is loaded.
        records: of data.train; None: they are read if it takes them.
        adapter: folder of one that was trained on words tells them, in their order; data.train may be another by now.

    Raises:
        InputError: see :func:`models.classified_data.find_labels`, or ``data.labels`` are others than the adapter's.
    """
    assert config.model.num_labels is not None
    recorded = None if adapter is None else _recorded_labels(adapter, config.model.num_labels)
    if recorded is not None:
        wanted = config.data.labels
        if wanted is not None and wanted != recorded:
            raise InputError(
                f"data.labels is {', '.join(wanted)}, and {adapter} was trained with {', '.join(recorded)}, in this "
                "order: leave data.labels out, or set it to that"
            )
        return Labels(num_labels=config.model.num_labels, names=recorded)
    return find_labels(config.data, config.model.num_labels, records, stored_labels(model_folder(source)))


def load_merged(config: RunConfig, adapter: Path | None) -> tuple[Any, Any]:
    """Like :func:`load_with_adapter`, as a plain dense model also where the base is quantized."""
    model, tokenizer = load_with_adapter(config, adapter)
    if adapter is not None and config.model.quantization != "none":
        merge(model)
    return model, tokenizer


def load_merged_shards(config: RunConfig, adapter: Path | None, world_size: int) -> tuple[Any, Any]:
    """Like :func:`load_merged`, with the model in shards, none of which is ever put together. Collective.

    Raises:
        InputError: as there, on all ranks together.
    """
    with failing_together():
        source = _source(config, adapter)
        tokenizer = load_tokenizer(source)
    model = load_sharded(source, deepspeed_config(config, world_size), head_seed=config.training.seed)
    with failing_together():
        _set_up(config, source, model, tokenizer, adapter)
    if adapter is not None:
        load_adapter(model, adapter, placement="inplace")
        merge(model)
    return model, tokenizer


def save_model_folder(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a plain Hugging Face folder (safetensors, config, tokenizer), complete or not at all.

    For one process; collective where ZeRO-3 holds the model in shards.
    """
    if has_shards(model):
        _save_shards(model, tokenizer, folder)
        return
    with new_folder(folder, manifest=False) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _save_shards(model: Any, tokenizer: Any, folder: Path) -> None:
    is_main = rank_and_world_size()[0] == 0
    with ExitStack() as stack:
        with failing_together():
            temporary = stack.enter_context(new_folder(folder, manifest=False)) if is_main else None
        save_sharded(model, temporary)
        with failing_together():
            if temporary is not None:
                tokenizer.save_pretrained(temporary)


def export(config: RunConfig, adapter: Path, folder: Path) -> int:
    """Fold ``adapter`` into the base of ``config`` and write the result to ``folder``; returns 0."""
    model, tokenizer = load_merged(config, adapter)
    save_model_folder(model, tokenizer, folder)
    print(f"merged model written to {folder}")
    return 0


def _check_names(config: RunConfig, adapter: Path) -> None:
    """Raise if the base of the run is none of its adapter: by content where it lies here, else by its name."""
    if not is_hub_name(config.model.name_or_path):
        _source(config, adapter)
        return
    stored = read_adapter_base(adapter)
    if stored is not None and "/" in stored.name and stored.name != config.model.name_or_path:
        raise InputError(
            f"{adapter} was trained on {stored.name}, and model.name_or_path is {config.model.name_or_path}: name the "
            "base it was trained on"
        )


def export_adapter(config: RunConfig, adapter: Path, folder: Path, base_model: str | None = None) -> int:
    """Write ``adapter`` to ``folder`` as others shall have it, with a model card; returns 0.

    The network is not needed, and the base only where ``model.name_or_path`` is a folder: it is compared then. Nothing
    in the folder names a path of this machine.

    Args:
        config: the run that the adapter comes from.
        adapter: of any format that is read.
        folder: new or empty.
        base_model: hub name of the base, if the run does not tell it.

    Raises:
        InputError: the adapter cannot be read, or is none of the run's.
    """
    _check_names(config, adapter)
    if config.model.classifies and head_is_new(config.model, model_folder(config.model)):
        raise InputError(
            f"{adapter} stands on a head that training.seed made, which nobody else's base has: export the model "
            "instead (--as model)"
        )
    found = read_adapter(adapter)
    name = base_model_name(config.model, found.base, base_model)
    source = model_of(config, found.base)
    # A base that calibration has trained is on no hub, unless somebody says so.
    is_kept = source is not config.model
    name = base_model if is_kept else name
    base_folder = local_folder(source.name_or_path, field="model.name_or_path")
    shown = for_others(found, name)
    card = adapter_card(config, shown, name, base_folder)
    # PEFT's own classifiers would keep the head apart, whose values are here.
    task_type = None if config.model.classifies else "CAUSAL_LM"
    write_adapter(folder, shown, peft_config(base_model=name, task_type=task_type))
    # Not in the manifest: cards are edited.
    atomic_write_text(folder / "README.md", card)
    print(f"adapter to upload written to {folder}")
    if name is None:
        print("the base's name on the hub is not known: give --base-model owner/model")
    return 0
