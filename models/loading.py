"""How does a model, causal or a classifier, and its tokenizer come from a folder, a hub name or a GGUF file?"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.heads import head_is_new, label_settings, make_head, not_of_head
from models.quantization import Quantized, adopt_quantized, check_quantization, loading_options, need_package
from models.source import Task, check_model_folder, download, local_folder
from models.weight_files import read_json_object
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")
TASKS: tuple[Task, ...] = ("causal_lm", "sequence_classification")
# Words, digits, bytes outside the vocabulary and a first word: where tokenizer conversions go wrong.
TOKENIZER_PROBE = "The 12 pears, 3.5 żółw and\nmore."


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is fine-tuned, and in what form it is held."""

    # A folder with config.json and safetensors, a folder with a GGUF file, or a hub name owner/model.
    # A relative folder starts at the current directory; ~ is expanded.
    name_or_path: str
    # Branch, tag or commit of a hub name; None: the hub's default branch. A folder has none.
    revision: str | None = None
    # What the model does: predict tokens, or tell the class of a text (BERT, RoBERTa; Llama with a head "score"). A
    # head that the files lack is made from training.seed, and must be trained entirely.
    task: Task = "causal_lm"
    # Classes of a sequence_classification; 1: a number is predicted instead (regression).
    num_labels: int | None = None
    # File of the folder (or hub repository) to load instead of safetensors; it is dequantised.
    gguf_file: str | None = None
    # Folder or hub name of the tokenizer; None: the model's own.
    tokenizer: str | None = None
    # Type in which the base weights are held. float32 is what a CPU is fast with; GPUs want bfloat16.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # Form in which the linears of the base are held, by bitsandbytes: nf4 takes a quarter of bfloat16's bytes, int8
    # half of them. What is computed, and values, are in dtype. Values then act by zero.placement delta.
    quantization: Quantized = "none"
    # Hold the constants of nf4 in 8 bits as well (QLoRA's double quantization), which saves 0.37 bits per entry.
    double_quantization: bool = False
    # Attention implementation. sdpa needs no further package and forms no score matrix on GPUs; flash_attention_2
    # computes in bfloat16 or float16 only.
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    # Run Python code that comes with the model. Off: a model is data, and data does not run.
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name_or_path, str) or not self.name_or_path.strip():
            raise InputError(f"model.name_or_path is {self.name_or_path!r}: give a folder or a hub name")
        if self.dtype not in DTYPES:
            raise InputError(f"model.dtype is {self.dtype!r}: use one of {', '.join(DTYPES)}")
        if self.attention not in ATTENTIONS:
            raise InputError(f"model.attention is {self.attention!r}: use one of {', '.join(ATTENTIONS)}")
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise InputError(
                "model.attention is 'flash_attention_2' with model.dtype float32, in which it cannot compute: set "
                "model.dtype to bfloat16 or float16 (and training.precision to match), or model.attention to sdpa"
            )
        if self.gguf_file is not None and (
            not self.gguf_file.endswith(".gguf") or Path(self.gguf_file).name != self.gguf_file
        ):
            raise InputError(
                f"model.gguf_file is {self.gguf_file!r}: give the name of a .gguf file in model.name_or_path"
            )
        check_quantization(self.quantization, self.double_quantization, self.gguf_file)
        self._check_task()

    @property
    def classifies(self) -> bool:
        """Whether the model tells the class of a text."""
        return self.task == "sequence_classification"

    def _check_task(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"model.task is {self.task!r}: use one of {', '.join(TASKS)}")
        if not self.classifies:
            if self.num_labels is not None:
                raise InputError(
                    f"model.num_labels is {self.num_labels} with model.task {self.task}: set model.task to "
                    "sequence_classification, or leave num_labels out"
                )
            return
        if not isinstance(self.num_labels, int) or isinstance(self.num_labels, bool) or self.num_labels < 1:
            raise InputError(
                f"model.num_labels is {self.num_labels} with model.task sequence_classification: give the number of "
                "classes, or 1 to predict a number"
            )
        for name, value, off in (("quantization", self.quantization, "none"), ("gguf_file", self.gguf_file, None)):
            if value != off:
                raise InputError(
                    f"model.{name} is {value!r} with model.task sequence_classification, which is not supported: leave "
                    f"{name} out"
                )


