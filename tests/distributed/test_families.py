"""Do parameters on the hook path train under real ZeRO as they do in a dense model on one process?"""

import pytest

from tests.distributed.spawn import run_ranks


@pytest.mark.parametrize(
    "name",
    [pytest.param("gpt2", marks=pytest.mark.slow), "mixtral", pytest.param("bert", marks=pytest.mark.slow)],
)
def test_transposed_tied_expert_and_classifier_weights_equal_the_dense_reference(name, tmp_path):
    report = run_ranks("tests.distributed.family_workers:families_equal_dense", 2, name=name, folder=str(tmp_path))
    assert len(report) == 4
    for entry in report:
        assert entry["effect"] > 1e-2, entry
        assert entry["difference"] <= 1e-5, entry
        assert entry["hooked"] >= 3, entry
        assert entry["dense_gradients"] == 0, entry
        assert 0 <= entry["optimizer_elements"] - entry["num_parameters"] <= 32 * 2 * 4, entry
        assert entry.get("written_back", True), entry
        # Masters are fp32 here, so the adapter's numbers are those that trained.
        assert entry["adapter_difference"] <= 1e-6, entry
        assert entry["resumed_difference"] == 0.0, entry
