"""Which private parts of PEFT does our method use, and for which of its versions were they read?

PEFT asks a method for a config, a tuner (what ``PeftModel.base_model`` is) and layers. Ours has one layer for the whole
model, which holds the adapters; the values lie in the modules that :func:`sparse_zero.sparsify` makes. All uses of
names that PEFT does not document are here; ``tests/integrations/test_peft_compat.py`` says what broke when a new
version changes one of them.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from packaging.version import Version
from torch import Tensor, nn

from sparse_zero.checkpoint.adapter import (
    HEADER,
    OLD_VALUES,
    OWNER,
    PEFT_CONFIG,
    PEFT_LAYER,
    PEFT_PREFIX,
    PEFT_TYPE,
    SELECTION,
    VALUES,
    read_adapter,
    stored_values,
    write_adapter_manifest,
    write_selection_files,
)
from sparse_zero.checkpoint.folders import MANIFEST
from sparse_zero.checkpoint.retired_file import FILE_NAME as RETIRED_FILE
from sparse_zero.errors import InputError
from sparse_zero.files import read_safetensors_header
from sparse_zero.integrations.peft_adapters import ReadyAdapter, ReadyAdapters, new_adapter
from sparse_zero.layers.merge import merge as merge_model
from sparse_zero.optional import require
from sparse_zero.selection.selection import Selection
from sparse_zero.zero.config import PLACEMENTS

# The version whose source was read.
OLDEST_PEFT = Version("0.21.2")
METHOD = PEFT_TYPE.lower()
# What PEFT takes for a sign of the method in names of modules and parameters.
PREFIX = f"{METHOD}_"
# Tasks for which PEFT trains a module of the model beside the adapter, in a copy.
_TASKS_WITH_OWN_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def library(module: str) -> ModuleType:
    """A module of peft, or an error that names the extra."""
    return require(module, extra="peft", purpose="load adapters with PEFT")


def check_version() -> None:
    """Refuse a PEFT older than the one whose internals were read.

    Raises:
        InputError: names both versions.
    """
    found = library("peft").__version__
    if Version(found) < OLDEST_PEFT:
        raise InputError(f"peft {found} is older than {OLDEST_PEFT}: pip install 'peft>={OLDEST_PEFT}'")


@cache
def method_type() -> Any:
    """``PeftType.SPARSE_ZERO``, which is added to PEFT's enumeration: its registry takes members only."""
    types: Any = library("peft.utils.peft_types").PeftType
    member: Any = str.__new__(types, PEFT_TYPE)
    member._name_ = member._value_ = PEFT_TYPE
    member._sort_order_, member.__objclass__ = len(types), types
    types._member_names_.append(PEFT_TYPE)
    types._member_map_[PEFT_TYPE] = member
    types._value2member_map_[PEFT_TYPE] = member
    type.__setattr__(types, PEFT_TYPE, member)
    return member


@cache
def register() -> Any:
    """Register the method with PEFT; the class of its configs."""
    tuners, config = library("peft.tuners.tuners_utils"), library("peft.config")
    method_type()
    layer = type("SparseZeroLayer", (AdapterLayer, tuners.BaseTunerLayer), {"__doc__": AdapterLayer.__doc__})
    members = {"tuner_layer_cls": layer, "__doc__": SparseZeroTuner.__doc__}
    tuner = type("SparseZeroModel", (SparseZeroTuner, tuners.BaseTuner), members)
    fields = [(name, Any, dataclasses.field(default=None)) for name in _OWN_FIELDS]
    config_class: Any = dataclasses.make_dataclass(
        "SparseZeroConfig",
        fields,
        bases=(SparseZeroConfig, config.PeftConfig),
        eq=False,
    )
    config_class.__doc__ = SparseZeroConfig.__doc__
    library("peft.utils.peft_types").register_peft_method(
        name=METHOD, config_cls=config_class, model_cls=tuner, prefix=PREFIX
    )
    return config_class


# --- config -----------------------------------------------------------------------------------------------------------

