"""Which run is meant by the name of a model and of a method, for whom has no config file yet?

The selections are those of ``configs/methods`` (a test compares them), which are the papers' recipes; configs are not
installed with the packages, so they stand here, too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from launcher.config import RunConfig, apply_override, parse_config
from launcher.config_checks import check_config
from launcher.training_config import DTYPE_OF_PRECISION
from models.known_shapes import known_shape, nearest_known
from models.source import local_folder
from models.weight_files import read_json_object
from sparse_zero.errors import InputError

# Of this package, and what people compare with.
PlanMethod = Literal["smt", "rocoft-rows", "rocoft-columns", "mixed", "diablo", "full", "lora", "dora", "qlora"]
PLAN_METHODS: tuple[PlanMethod, ...] = get_args(PlanMethod)
PEERS: tuple[PlanMethod, ...] = ("full", "lora", "dora", "qlora")

_ALL = ["*.self_attn.{q,k,v,o}_proj", "*.mlp.{gate,up,down}_proj"]
_QKV = ["*.self_attn.{q,k,v}_proj"]
# The sections "selection" of configs/methods.
SELECTIONS: Mapping[str, Mapping[str, Any]] = {
    "smt": {
        "regions": [{"kind": "block", "block_size": 256, "modules": _QKV}],
        "score": "abs_of_mean",
        "budget": {"fraction": 0.0084},
        "calibration_batches": 800,
        "calibration_batch_size": 2,
    },
    "rocoft-rows": {"regions": [{"kind": "row", "modules": _ALL, "per_matrix": 3}], "score": "first"},
    "rocoft-columns": {"regions": [{"kind": "column", "modules": _ALL, "per_matrix": 3}], "score": "first"},
    "mixed": {
        "regions": [
            {"kind": "block", "block_size": 256, "modules": _QKV},
            {"kind": "row", "modules": ["*.self_attn.o_proj", "*.mlp.{gate,up}_proj"], "per_matrix": 2},
            {"kind": "column", "modules": ["*.mlp.down_proj"], "per_matrix": 2},
        ],
        "score": "abs_of_mean",
        "budget": {"fraction": 0.0084},
        "calibration_batches": 800,
        "calibration_batch_size": 2,
    },
    "diablo": {
        "regions": [{"kind": "block", "modules": _ALL, "blocks_per_side": 64, "per_matrix": 64}],
        "score": "diagonal",
    },
}
# What families call the matrices of these recipes; all others are built like Llama.
_RENAMED: Mapping[str, Mapping[str, str]] = {
    "bloom": {
        "*.self_attn.{q,k,v,o}_proj": "*.self_attention.{query_key_value,dense}",
        "*.self_attn.{q,k,v}_proj": "*.self_attention.query_key_value",
        "*.self_attn.o_proj": "*.self_attention.dense",
        "*.mlp.{gate,up,down}_proj": "*.mlp.{dense_h_to_4h,dense_4h_to_h}",
        "*.mlp.{gate,up}_proj": "*.mlp.dense_h_to_4h",
        "*.mlp.down_proj": "*.mlp.dense_4h_to_h",
    },
    "roberta": {
        "*.self_attn.{q,k,v,o}_proj": "*.attention.{self.query,self.key,self.value,output.dense}",
        "*.self_attn.{q,k,v}_proj": "*.attention.self.{query,key,value}",
        "*.self_attn.o_proj": "*.attention.output.dense",
        # A digit before: not the attention's output.
        "*.mlp.{gate,up,down}_proj": "*.layer.*[0-9].{intermediate,output}.dense",
        "*.mlp.{gate,up}_proj": "*.layer.*[0-9].intermediate.dense",
        "*.mlp.down_proj": "*.layer.*[0-9].output.dense",
    },
    "mixtral": {
        "*.mlp.{gate,up,down}_proj": "*.experts.{gate_up_proj,down_proj}",
        "*.mlp.{gate,up}_proj": "*.experts.gate_up_proj",
        "*.mlp.down_proj": "*.experts.down_proj",
    },
}
# LoRA and DoRA as in the comparisons that SMT makes (arXiv 2402.09353, commonsense: rank 32, 0.83% of Llama 2 7B).
LORA_RANK = 32
_LORA_TARGETS: Mapping[str, tuple[str, ...]] = {
    "bloom": ("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    "roberta": ("query", "key", "value", "dense"),
    # PEFT's adapters on linears do not reach experts, which are stacks.
    "mixtral": ("q_proj", "k_proj", "v_proj"),
}
_LORA_DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def described(name: str, *, field: str = "--model") -> Mapping[str, Any]:
    """The ``config.json`` of a built-in model or a folder; empty where only the hub could say it.

    Raises:
        InputError: the folder has none, or it is damaged.
    """
    folder = local_folder(name, field=field)
    if folder is None:
        known = known_shape(name)
        return {} if known is None else known.config
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{field} is {name!r}, a folder without a config.json: name a model's folder")
    return read_json_object(file)


def _block_size(values: Mapping[str, Any]) -> int:
    """SMT's 256, halved until it divides the hidden size and the rows of k and v (64 for SmolLM2 135M)."""
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    sides = [hidden]
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        head = values.get("head_dim") or hidden // heads
        sides.append((values.get("num_key_value_heads") or heads) * head)
    size = 256
    while size > 16 and any(isinstance(side, int) and side % size for side in sides):
        size //= 2
    return size


