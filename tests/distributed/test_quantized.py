"""Does a quantized base train over ZeRO as its dense form does in one process, and stay bit for bit as it is?"""

from importlib.util import find_spec

import pytest

from tests.distributed.spawn import run_ranks

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes (extra quant)")


def test_a_quantized_base_trains_as_its_dense_form_and_stays_as_it_is(tmp_path):
    report = run_ranks("tests.distributed.quantized_workers:everything", 2, folder=str(tmp_path))
    assert (
        "what belongs to the codes of the quantized weights differs between rank 0 and ranks [1]" in report["differing"]
    )
    # Invariant 3, over stages 0 to 3, NF4 and int8, accumulation and gradient checkpointing.
    assert len(report["dense"]) == 5
    for entry in report["dense"]:
        assert entry["effect_of_training"] > 1e-2, entry
        assert entry["loss_difference"] <= 1e-5, entry
        assert entry["weight_difference"] <= 2e-5, entry
        # After DeepSpeed has cast, moved, broadcast or sharded them, and after training.
        assert entry["unchanged"], entry
    # A bf16 base: a bf16 engine has bf16 values over fp32 masters, an fp32 one leaves fp32 values as they are.
    cast, cast_too, wide = report["precisions"]
    assert cast["values_dtypes"] == cast_too["values_dtypes"] == ["torch.bfloat16"]
    assert wide["values_dtypes"] == ["torch.float32"]
    assert min(cast["masters_rounded"], cast_too["masters_rounded"]) > 0
    assert wide["masters_rounded"] == 0
    for entry in report["precisions"]:
        assert entry["loss_difference"] <= 2e-2, entry
        assert entry["unchanged"], entry
    # Checkpoint and re-selection.
    continued = report["continued"]
    assert continued["continued"]
    assert continued["changed"]
    assert continued["dropped"] > 0
    assert continued["score_difference"] <= 1e-5
    assert max(continued["output_difference"], continued["merged_difference"]) <= 1e-5
    assert continued["unchanged"]