# Fields that adapter_config.json does not have.
_OWN_FIELDS = ("selection", "placement")


class SparseZeroConfig:
    """What an adapter of ours is to PEFT; :func:`register` joins it with ``PeftConfig``, whose fields it has too.

    Args:
        selection: what is trained: a Selection, or the path of one; a loaded adapter brings its own.
        placement: where the values of a loaded adapter act; None: as they were trained, delta if they are to be
            trained or the base is quantized.
    """

    selection: Any
    placement: Any
    task_type: Any
    inference_mode: bool

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        self.peft_type = method_type()
        # What was read from a folder, and where it is on a model: neither is a setting.
        self.adapter: Any = None
        self.ready: ReadyAdapter | None = None
        own_head = next((task for task in _TASKS_WITH_OWN_HEAD if self.task_type == task), None)
        if own_head is not None:
            raise InputError(
                f"task_type is {own_head}, for which PEFT trains a copy of the head beside the adapter: "
                "leave it out, and select the head's weights with the others"
            )
        if self.placement is not None and self.placement not in PLACEMENTS:
            raise InputError(f"placement is {self.placement!r}: choose one of {', '.join(PLACEMENTS)}")
        if isinstance(self.selection, str | Path):
            self.selection = Selection.load(self.selection)
        if self.selection is not None and not isinstance(self.selection, Selection):
            raise InputError(f"selection is a {type(self.selection).__name__}: give a sz.Selection, or the path of one")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        found = copy.copy(self)
        memo[id(self)] = found
        # A selection never changes; where the adapter is, is copied with its model.
        found.ready = copy.deepcopy(self.ready, memo)
        return found

    def to_dict(self) -> dict[str, Any]:
        """What ``adapter_config.json`` has; the selection is a file of its own."""
        names = [each.name for each in dataclasses.fields(cast(Any, self)) if each.name not in _OWN_FIELDS]
        return {name: copy.deepcopy(getattr(self, name)) for name in names}

    @classmethod
    def from_pretrained(cls, name: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read an adapter, values and all, from a folder or a hub repository.

        Raises:
            InputError: not an adapter of ours, damaged, or of a newer version.
        """
        config = super().from_pretrained(name, subfolder=subfolder, **kwargs)  # type: ignore[misc]
        config.adapter = read_adapter(_local_folder(str(name), subfolder, kwargs))
        config.selection = config.adapter.selection
        return config

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write the config; where PEFT has written the values of an adapter, all else that belongs to it.

        Raises:
            InputError: PEFT has written more than the values, or written them as a pickle.
        """
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if self.ready is None:
            return
        folder = Path(save_directory)
        if not (folder / VALUES).is_file():
            raise InputError(f"{folder} has no {VALUES}: save with safe_serialization=True, no pickle is ever read")
        wanted = {OWNER, *(f"{PEFT_PREFIX}{name}" for name in self.ready.values())}
        more = set(read_safetensors_header(folder / VALUES)[0]) - wanted
        if more:
            raise InputError(
                f"{folder / VALUES} has {min(more)} besides the values: save with save_embedding_layers=False, and "
                "select what shall be trained"
            )
        write_selection_files(folder, self.ready.described())
        write_adapter_manifest(folder)


def _local_folder(name: str, subfolder: str | None, options: Mapping[str, Any]) -> Path:
    """The folder of an adapter, or of the hub's snapshot of its files."""
    folder = Path(name) if subfolder is None else Path(name) / subfolder
    if folder.is_dir():
        return folder
    hub = library("huggingface_hub")
    known = inspect.signature(hub.snapshot_download).parameters
    files = (HEADER, MANIFEST, OLD_VALUES, PEFT_CONFIG, RETIRED_FILE, SELECTION, VALUES)
    patterns = [file if subfolder is None else f"{subfolder}/{file}" for file in files]
    taken = {key: value for key, value in options.items() if key in known and value is not None}
    snapshot = Path(hub.snapshot_download(name, allow_patterns=patterns, **taken))
    return snapshot if subfolder is None else snapshot / subfolder


# --- the layer that holds the adapters --------------------------------------------------------------------------------


class AdapterLayer(nn.Module):
    """The adapters of one model, as PEFT sees a layer; a submodule of the model that computes nothing.

    Args:
        model: see :class:`~sparse_zero.integrations.peft_adapters.ReadyAdapters`.
    """

    # What PEFT would find in a wrapped module; None has nothing in it.
    weight = None
    bias = None
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ready = ReadyAdapters(model)
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._disable_adapters = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.ready.apply(fn)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model never calls this.

        Raises:
            InputError: something does.
        """
        raise InputError("the layer that holds the adapters was called: the model iterates over its own modules")

    def _update(self) -> None:
        """Let the active adapter act, unless all are disabled."""
        self.merged_adapters = []
        active = self._active_adapter
        self.ready.act(active[0] if active and not self._disable_adapters else None)

    def _one(self, names: str | Sequence[str]) -> list[str]:
        """At most one name.

        Raises:
            InputError: several, or one that is not loaded.
        """
        found = [names] if isinstance(names, str) else list(names)
        if len(found) > 1:
            raise InputError(
                f"adapters {', '.join(found)} were asked for at once: entries belong to one adapter at a time"
            )
        for name in found:
            _ = self.ready[name]
        return found

    # -- what PEFT calls

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Let one adapter act; it is trained unless ``inference_mode``, or its values stand in the weights."""
        self._active_adapter = self._one(adapter_names)
        self._update()
        for name, ready in self.ready.adapters.items():
            is_trained = name in self._active_adapter and not inference_mode and ready.placement == "delta"
            for parameter in ready.values().values():
                parameter.requires_grad_(is_trained)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train adapters, or not.

        Raises:
            InputError: values that stand in the weights.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            ready = self.ready[name]
            if requires_grad and ready.placement == "inplace":
                raise InputError(
                    f"the values of {name!r} stand in the weights, where PEFT does not write them after a step: load "
                    "the adapter with is_trainable=True"
                )
            for parameter in ready.values().values():
                parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active adapter act, or the base alone."""
        self._disable_adapters = not enabled
        self._update()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write what an adapter adds into the weights, until :meth:`unmerge`."""
        names = self._one(self._active_adapter if adapter_names is None else adapter_names)
        if not names or names == self.merged_adapters:
            return
        self.ready.act(names[0])
        if safe_merge:
            self.ready.check_finite()
        self.ready.fold()
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Put the base's entries back, bit for bit."""
        self.ready.unfold()
        self._update()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; if it was the active one, another takes its place."""
        self.ready.remove(adapter_name)
        if adapter_name in self._active_adapter:
            self.set_adapter(sorted(self.ready.adapters)[:1], inference_mode=True)

    def _get_available_adapters(self) -> set[str]:
        return set(self.ready.adapters)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.ready.adapters)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Never: the sum of an adapter has no low rank."""
        return False

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: {ready.adapter.selection.num_parameters:,} values, {ready.placement}"
            for name, ready in self.ready.adapters.items()
        )


