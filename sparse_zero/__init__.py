"""Fine-tune only the selected parts of a model's weight matrices, under DeepSpeed ZeRO.

selection = sz.select(model, batches, sz.SelectionConfig(...))
sz.sparsify(model, selection, placement="inplace")
engine, *_ = sz.initialize(model=model, config=deepspeed_config)
...                                   # engine.backward(loss); engine.step()
sz.save_adapter(engine, "adapter")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_zero.backward_steps import StepInBackward, step_in_backward
    from sparse_zero.checkpoint.adapter import save_adapter
    from sparse_zero.checkpoint.adapter_set import load_adapter, set_adapter
    from sparse_zero.checkpoint.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
    from sparse_zero.checkpoint.identity import BaseIdentity
    from sparse_zero.errors import InputError
    from sparse_zero.integrations.peft import register_peft
    from sparse_zero.layers.kernels import KernelWarning, set_kernels
    from sparse_zero.layers.merge import MergeUndo, merge, unmerge
    from sparse_zero.layers.sparse_linear import SparseLinear
    from sparse_zero.layers.sparsify import num_retired, parameter_groups, sparsify, trainable_parameters, write_back
    from sparse_zero.memory.closed_form.decoder_shape import DecoderShape, LinearShape
    from sparse_zero.memory.closed_form.forecast import forecast_memory
    from sparse_zero.memory.closed_form.job import MemoryJob
    from sparse_zero.module_map import ModuleMap, default_module_map
    from sparse_zero.reselection.migrate import migrate
    from sparse_zero.reselection.reselect import Reselection, config_at, reselect
    from sparse_zero.selection.config import (
        BudgetConfig,
        BudgetGroupConfig,
        FullCalibrationConfig,
        RegionConfig,
        ReselectConfig,
        SelectionConfig,
    )
    from sparse_zero.selection.region_scores import RegionScores
    from sparse_zero.selection.regions import WeightSelection
    from sparse_zero.selection.scores import ScoreRule, resolve_score
    from sparse_zero.selection.select import SelectionWarning, choose_regions, score_regions, select
    from sparse_zero.selection.selection import Selection
    from sparse_zero.zero.config import ZeroConfig
    from sparse_zero.zero.engine import attach, initialize
    from sparse_zero.zero.optimizers import (
        KindOptimizerConfig,
        ModuleOptimizerConfig,
        OptimizerConfig,
        PerKindConfig,
        build_optimizer,
    )

__version__ = "0.1.0"

__all__ = [
    "BaseIdentity",
    "BudgetConfig",
    "BudgetGroupConfig",
    "DecoderShape",
    "FullCalibrationConfig",
    "InputError",
    "KernelWarning",
    "KindOptimizerConfig",
    "LinearShape",
    "MemoryJob",
    "MergeUndo",
    "ModuleMap",
    "ModuleOptimizerConfig",
    "OptimizerConfig",
    "PerKindConfig",
    "RegionConfig",
    "RegionScores",
    "ReselectConfig",
    "Reselection",
    "ScoreRule",
    "Selection",
    "SelectionConfig",
    "SelectionWarning",
    "SparseLinear",
    "StepInBackward",
    "WeightSelection",
    "ZeroConfig",
    "__version__",
    "attach",
    "build_optimizer",
    "choose_regions",
    "config_at",
    "default_module_map",
    "forecast_memory",
    "initialize",
    "load_adapter",
    "load_checkpoint",
    "merge",
    "migrate",
    "num_retired",
    "parameter_groups",
    "read_checkpoint",
    "register_peft",
    "reselect",
    "resolve_score",
    "save_adapter",
    "save_checkpoint",
    "score_regions",
    "select",
    "set_adapter",
    "set_kernels",
    "sparsify",
    "step_in_backward",
    "trainable_parameters",
    "unmerge",
    "write_back",
]

# Where the public names live. They are imported when they are asked for: torch takes seconds, which errors and settings
# (sparse_zero.errors, sparse_zero.selection.config) do not need.
_HOMES = {
    "backward_steps": ("StepInBackward", "step_in_backward"),
    "checkpoint.adapter": ("save_adapter",),
    "checkpoint.adapter_set": ("load_adapter", "set_adapter"),
    "checkpoint.checkpoint": ("load_checkpoint", "read_checkpoint", "save_checkpoint"),
    "checkpoint.identity": ("BaseIdentity",),
    "errors": ("InputError",),
    "integrations.peft": ("register_peft",),
    "layers.kernels": ("KernelWarning", "set_kernels"),
    "layers.merge": ("MergeUndo", "merge", "unmerge"),
    "layers.sparse_linear": ("SparseLinear",),
    "layers.sparsify": ("num_retired", "parameter_groups", "sparsify", "trainable_parameters", "write_back"),
    "memory.closed_form.decoder_shape": ("DecoderShape", "LinearShape"),
    "memory.closed_form.forecast": ("forecast_memory",),
    "memory.closed_form.job": ("MemoryJob",),
    "module_map": ("ModuleMap", "default_module_map"),
    "reselection.migrate": ("migrate",),
    "reselection.reselect": ("Reselection", "config_at", "reselect"),
    "selection.config": (
        "BudgetConfig",
        "BudgetGroupConfig",
        "FullCalibrationConfig",
        "RegionConfig",
        "ReselectConfig",
        "SelectionConfig",
    ),
    "selection.region_scores": ("RegionScores",),
    "selection.regions": ("WeightSelection",),
    "selection.scores": ("ScoreRule", "resolve_score"),
    "selection.select": ("SelectionWarning", "choose_regions", "score_regions", "select"),
    "selection.selection": ("Selection",),
    "zero.config": ("ZeroConfig",),
    "zero.engine": ("attach", "initialize"),
    "zero.optimizers": (
        "KindOptimizerConfig",
        "ModuleOptimizerConfig",
        "OptimizerConfig",
        "PerKindConfig",
        "build_optimizer",
    ),
}


if not TYPE_CHECKING:  # or any name would pass for one of ours

    def __getattr__(name: str) -> Any:
        for module, names in _HOMES.items():
            if name in names:
                found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
