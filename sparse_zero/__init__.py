"""Fine-tune only the selected parts of a model's weight matrices, under DeepSpeed ZeRO.

selection = sz.select(model, batches, sz.SelectionConfig(...))
sz.sparsify(model, selection, placement="inplace")
engine, *_ = sz.initialize(model=model, config=deepspeed_config)
...                                   # engine.backward(loss); engine.step()
sz.save_adapter(engine, "adapter")
"""

from sparse_zero.checkpoint.adapter import save_adapter
from sparse_zero.checkpoint.adapter_set import load_adapter, set_adapter
from sparse_zero.checkpoint.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.errors import InputError
from sparse_zero.layers.merge import MergeUndo, merge, unmerge
from sparse_zero.layers.sparse_linear import SparseLinear
from sparse_zero.layers.sparsify import parameter_groups, sparsify, trainable_parameters, write_back
from sparse_zero.module_map import ModuleMap, default_module_map
from sparse_zero.selection.config import BudgetConfig, RegionConfig, SelectionConfig
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.select import SelectionWarning, select
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.config import ZeroConfig
from sparse_zero.zero.engine import attach, initialize

__version__ = "0.1.0"

__all__ = [
    "BaseIdentity",
    "BudgetConfig",
    "InputError",
    "MergeUndo",
    "ModuleMap",
    "RegionConfig",
    "Selection",
    "SelectionConfig",
    "SelectionWarning",
    "SparseLinear",
    "WeightSelection",
    "ZeroConfig",
    "__version__",
    "attach",
    "default_module_map",
    "initialize",
    "load_adapter",
    "load_checkpoint",
    "merge",
    "parameter_groups",
    "read_checkpoint",
    "save_adapter",
    "save_checkpoint",
    "select",
    "set_adapter",
    "sparsify",
    "trainable_parameters",
    "unmerge",
    "write_back",
]