# --- the tuner --------------------------------------------------------------------------------------------------------


def _layer_of(model: Any) -> AdapterLayer:
    """The layer that holds the adapters of a model, or of a PeftModel around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = inner._modules.get(PEFT_LAYER)
    if found is None:
        raise InputError("the model has no adapters of sparse-zero: load one first")
    return cast(AdapterLayer, found)


def _makes_empty_weights() -> bool:
    """Whether PEFT has all new parameters made without memory, as low_cpu_mem_usage asks for."""
    probe = nn.Module()
    probe.register_parameter("probe", nn.Parameter(torch.zeros(1)))
    return any(parameter.is_meta for parameter in probe.parameters())


class SparseZeroTuner:
    """Our method, as ``PeftModel.base_model``; :func:`register` joins it with ``BaseTuner``."""

    prefix = PREFIX
    tuner_layer_cls: Any
    target_module_mapping: Mapping[str, Any] = {}
    model: Any
    peft_config: dict[str, Any]
    active_adapters: list[str]
    targeted_module_names: list[str]
    set_adapter: Any

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise InputError("adapters of sparse-zero are put on a whole model: load one, or give a selection")

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put the adapter of ``peft_config[adapter_name]`` on the model.

        Raises:
            InputError: it does not fit; the model is unchanged then.
        """
        config = self.peft_config[adapter_name]
        if low_cpu_mem_usage or _makes_empty_weights():
            raise InputError("low_cpu_mem_usage is true: leave it out, adapters are small and load at once")
        if state_dict is not None:
            raise InputError("a state_dict does not tell which entries its values are: load the adapter's folder")
        if config.adapter is None and config.selection is None:
            raise InputError(
                "the config has no selection: to train one, give it; to load an adapter, use "
                "PeftModel.from_pretrained(model, folder), or model.add_adapter(Config.from_pretrained(folder)), for "
                "transformers' load_adapter hands over adapter_config.json alone"
            )
        layer: Any = model._modules.get(PEFT_LAYER)
        is_first = layer is None
        if layer is None:
            if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):
                raise InputError(f"the model is a {type(model).__name__}, which iterates over its modules: wrap it")
            layer = self.tuner_layer_cls(model)
        trained = {
            id(parameter)
            for ready in layer.ready.adapters.values()
            for parameter in ready.values().values()
            if parameter.requires_grad
        }
        layer.ready.add(
            adapter_name,
            config.adapter or new_adapter(config.selection),
            is_trained=not config.inference_mode,
            placement=config.placement,
        )
        config.ready = layer.ready[adapter_name]
        if is_first:
            model.add_module(PEFT_LAYER, layer)
        known = set(self.targeted_module_names)
        self.targeted_module_names += [name for name in config.ready.carriers if name not in known]
        # An adapter that is added does not act, nor does it change what is trained.
        if adapter_name in self.active_adapters:
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        for name, ready in layer.ready.adapters.items():
            for parameter in ready.values().values():
                is_new = name == adapter_name
                parameter.requires_grad_(parameter.requires_grad if is_new else id(parameter) in trained)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The values under delta are in fp32; as narrow as their weights where that is asked for."""
        if autocast_adapter_dtype:
            return
        for carrier in _layer_of(self.model).ready[adapter_name].carriers.values():
            quantization = getattr(carrier, "quantization", None)
            dtype = carrier.parameter.dtype if quantization is None else quantization.compute_dtype
            for parameter in carrier.values().values():
                parameter.data = parameter.data.to(dtype)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layer, model = _layer_of(self.model), self.model
        if merge:
            names = layer._one(self.active_adapters if adapter_names is None else adapter_names)
            if not names:
                raise InputError("no adapter is active: name the one to merge in adapter_names")
            layer.ready.act(names[0])
            if safe_merge:
                layer.ready.check_finite()
            merge_model(model)
        else:
            layer.ready.unload()
        delattr(model, PEFT_LAYER)
        if hasattr(model, "peft_config"):
            del model.peft_config
        return cast(nn.Module, model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise InputError("adapter_names in a forward: one adapter acts at a time, choose it with set_adapter")
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            InputError: always.
        """
        raise InputError(
            "add_weighted_adapter is not supported: adapters own different entries, whose sum is no selection of "
            "blocks, rows and columns; merge one with merge_and_unload and train the next on the result"
        )

    # -- what is stored

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        layer = _layer_of(model)
        # Of the acting adapter, what was given: perhaps gathered from other ranks.
        given = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in state_dict.items()}
        acts = layer.ready.acting == adapter_name
        return stored_values(layer.ready[adapter_name].as_adapter(given if acts else None))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Take the values over; nothing is left for PEFT to load by name."""
        _layer_of(model).ready.read(adapter_name, state_dict, Path(VALUES))
        return {}
