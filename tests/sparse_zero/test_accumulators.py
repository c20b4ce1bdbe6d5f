"""Do accumulators add up what they are given, in memory and on disk, and leave nothing behind?"""

import gc
import resource
import shutil
from pathlib import Path

import pytest
import torch

from sparse_zero.errors import InputError
from sparse_zero.selection.accumulators import Accumulators, _left_in_groups
from sparse_zero.selection.config import RegionConfig, SelectionConfig

SHAPES = {"a": (5, 7), "b[1]": (1, 3), "c": (4, 4)}


def mappings(folder: Path) -> int:
    """How many files of ``folder`` this process has mapped into memory."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
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


def test_a_dtype_whose_rounding_would_choose_is_refused():
    rows = (RegionConfig(kind="row", modules=("*",), per_matrix=1),)
    with pytest.raises(InputError, match=r"accumulator_dtype is 'bfloat16': choose one of float32, float64"):
        SelectionConfig(regions=rows, accumulator_dtype="bfloat16")  # type: ignore[arg-type]


GIB = 2**30


@pytest.mark.parametrize(
    ("lines", "files", "left"),
    [
        # Version 2: the lower limit of the groups above one another; cached files can be had.
        (
            "0::/pod/job\n",
            {
                "pod/memory.max": 9 * GIB,
                "pod/memory.current": 7 * GIB,
                "pod/job/memory.max": 8 * GIB,
                "pod/job/memory.current": 7 * GIB,
                "pod/job/memory.stat": f"anon {6 * GIB}\ninactive_file {2**20}\nactive_file {2**21}\n",
            },
            GIB + 3 * 2**20,
        ),
        ("0::/pod/job\n", {"pod/job/memory.max": "max", "pod/job/memory.current": GIB}, None),
        # The path is the host's, and the container sees its own group as the root.
        ("0::/on/the/host\n", {"memory.max": 3 * GIB, "memory.current": GIB}, 2 * GIB),
        # Version 1, where version 2 is mounted beside it, without memory.
        (
            "5:cpu,cpuacct:/job\n4:memory:/job\n0::/job\n",
            {
                "memory/job/memory.limit_in_bytes": 4 * GIB,
                "memory/job/memory.usage_in_bytes": 5 * GIB,
                "memory/job/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n",
                "memory/memory.limit_in_bytes": 2**63 - 4096,
                "memory/memory.usage_in_bytes": 6 * GIB,
            },
            GIB,
        ),
        ("4:memory:/job\n", {"memory/memory.limit_in_bytes": GIB, "memory/memory.usage_in_bytes": 2 * GIB}, 0),
        ("1:cpu:/job\n", {"memory.max": GIB, "memory.current": 0}, None),
    ],
)
def test_limits_of_the_container_are_read(lines, files, left, tmp_path):
    (tmp_path / "self").write_text(lines)
    for name, text in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(f"{text}\n")
    assert _left_in_groups(tmp_path / "self", tmp_path / "mounted") == left
    assert _left_in_groups(tmp_path / "missing", tmp_path / "mounted") is None
