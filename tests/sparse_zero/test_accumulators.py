"""Do accumulators add up what they are given, in memory and on disk, and leave nothing behind?"""

import gc
import resource
import shutil
from pathlib import Path

import pytest
import torch

from sparse_zero.errors import InputError
from sparse_zero.selection.accumulators import Accumulators

SHAPES = {"a": (5, 7), "b[1]": (1, 3), "c": (4, 4)}


def mappings(folder: Path) -> int:
    """How many files of ``folder`` this process has mapped into memory."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_sums_are_those_of_the_dtype(dtype, on_disk, tmp_path):
    torch.manual_seed(0)
    gradients = {name: [torch.randn(shape) for _ in range(3)] for name, shape in SHAPES.items()}
    with Accumulators(SHAPES, dtype, tmp_path if on_disk else None) as accumulators:
        assert accumulators.num_bytes == (35 + 3 + 16) * getattr(torch, dtype).itemsize
        for name, parts in gradients.items():
            for part in parts:
                # As autograd may give them: transposed views of other dtypes.
                accumulators.add(name, part.T.contiguous().T)
        for name, parts in gradients.items():
            reference = torch.zeros(SHAPES[name], dtype=getattr(torch, dtype))
            for part in parts:
                reference += part
            assert name in accumulators
            taken = accumulators.take(name, owner=0)
            assert taken is not None
            assert taken.dtype == torch.float64
            assert torch.equal(taken, reference.double())
            assert name not in accumulators


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what is mapped")
@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_what_is_mapped_has_no_name_and_is_freed(ends, tmp_path):
    def use() -> None:
        with Accumulators(SHAPES, "float32", tmp_path) as accumulators:
            accumulators.add("a", torch.ones(5, 7))
            # Nothing that a killed process could leave, and still on that disk.
            assert list(tmp_path.iterdir()) == []
            assert mappings(tmp_path) == 1
            if ends != "well":
                raise ArithmeticError("with an error")

    if ends == "well":
        use()
    else:
        with pytest.raises(ArithmeticError):
            use()
    gc.collect()
    assert mappings(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_hold_takes_no_file(tmp_path):
    with Accumulators({}, "float32", tmp_path / "missing") as accumulators:
        assert accumulators.num_bytes == 0


def test_a_place_that_cannot_hold_them_is_named_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"accumulator_folder is .*missing, which is not a folder: create it"):
        Accumulators(SHAPES, "float32", tmp_path / "missing")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="which is not a folder"):
        Accumulators(SHAPES, "float32", file)
    huge = {"a": (2**21, 2**24)}  # 128 TiB
    assert shutil.disk_usage(tmp_path).free < 2**47
    with pytest.raises(InputError, match=r"rank 0 needs 131,072\.00 GiB there and .* are free.*accumulate: per_step"):
        Accumulators(huge, "float32", tmp_path)
    with pytest.raises(InputError, match=r"take 131,072\.00 GiB of host memory on every rank.*accumulator_folder"):
        Accumulators(huge, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_is_named():
    with pytest.raises(InputError, match=r"accumulator_folder is /proc"):
        Accumulators(SHAPES, "float32", "/proc")


def test_a_disk_that_fills_up_meanwhile_is_named(tmp_path):
    """The space is taken at once, so that no later write to the mapping can fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(InputError, match=r"accumulator_folder is .*File too large"):
            Accumulators({"a": (256, 256)}, "float32", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
