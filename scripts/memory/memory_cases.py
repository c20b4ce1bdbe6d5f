"""Which jobs are the closed form and the simulation of memory held against each other on?

They are chosen so that every two settings of different factors meet at least once: every model with every stage, every
method with every length, and so on, in a hundredth of the full product. The one exception are the models that are
slow to simulate: each meets some of the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.config import RunConfig, parse_config
from launcher.training_config import DTYPE_OF_PRECISION
from scripts.memory.covering import Pair, covering

# Beyond so many tokens there are no cases with attention that scores every two positions.
_LONGEST_EAGER = 8192


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the cases, by its config.json: what its linears are called, and in which blocks they are cut."""

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    block_size: int = 256
    # Whether a simulation takes half a minute; not every method is tried then.
    is_slow: bool = False
    # Whether attention is eager and samples are padded: the model knows neither sdpa nor positions.
    is_eager: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """What reads the attention's input."""
        return self.attention[:-1]


_BLOOM: dict[str, Any] = {
    "attention": ("query_key_value", "dense"),
    "mlp": ("dense_h_to_4h", "dense_4h_to_h"),
    "is_eager": True,
}
MODELS: Mapping[str, Model] = {
    "smollm2-135m": Model(block_size=64),
    "tinyllama-1.1b": Model(),
    "llama-2-7b": Model(),
    "llama-2-13b": Model(is_slow=True),
    "llama-2-70b": Model(is_slow=True),
    "llama-3-8b": Model(is_slow=True),
    "llama-3.1-70b": Model(is_slow=True),
    "mistral-7b": Model(is_slow=True),
    "qwen2.5-7b": Model(is_slow=True),
    "qwen3-8b": Model(is_slow=True),
    # Its experts are stacks, not linears.
    "mixtral-8x7b": Model(mlp=(), is_slow=True),
    "bloom-7b1": Model(**_BLOOM, is_slow=True),
}
_TINY = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
# For the quick cases: written where they are used.
TINY_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "tiny-llama": {"model_type": "llama", **_TINY},
    "tiny-tied": {"model_type": "llama", **_TINY, "tie_word_embeddings": True},
    "tiny-qwen3": {"model_type": "qwen3", "head_dim": 64, **_TINY},
    "tiny-qwen2": {"model_type": "qwen2", **_TINY},
    "tiny-bloom": {"model_type": "bloom", "vocab_size": 4096, "hidden_size": 512, "n_layer": 4, "n_head": 8},
    "tiny-mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, **_TINY},
}
TINY_MODELS: Mapping[str, Model] = {
    "tiny-llama": Model(block_size=64),
    "tiny-tied": Model(block_size=64),
    "tiny-qwen3": Model(block_size=64),
    "tiny-qwen2": Model(block_size=64),
    "tiny-bloom": Model(block_size=64, **_BLOOM),
    "tiny-mixtral": Model(block_size=64, mlp=()),
}
# Small enough to be trained on CPUs, see scripts/memory/measured_cases.py.
TRAINED_MODELS: Mapping[str, Model] = {
    name: Model(block_size=64) for name in ("llama-21m", "llama-61m", "llama-98m", "llama-284m")
}


def _patterns(names: Sequence[str]) -> list[str]:
    return [f"*.{name}" for name in names]


def _smt(names: Callable[[Model], tuple[str, ...]], fraction: float) -> Callable[[Model], dict[str, Any]]:
    def selection(model: Model) -> dict[str, Any]:
        region = {"kind": "block", "block_size": model.block_size, "modules": _patterns(names(model))}
        return {"regions": [region], "budget": {"fraction": fraction}}

    return selection


def _lines(kind: str, number: int) -> Callable[[Model], dict[str, Any]]:
    def selection(model: Model) -> dict[str, Any]:
        region = {"kind": kind, "modules": _patterns(model.attention + model.mlp), "per_matrix": number}
        return {"regions": [region]}

    return selection


def _diablo(model: Model) -> dict[str, Any]:
    region = {"kind": "block", "modules": _patterns(model.attention + model.mlp), "blocks_per_side": 16}
    return {"regions": [{**region, "per_matrix": 16}]}


def _mixed(model: Model) -> dict[str, Any]:
    rows, columns = (model.mlp[:-1], model.mlp[-1:]) if model.mlp else (model.attention[-1:], model.attention[:1])
    blocks = {"kind": "block", "block_size": model.block_size, "modules": _patterns(model.inputs)}
    return {
        "regions": [
            blocks,
            {"kind": "row", "modules": _patterns(rows), "per_matrix": 2},
            {"kind": "column", "modules": _patterns(columns), "per_matrix": 2},
        ],
        "budget": {"fraction": 0.0084},
    }