def check_model_name(name: str) -> None:
    """Refuse a name that is no folder, no built-in model and no ``owner/model`` of the hub, naming the nearest.

    Raises:
        InputError: as said.
    """
    if Path(name).expanduser().exists() or known_shape(name) is not None or "/" in name:
        return
    nearest = nearest_known(name)
    hint = f"did you mean {nearest}?" if nearest else "sparse-zero plan --help lists the built-in ones"
    raise InputError(f"--model is {name!r}: there is no such folder, and no built-in model of this name; {hint}")


def peer_changes(method: str, model_type: str, lora_rank: int = LORA_RANK) -> dict[str, Any]:
    """Fields of a ``MemoryJob`` by which a run becomes one of :data:`PEERS`; none for this package's methods."""
    if method not in PEERS:
        return {}
    if method == "full":
        return {"method": "full"}
    found: dict[str, Any] = {
        "method": "dora" if method == "dora" else "lora",
        "lora_rank": lora_rank,
        "lora_targets": _LORA_TARGETS.get(model_type, _LORA_DEFAULT_TARGETS),
    }
    return {**found, "quantization": "nf4", "double_quantization": True} if method == "qlora" else found


def selection_for(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's section ``selection`` with names and block sizes that fit the model.

    Args:
        method: one of :data:`SELECTIONS`; others get that of SMT, which they do not look at.
        values: of the model's config.json.
    """
    recipe = SELECTIONS.get(method, SELECTIONS["smt"])
    names = _RENAMED.get(str(values.get("model_type")), {})
    regions = [
        {
            **region,
            **({"block_size": _block_size(values)} if "block_size" in region else {}),
            "modules": [names.get(each, each) for each in region["modules"]],
        }
        for region in recipe["regions"]
    ]
    # Overrides are written into it.
    return copy.deepcopy({**recipe, "regions": regions})


def default_run(model: str, method: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a model and a method stand for: the recipe in bf16, micro-batches of 1 x 2048 tokens.

    Gradient checkpointing is on, stage 2, placement inplace, 16 samples a step as in SMT. Calibration reads as many
    samples as in the recipe, in micro-batches of the size that training has.

    Args:
        model: a folder, a built-in name or a hub name.
        method: one of :data:`PLAN_METHODS`.
        overrides: as of a config file: ``--data.max_length=512``.

    Raises:
        InputError: the model's name cannot be meant, or an override does not hold, or no rank could start with it.
    """
    check_model_name(model)
    values = described(model)
    selection = selection_for(method, values)
    samples = selection.pop("calibration_batches", 0) * selection.pop("calibration_batch_size", 0)
    mapping: dict[str, Any] = {
        # transformers has no other attention for Bloom.
        "model": {
            "name_or_path": model,
            "attention": "eager" if values.get("model_type") == "bloom" else "sdpa",
        },
        "data": {"train": "train.json", "max_length": 2048},
        "selection": selection,
        "training": {
            "epochs": 3,
            "global_batch_size": 16,
            "micro_batch_size": 1,
            "precision": "bf16",
            "gradient_checkpointing": True,
        },
        "zero": {"stage": 2, "placement": "inplace"},
        "output": {"folder": "planned"},
    }
    for override in overrides:
        apply_override(mapping, override)
    batch = mapping["training"].get("micro_batch_size") if isinstance(mapping["training"], dict) else None
    if samples and isinstance(batch, int) and batch > 0 and isinstance(mapping["selection"], dict):
        mapping["selection"].setdefault("calibration_batch_size", batch)
        mapping["selection"].setdefault("calibration_batches", -(-samples // batch))
    precision = mapping["training"].get("precision") if isinstance(mapping["training"], dict) else None
    if isinstance(precision, str) and precision in DTYPE_OF_PRECISION and isinstance(mapping["model"], dict):
        mapping["model"].setdefault("dtype", DTYPE_OF_PRECISION[precision])
    config = parse_config(mapping, source="the planned run")
    check_config(config)
    return config