def validate_model_source(config: ModelConfig) -> None:
    """Check all that can be checked about a model without a network or reading its weights.

    Raises:
        InputError: naming the field, the value and the remedy.
    """
    folder = local_folder(config.name_or_path, field="model.name_or_path")
    if folder is not None:
        if config.revision is not None:
            raise InputError(f"model.revision is {config.revision!r}, but {folder} is a folder: leave it out")
        _check_folder(config, folder)
    if config.tokenizer is not None:
        local_folder(config.tokenizer, field="model.tokenizer")
    if config.attention == "flash_attention_2":
        _need("flash_attn", "flash-attn", "model.attention is 'flash_attention_2'", "or use sdpa")
    if config.gguf_file is not None:
        for package in ("gguf", "accelerate"):
            _need(package, package, f"model.gguf_file is {config.gguf_file!r}", "or use safetensors")
    need_package(config.quantization)


def model_folder(config: ModelConfig) -> Path:
    """The folder of the model's files: the named one, or the hub's snapshot, downloaded if needed."""
    validate_model_source(config)
    folder = local_folder(config.name_or_path, field="model.name_or_path")
    if folder is None:
        folder = download(
            config.name_or_path,
            field="model.name_or_path",
            revision=config.revision,
            gguf_file=config.gguf_file,
            weights=True,
        )
        _check_folder(config, folder)
    return folder


def _check_folder(config: ModelConfig, folder: Path) -> None:
    check_model_folder(
        folder,
        gguf_file=config.gguf_file,
        trust_remote_code=config.trust_remote_code,
        task=config.task,
        num_labels=config.num_labels,
    )


def load_model(
    config: ModelConfig, *, device: str | torch.device = "cpu", head_seed: int | None = None
) -> PreTrainedModel:
    """Load a causal language model, dense or quantized, or a classifier, in evaluation mode, on ``device``.

    Args:
        config: which model.
        device: where it is put.
        head_seed: of the head that a classifier's files lack (:func:`models.heads.fresh_head` names its weights).

    Raises:
        InputError: the source is missing, incomplete, of another kind, or its weights do not fit its config.
    """
    folder = model_folder(config)
    is_new = head_is_new(config, folder)
    with _no_progress_bars(), _no_warnings() if is_new else nullcontext():
        model, info = _from_pretrained(config, folder, device)
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    if is_new:
        if head_seed is None:
            raise ValueError(f"{folder} has no head of its own: give head_seed")
        new, (missing, unexpected) = missing, not_of_head(model, missing, unexpected)
        make_head(model, set(new) - set(missing), head_seed)
    check_weights_fit(folder, missing=missing, unexpected=unexpected, mismatched=info["mismatched_keys"])
    if config.quantization != "none":
        adopt_quantized(model)
        _leave_the_file(model)
    return model.to(device).eval()


