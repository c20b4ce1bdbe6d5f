"""In which folder are the files of a model, named by folder or by hub name, and can they be used?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from models.weight_files import check_weights, read_json_object
from sparse_zero.errors import InputError

Task = Literal["causal_lm", "sequence_classification"]

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
HUB_TIMEOUT_SECONDS = 10.0
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


def is_hub_name(name: str) -> bool:
    """Whether a name can only mean a model on the hub: no such folder, and the hub's form ``owner/model``."""
    return not Path(name).expanduser().exists() and HUB_NAME.fullmatch(name) is not None


def local_folder(name: str, *, field: str) -> Path | None:
    """The folder that a name means, or None when it is a hub name.

    Args:
        name: a folder (``~`` is expanded) or a hub name.
        field: the setting it came from, for the error message.

    Raises:
        InputError: neither a folder nor a possible hub name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{field} is {name!r}, a file: name the folder that holds it")
    if not is_hub_name(name):
        raise InputError(f"{field} is {name!r}: there is no such folder, and a hub name has the form owner/model")
    return None


def download(name: str, *, field: str, revision: str | None, gguf_file: str | None, weights: bool) -> Path:
    """The local snapshot of a hub model, downloaded or from the hub client's cache.

    Pickles are not downloaded. ``HF_HUB_OFFLINE`` keeps to the cache.

    Raises:
        InputError: the hub has no such model, or it is unreachable and the cache does not have it.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = [*TOKENIZER_FILES, "*.py"]
    if weights:
        patterns.append(gguf_file or "*.safetensors")
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            # One question with a timeout first: a download retries for half a minute before it gives up.
            commit = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha
            return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))
        except GatedRepoError as error:
            raise InputError(f"{field} is {name!r}, which its owner gates: ask for access and log in") from error
        except RevisionNotFoundError as error:
            raise InputError(f"model.revision is {revision!r}, which {name} does not have: check it") from error
        except RepositoryNotFoundError as error:
            raise InputError(
                f"{field} is {name!r}: there is no such folder, and the hub has or shows no such model: "
                "correct it, or log in if it is private"
            ) from error
        except Exception as error:  # the client's own network exceptions have no common base class
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{field} is {name!r}: there is no such folder, and the hub cannot be reached ({reason}): "
            "name a folder, or download the model where the hub can be reached"
        ) from error


def check_model_folder(
    folder: Path,
    *,
    gguf_file: str | None,
    trust_remote_code: bool,
    task: Task = "causal_lm",
    num_labels: int | None = None,
) -> None:
    """Check what can be checked without reading a weight: configuration, kind of model, completeness.

    Args:
        folder: of the model.
        gguf_file: see :class:`models.loading.ModelConfig`, as for the others.
        trust_remote_code: whether code of the model may run.
        task: what it is to do.
        num_labels: classes of a classifier.

    Raises:
        InputError: naming the file and the remedy.
    """
    if gguf_file is None:
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            hint = "it is an adapter: name its base model" if adapter else "it is not a transformers model folder"
            ggufs = sorted(path.name for path in folder.glob("*.gguf"))
            if ggufs:
                hint = f"set model.gguf_file, for example to {ggufs[0]!r}"
            raise InputError(f"{folder} has no config.json: {hint}")
        settings = read_json_object(folder / "config.json")
        if task == "sequence_classification":
            _check_classifier(folder, settings, trust_remote_code, num_labels)
        else:
            _check_kind(folder, settings, trust_remote_code)
    check_weights(folder, gguf_file)


def _kind_of(folder: Path, config: dict[str, Any]) -> str:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InputError(f"{folder / 'config.json'} has no model_type: restore the file")
    if "quantization_config" in config:
        settings = config["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise InputError(
            f"{folder} has quantised weights ({method or 'unknown method'}): name the model it was made from"
        )
    return kind


def is_classifier(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is of a model that was saved with a head for sequence classification."""
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or [])


def _check_classifier(folder: Path, config: dict[str, Any], trust_remote_code: bool, num_labels: int | None) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    kind = _kind_of(folder, config)
    own_code = "AutoModelForSequenceClassification" in (config.get("auto_map") or {})
    if own_code and not trust_remote_code:
        raise InputError(
            f"{folder} needs its own Python code ({kind}): read that code, then set model.trust_remote_code"
        )
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES and not own_code:
        raise InputError(
            f"model.task is 'sequence_classification', which transformers does not know for {folder} ({kind}): name "
            "another model"
        )
    if is_classifier(config):
        names = config.get("id2label")
        # transformers' default, which its files leave out.
        stored = len(names) if isinstance(names, dict) and names else config.get("num_labels", 2)
        if stored != num_labels:
            raise InputError(
                f"model.num_labels is {num_labels}, and {folder} has a head for {stored}: set it to that, or name the "
                "encoder that it was made from"
            )


def _check_kind(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = _kind_of(folder, config)
    own_code = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    architectures = [str(name) for name in config.get("architectures") or []]
    # Kinds that only encode (bert) can be loaded as a causal model too; the file says what it was saved as.
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (
        not architectures
        or own_code
        or any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in architectures)
    )
    if causal or (own_code and trust_remote_code):
        return
    if own_code:
        raise InputError(
            f"{folder} needs its own Python code ({kind}): read that code, then set model.trust_remote_code"
        )
    shown = ", ".join(architectures) or kind
    raise InputError(
        f"{folder} is a {shown}, not a causal language model that transformers knows: name another model, or set "
        "model.task to sequence_classification"
    )
