"""Does a run multiply its blocks with the kernels that its config asks for?"""

import sys
from pathlib import Path

import pytest

from tests.launcher.test_train import base, rows, run, write_config

__all__ = ["base"]

# Counts the calls of one of the kernels, in the worker's own process.
_WORKER = """
import sys
from launcher.train import main
from sparse_zero.layers import triton_kernels

calls = 0
plain = triton_kernels.block_gradients

def counted(*arguments, **options):
    global calls
    calls += 1
    return plain(*arguments, **options)

triton_kernels.block_gradients = counted
code = main(sys.argv[1:])
print(f"kernel calls: {calls}")
sys.exit(code)
"""


@pytest.mark.slow
def test_tritons_kernels_train_as_torchs_do(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = {}
    for kernels in ("plain", "triton"):
        (tmp_path / kernels).mkdir()
        config = write_config(
            base, tmp_path / kernels, training__region_kernels=kernels, training__steps=3,
            training__validation_every=None, output__evaluate=False, output__merged=False,
        )  # fmt: skip
        said = run([sys.executable, "-c", _WORKER, "--config", str(config)], tmp_path / kernels)
        found[kernels] = [row["loss"] for row in rows(tmp_path / kernels)]
        calls = int(said.rpartition("kernel calls: ")[2].split()[0])
        assert (calls > 0) == (kernels == "triton")
    assert found["triton"] == pytest.approx(found["plain"], rel=1e-5)
