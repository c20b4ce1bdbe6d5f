"""What does a model look like, without its weights? Names, shapes and dtypes on torch's meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.heads import label_settings
from models.known_shapes import KnownShape, known_shape, transformers_config
from models.loading import ModelConfig, model_folder
from models.source import download, local_folder
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def load_skeleton(config: ModelConfig) -> PreTrainedModel:
    """The model that :func:`models.loading.load_model` gives, on the meta device: no weight is read or allocated.

    Raises:
        InputError: the source is missing or no causal language model.
    """
    import torch

    with torch.device("meta"):
        return _described(config, model_folder(config))


def load_shapes(config: ModelConfig) -> PreTrainedModel:
    """Like :func:`load_skeleton`, from a folder (or hub name) of which only the ``config.json`` is looked at.

    Models of :mod:`models.known_shapes` need no folder and no network.

    Raises:
        InputError: the source is missing or no causal language model.
    """
    import torch

    # Flash attention has no kernel on tensors without data: torch's stands in for it. Left open, transformers takes
    # that where the family's code can call it, and else eager attention.
    attention = {"attn_implementation": "eager"} if config.attention == "eager" else {}
    source: Path | KnownShape | None = local_folder(config.name_or_path, field="model.name_or_path")
    if source is None and config.revision is None:
        source = known_shape(config.name_or_path)
    if source is None:
        source = download(
            config.name_or_path, field="model.name_or_path", revision=config.revision, gguf_file=None, weights=False
        )
    with torch.device("meta"):
        return _described(config, source, **attention)


def load_empty(config: ModelConfig) -> PreTrainedModel:
    """Like :func:`load_skeleton`, with real buffers: only what is read from weight files is missing.

    Raises:
        InputError: the source is missing or no causal language model.
    """
    folder = model_folder(config)
    with _parameters_on_meta():
        model = _described(config, folder, attn_implementation=config.attention)
    if config.gguf_file is None and (folder / "generation_config.json").is_file() and model.can_generate():
        from transformers import GenerationConfig

        with suppress(OSError):  # Damaged: the one that the model's config describes, as from_pretrained takes.
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _described(config: ModelConfig, source: Path | KnownShape, **options: Any) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    gguf: dict[str, Any] = {} if config.gguf_file is None else {"gguf_file": config.gguf_file}
    try:
        if isinstance(source, KnownShape):
            described = transformers_config(source)
        else:
            described = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code, **gguf)
        if config.classifies:
            for setting, value in label_settings(config).items():
                setattr(described, setting, value)
        kind = AutoModelForSequenceClassification if config.classifies else AutoModelForCausalLM
        model: PreTrainedModel = kind.from_config(
            described, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code, **options
        )
    except Exception as error:  # a damaged config: anything from KeyError to RuntimeError
        detail = " ".join(str(error).split())[:300] or type(error).__name__
        name = source.name if isinstance(source, KnownShape) else source
        what = "classifier" if config.classifies else "causal language model"
        raise InputError(f"{name} cannot be read as a {what} ({detail})") from error
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter to the meta device as soon as a module gets it; one at a time is ever allocated."""
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:  # Tied: it stays the same object.
            return None
        return torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