def _leave_the_file(model: PreTrainedModel) -> None:
    """Give what was not quantized memory of its own, where it is a view of the weights' file.

    The file stays mapped as long as there is one, and with it every page that was read to quantize the others: all of
    the dense model.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def check_weights_fit(
    folder: Path, *, missing: Iterable[Any], unexpected: Iterable[Any], mismatched: Iterable[Any]
) -> None:
    """Raise if any weight is named that a model folder lacks, has beyond its config, or has in another shape.

    Raises:
        InputError: names the folder and some of the weights.
    """
    for what, found, remedy in (
        (
            "missing",
            missing,
            "the weights do not belong to this config.json, or a file was lost: copy the model again",
        ),
        ("unexpected", unexpected, "the weights hold more than this config.json describes: copy the model again"),
        (
            "mismatched",
            mismatched,
            "the weights have other shapes than this config.json describes: copy the model again",
        ),
    ):
        names = sorted(str(name) for name in found)
        if names:
            raise InputError(f"{folder} has {len(names)} {what} weights ({', '.join(names[:3])}): {remedy}")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; it always has a padding token, and one that ends a sequence, but for a classifier.

    A tokenizer without a padding token pads with its unknown token, else with its end-of-sequence token:
    masks and labels go by position, so no token is ever taken for padding because of its id.

    A folder with a bare SentencePiece model (``tokenizer.model``, no ``tokenizer.json``) is read as Llama's
    and puts the begin-of-sequence token first unless its ``tokenizer_config.json`` says otherwise; its tokens
    are compared with SentencePiece's own.

    Raises:
        InputError: there is no tokenizer, it cannot be read, or it has no end-of-sequence token.
    """
    if config.tokenizer is None:
        folder, gguf_file, field = model_folder(config), config.gguf_file, "model.name_or_path"
    else:
        field, gguf_file = "model.tokenizer", None
        local = local_folder(config.tokenizer, field=field)
        folder = local or download(config.tokenizer, field=field, revision=None, gguf_file=None, weights=False)
    if gguf_file is not None and _has_tokenizer(folder):
        gguf_file = None  # the original files are exact, a GGUF holds a reduced form
    if gguf_file is None and not _has_tokenizer(folder):
        raise InputError(f"{folder} has no tokenizer.json or tokenizer.model: set model.tokenizer")
    tokenizer = _read_tokenizer(folder, gguf_file, config.trust_remote_code)
    if tokenizer.eos_token_id is None and not config.classifies:
        raise InputError(f"the tokenizer of {folder} has no end-of-sequence token: set model.tokenizer to one that has")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise InputError(f"the tokenizer of {folder} has no padding token: set model.tokenizer to one that has")
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padded batches; labels and attention hide it."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def check_tokenizer_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that every token of the tokenizer has an embedding.

    Raises:
        InputError: the tokenizer is larger than the model's embedding.
    """
    from sparse_zero.module_map import parameter_shape  # heavy: torch

    rows = parameter_shape(model.get_input_embeddings().weight)[0]
    if len(tokenizer) > rows:
        raise InputError(f"model.tokenizer has {len(tokenizer)} tokens, the model embeds {rows}: use the model's own")


def _need(module: str, package: str, setting: str, otherwise: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{setting}, which needs the package {package}: pip install {package}, {otherwise}")


def _from_pretrained(config: ModelConfig, folder: Path, device: str | torch.device) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GgufConfig

    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attention,
        "trust_remote_code": config.trust_remote_code,
        "output_loading_info": True,
    }
    options |= loading_options(config.quantization, config.double_quantization, options["dtype"], device)
    if config.gguf_file is None:
        options["use_safetensors"] = True
    else:
        # Without dequantize the weights stay in GGUF blocks: they cannot be trained, and saving is refused.
        options |= {"gguf_file": config.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    try:
        if config.classifies:
            described = AutoConfig.from_pretrained(
                folder, trust_remote_code=config.trust_remote_code, **label_settings(config)
            )
            return AutoModelForSequenceClassification.from_pretrained(folder, config=described, **options)
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a damaged file or config: anything from struct.error to RuntimeError
        detail = " ".join(str(error).split())[:300] or type(error).__name__
        what = "classifier" if config.classifies else "causal language model"
        raise InputError(f"{folder} cannot be loaded as a {what} ({detail})") from error


def _has_tokenizer(folder: Path) -> bool:
    # tiktoken, vocab.json and other forms of slow tokenizers come with a tokenizer_config.json.
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))


def _read_tokenizer(folder: Path, gguf_file: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, LlamaTokenizer

    sentencepiece = folder / "tokenizer.model"
    bare = gguf_file is None and sentencepiece.is_file() and not (folder / "tokenizer.json").is_file()
    settings_file = folder / "tokenizer_config.json"
    settings = read_json_object(settings_file) if bare and settings_file.is_file() else {}
    # AutoTokenizer takes a bare tokenizer.model for a generic one: no word gets Llama's leading space.
    llama = bare and str(settings.get("tokenizer_class", "LlamaTokenizer")).removesuffix("Fast") == "LlamaTokenizer"
    options: dict[str, Any] = {"add_bos_token": True} if llama and "add_bos_token" not in settings else {}
    try:
        if llama:
            tokenizer = LlamaTokenizer.from_pretrained(folder, **options)
        else:
            if gguf_file is not None:
                options["gguf_file"] = gguf_file
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # the Rust tokenizers raise plain Exception for a damaged file
        detail = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"the tokenizer of {folder} cannot be read ({detail}): copy or download it again") from error
    if bare:
        _check_against_sentencepiece(tokenizer, sentencepiece)
    return tokenizer


def _check_against_sentencepiece(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    # The scores of a BPE model number its merges; those of a unigram model are log-probabilities.
    is_bpe = all(reference.get_score(token).is_integer() for token in range(reference.get_piece_size()))
    found = tokenizer.encode(TOKENIZER_PROBE, add_special_tokens=False)
    if not is_bpe or found != reference.encode(TOKENIZER_PROBE):
        raise InputError(
            f"{file} is a SentencePiece model that transformers reads differently: save the tokenizer as "
            "tokenizer.json, and set model.tokenizer to that folder"
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Without the report of transformers that a head is missing, which is made here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let every decoder layer recompute its activations in backward instead of keeping them (non-reentrant)."""
    # transformers 5.23 renamed it; the old name warns there.
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Reentrant checkpoints need it; here it would only let backward run down to the embedding, through layers below
    # the lowest trained one.
    model.disable_input_require_grads()
