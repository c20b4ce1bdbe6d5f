"""Does this DeepSpeed still have the private names that sparse_zero.zero.compat uses, and still need its repair?"""

import deepspeed
import pytest
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
        else:
            assert entry["links"], f"stage {stage}: _hp_optimizer_states_linked is gone"
            assert entry["linked_after"], f"stage {stage}: moments are not linked by compat.link_optimizer_states"
            if Version(deepspeed.__version__) == Version("0.19.8"):
                assert not entry["linked_before"], "DeepSpeed links all groups now: link_optimizer_states can go"


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


def test_an_older_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr(deepspeed, "__version__", "0.18.0")
    with pytest.raises(ValueError, match=r"0\.18\.0 is older than 0\.19\.8"):
        compat.check_version()
