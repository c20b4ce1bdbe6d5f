"""Does this DeepSpeed still have the private names that sparse_zero.zero.compat uses, and still need its repair?"""

import ast
import inspect
import textwrap

import deepspeed
import pytest
import torch
from packaging.version import Version

from sparse_zero.zero import compat
from tests.distributed.spawn import run_ranks


def test_the_private_names_are_there():
    found = run_ranks("tests.distributed.workers:private_names", 2)
    assert set(found) == {"1", "2", "3"}
    for stage, entry in found.items():
        assert entry["inner_is_torch"], f"stage {stage}: optimizer.optimizer is not the client's optimizer any more"
        assert entry["overflow"], f"stage {stage}: the optimizer no longer says whether a step was discarded"
        assert entry["partitioned"], f"stage {stage}: values no longer carry ds_id or _hp_mapping"
        if stage == "3":
            assert entry["flat_groups"] > 0, "stage 3: fp32_partitioned_groups_flat is gone"
            assert entry["shard"], "stage 3: ds_tensor or ds_process_group is gone"
            assert entry["missing"] == [], f"stage 3: {entry['missing']} are gone from parameters or their shards"
            assert entry["registry"], "stage 3: between two steps, gathers are on their way"
        else:
            assert entry["links"], f"stage {stage}: _hp_optimizer_states_linked is gone"
            assert entry["linked_after"], f"stage {stage}: moments are not linked by compat.link_optimizer_states"
            if Version(deepspeed.__version__) == Version("0.19.8"):
                assert not entry["linked_before"], "DeepSpeed links all groups now: link_optimizer_states can go"


def test_values_are_found_in_what_optimizers_step():
    found = run_ranks("tests.distributed.optimizer_workers:private_names", 2)
    assert found.pop("loss_scaler") == [], "DynamicLossScaler keeps its state under other names"
    assert list(found) == ["0 fp32", "0 bf16", "1 fp32", "1 bf16", "2 fp32", "3 fp32"]
    for stage, entry in found.items():
        assert entry["values"], f"stage {stage}: compat.stepped does not find every value"
        assert entry["groups"], f"stage {stage}: compat.stepped finds other groups"
        # Three kinds, cut by two entries of per_module.
        assert entry["num_groups"] == 9
        assert entry["entries"], f"stage {stage}: compat.pieces does not find every entry once"
        assert entry["masters"], f"stage {stage}: the masters are not the values at the start"
        assert entry["steps"] == 0, f"stage {stage}: a step is counted before the first one; see compat.undo_first_step"


def test_an_engine_can_be_taken_apart():
    found = run_ranks("tests.distributed.full_calibration_workers:take_apart", 2)
    for stage, entry in found.items():
        for what, wrong in entry["names"].items():
            assert not wrong, (
                f"stage {stage}: {what} of DeepSpeed is not there any more: {wrong}; see compat.detach_engine"
            )
        assert entry["left"] == [], f"stage {stage}: compat.make_plain leaves {entry['left']} of the engine"
        assert entry["unknown"] == [], (
            f"stage {stage}: DeepSpeed puts {entry['unknown']} on modules now: add them to compat's names"
        )
        assert entry["alive"] == [], f"stage {stage}: {entry['alive']} outlive compat.make_plain"
        if Version(deepspeed.__version__) == Version("0.19.8"):
            assert entry["outlives_destroy"], f"stage {stage}: engine.destroy() is enough now: detach_engine can go"


def test_hooks_on_saved_tensors_and_equal_storages_are_told():
    assert not compat.has_saved_tensor_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda packed: packed):
        assert compat.has_saved_tensor_hooks()
    assert not compat.has_saved_tensor_hooks()
    tensor = torch.zeros(3, 4)
    assert compat.shares_storage(tensor, tensor.t()[1:])
    assert not compat.shares_storage(tensor, tensor.clone())


def test_an_older_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr(deepspeed, "__version__", "0.18.0")
    with pytest.raises(ValueError, match=r"0\.18\.0 is older than 0\.19\.8"):
        compat.check_version()


def test_what_others_engines_are_found_by():
    """A Trainer hands its callbacks no engine; see compat.engine_of."""
    from deepspeed.runtime.tensor_parallel import init_utils

    found = run_ranks("tests.distributed.workers:engines_of_a_model", 1)
    assert found == {"before": True, "first": True, "newest": True}, "engines are not found by their hooks any more"
    assert init_utils._TP_MODEL_INIT_ARGS is None


def test_weights_are_broadcast_where_the_start_without_it_expects():
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import Init

    called = {
        DeepSpeedEngine._broadcast_model: ["broadcast", "broadcast"],
        Init._zero_init_param: ["_convert_to_deepspeed_param", "broadcast", "broadcast", "partition"],
    }
    for function, expected in called.items():
        names = [
            node.func.attr
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        ]
        found = sorted(name for name in names if name in expected)
        assert found == sorted(expected), (
            f"{function.__qualname__} does something else now: see compat.without_broadcast"
        )
    before = DeepSpeedEngine._broadcast_model, Init._zero_init_param
    with pytest.raises(ZeroDivisionError), compat.without_broadcast():
        assert DeepSpeedEngine._broadcast_model is not before[0]
        raise ZeroDivisionError
    assert (DeepSpeedEngine._broadcast_model, Init._zero_init_param) == before
