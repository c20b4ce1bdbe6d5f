"""Are the private parts of PEFT that our method relies on still what they were? Each failure names what broke."""

import inspect
from typing import Any

import pytest

from sparse_zero.errors import InputError
from sparse_zero.integrations import peft_compat
from sparse_zero.integrations.peft import register_peft

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'sparse-zero[peft]'")

# What PEFT calls on a method, with the names of its parameters; an override that PEFT no longer calls does nothing.
CALLED_ON_TUNERS = {
    "_create_and_replace": None,
    "inject_adapter": ["model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"],
    "_cast_adapter_dtype": ["adapter_name", "autocast_adapter_dtype"],
    "_unload_and_optionally_merge": ["merge", "progressbar", "safe_merge", "adapter_names"],
    "_get_adapter_state_dict": ["model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"],
    "_remove_adapter_name_from_key": ["key", "adapter_name"],
    "_remap_adapter_state_dict_for_load": ["model", "config", "adapter_name", "state_dict"],
}
CALLED_ON_LAYERS = {
    "set_adapter": ["adapter_names", "inference_mode"],
    "set_requires_grad": ["adapter_names", "requires_grad"],
    "enable_adapters": ["enabled"],
    "merge": ["safe_merge", "adapter_names"],
    "unmerge": [],
    "delete_adapter": ["adapter_name"],
    "_get_available_adapters": [],
    "_all_available_adapter_names": [],
}
STATE_OF_LAYERS = ("_active_adapter", "_disable_adapters", "merged_adapters")


def parameters_of(method: Any) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name != "self"]


@pytest.mark.parametrize(
    ("owner", "names"), [("BaseTuner", CALLED_ON_TUNERS), ("BaseTunerLayer", CALLED_ON_LAYERS)], ids=["tuner", "layer"]
)
def test_what_peft_calls_is_still_there(owner, names):
    theirs = getattr(peft_compat.library("peft.tuners.tuners_utils"), owner)
    ours = peft_compat.SparseZeroTuner if owner == "BaseTuner" else peft_compat.AdapterLayer
    for name, expected in names.items():
        assert hasattr(theirs, name), f"{owner}.{name} is gone"
        if expected is not None:
            assert parameters_of(getattr(theirs, name)) == expected, f"{owner}.{name} has other parameters"
            assert parameters_of(getattr(ours, name)) == expected, f"ours of {name} has other parameters"


def test_the_state_that_peft_reads_of_layers():
    layer = peft_compat.library("peft.tuners.tuners_utils").BaseTunerLayer
    for name in STATE_OF_LAYERS:
        assert hasattr(layer, name), f"BaseTunerLayer.{name} is gone: its properties read another attribute"
    for name in ("merged", "active_adapters", "active_adapter", "disable_adapters"):
        assert isinstance(vars(layer)[name], property), f"BaseTunerLayer.{name} is no property"


def test_the_method_is_a_member_like_any_other():
    config = register_peft()
    assert register_peft() is config
    types = peft.PeftType
    assert types.SPARSE_ZERO is types("SPARSE_ZERO") is types["SPARSE_ZERO"] is peft_compat.method_type()
    assert list(types)[-1] is types.SPARSE_ZERO
    assert [str(types.SPARSE_ZERO), repr(types.SPARSE_ZERO)] == [
        "PeftType.SPARSE_ZERO",
        "<PeftType.SPARSE_ZERO: 'SPARSE_ZERO'>",
    ]
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["SPARSE_ZERO"] is config
    assert "SPARSE_ZERO" not in peft.PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    assert issubclass(config, peft.PeftConfig)


def test_an_older_version_is_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.18.0")
    with pytest.raises(InputError, match=r"peft 0\.18\.0 is older than .*: pip install 'peft>="):
        register_peft()
