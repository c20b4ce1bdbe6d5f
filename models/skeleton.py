"""What does a model look like, without its weights? Names, shapes and dtypes on torch's meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.loading import ModelConfig, model_folder
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_skeleton(config: ModelConfig) -> PreTrainedModel:
    """The model that :func:`models.loading.load_model` gives, on the meta device: no weight is read or allocated.

    Raises:
        InputError: the source is missing or no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = model_folder(config)
    source: dict[str, Any] = {} if config.gguf_file is None else {"gguf_file": config.gguf_file}
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code, **source)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                described, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # a damaged config: anything from KeyError to RuntimeError
        detail = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{folder} cannot be read as a causal language model ({detail})") from error
    return model.eval()