_SMT = _smt(lambda model: model.inputs, 0.0084)
# Selections of the method "selection". Peers have one, too, which is not looked at.
SELECTIONS: Mapping[str, Callable[[Model], dict[str, Any]]] = {
    "smt": _SMT,
    "smt-all": _smt(lambda model: model.attention + model.mlp, 0.02),
    "rocoft-rows": _lines("row", 3),
    "rocoft-columns": _lines("column", 3),
    "mixed": _mixed,
    "diablo": _diablo,
    "smt-nf4": _SMT,
}
PEERS: Mapping[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora_rank": 16},
    "dora": {"method": "dora", "lora_rank": 16},
    "qlora": {"method": "lora", "lora_rank": 16},
}
METHODS = (*SELECTIONS, *PEERS)
_QUANTIZED = ("smt-nf4", "qlora")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One job on one model."""

    model: str
    method: str
    stage: int = 2
    placement: str = "inplace"
    world_size: int = 1
    length: int = 512
    micro_batch: int = 1
    batching: str = "pad"
    checkpointing: bool = False
    precision: str = "bf16"
    accumulation: int = 1
    attention: str = "sdpa"
    # None: all positions but the last.
    label_positions: int | None = None

    @property
    def name(self) -> str:
        """Unique and short."""
        options = [self.placement, self.batching, self.precision, self.attention]
        options += ["ckpt"] * self.checkpointing + [f"acc{self.accumulation}"] * (self.accumulation > 1)
        options += [f"labels{self.label_positions}"] * (self.label_positions is not None)
        words = [word for word in options if word not in ("inplace", "pad", "bf16", "sdpa")]
        size = f"{self.micro_batch}x{self.length}"
        return " ".join([self.model, self.method, f"z{self.stage}", f"w{self.world_size}", size, *words])

    def shape(self) -> Model:
        """What its model is like."""
        return {**MODELS, **TINY_MODELS, **TRAINED_MODELS}[self.model]

    def changes(self) -> dict[str, Any]:
        """The fields of :class:`sparse_zero.memory.closed_form.job.MemoryJob` that no config of a run says."""
        changes = dict(PEERS.get(self.method, {}))
        if "lora_rank" in changes:
            changes["lora_targets"] = self.shape().attention + self.shape().mlp
        if self.label_positions is not None:
            changes["label_positions"] = self.label_positions
        return changes

    def config(self, folder: str) -> RunConfig:
        """The run, of the model whose config.json lies in ``folder``."""
        quantized = self.method in _QUANTIZED
        return parse_config(
            {
                "model": {
                    "name_or_path": folder,
                    "dtype": DTYPE_OF_PRECISION[self.precision],
                    "attention": self.attention,
                    "quantization": "nf4" if quantized else "none",
                    "double_quantization": quantized,
                },
                "data": {"train": "none.json", "max_length": self.length, "batching": self.batching},
                # At random: nothing is calibrated, and forecast and simulation take the same regions.
                "selection": {"score": "random", **SELECTIONS.get(self.method, _SMT)(self.shape())},
                "training": {
                    "steps": 2,
                    "micro_batch_size": self.micro_batch,
                    "global_batch_size": self.micro_batch * self.accumulation * self.world_size,
                    "precision": self.precision,
                    "gradient_checkpointing": self.checkpointing,
                },
                "zero": {"stage": self.stage, "placement": self.placement},
                "output": {"folder": "none"},
            }
        )


FACTORS: Mapping[str, tuple[Any, ...]] = {
    "model": tuple(MODELS),
    "method": METHODS,
    "stage": (0, 1, 2, 3),
    "placement": ("inplace", "delta"),
    "world_size": (1, 2, 8, 64, 1024),
    "length": (512, 2048, 8192, 32768, 131072),
    "micro_batch": (1, 4),
    "batching": ("pad", "pack"),
    "checkpointing": (False, True),
    "precision": ("bf16", "fp32"),
    "accumulation": (1, 4),
    "attention": ("sdpa", "eager"),
    "label_positions": (None, 128),
}


def is_possible(case: Mapping[str, Any]) -> bool:
    """Whether a case can be trained, and says something: what a peer's placement is, is nobody's business."""
    method = case["method"]
    if method in PEERS and case["placement"] != "inplace":
        return False
    if method == "smt-nf4" and case["placement"] != "delta":
        return False
    # Codes are not cut into shards.
    if method in _QUANTIZED and (case["precision"] != "bf16" or case["stage"] == 3):
        return False
    if MODELS[case["model"]].is_eager and (case["attention"] != "eager" or case["batching"] != "pad"):
        return False
    return case["attention"] == "sdpa" or case["length"] <= _LONGEST_EAGER


def is_needed(pair: Pair) -> bool:
    """Whether two settings are to meet: of a model that is slow to simulate and the methods, some do."""
    (one, first), (other, _) = pair
    return (one, other) != ("model", "method") or not MODELS[first].is_slow


def covering_cases(at_least: int) -> list[Case]:
    """Cases in which every two settings meet, in a fixed order; filled up at random."""
    return [Case(**found) for found in covering(FACTORS, is_possible, is_needed=is_needed, at_least=at_least)]


QUICK: tuple[Case, ...] = (
    Case(model="tiny-llama", method="smt", stage=0),
    Case(model="tiny-llama", method="smt", checkpointing=True, micro_batch=4, world_size=2),
    Case(model="tiny-llama", method="smt-all", stage=3, world_size=8, placement="delta", label_positions=64),
    Case(
        model="tiny-llama", method="rocoft-rows", stage=3, world_size=8, micro_batch=2, length=2048, label_positions=8
    ),
    Case(model="tiny-llama", method="rocoft-columns", stage=1, precision="fp32", accumulation=4, label_positions=8),
    Case(model="tiny-tied", method="mixed", batching="pack", micro_batch=4, label_positions=8),
    Case(model="tiny-qwen3", method="diablo", attention="eager", label_positions=64),
    Case(model="tiny-bloom", method="smt-all", placement="delta", attention="eager", label_positions=64),
    Case(model="tiny-mixtral", method="smt", stage=2, label_positions=64),
    Case(model="tiny-llama", method="full", stage=2, world_size=8),
    Case(model="tiny-qwen2", method="lora", stage=3, world_size=8, label_positions=64),
    Case(model="tiny-llama", method="qlora", stage=2, label_positions=64),
)
