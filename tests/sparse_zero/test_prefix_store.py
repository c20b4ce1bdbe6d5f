"""Do the stored bytes of samples come back, from all ranks' files, and only where they can be believed?"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_zero.prefix import store as store_module
from sparse_zero.prefix.config import StoredDtype
from sparse_zero.prefix.encoding import bytes_per_token, decode, encode
from sparse_zero.prefix.store import SampleStore, num_storable, rank_files, remove_store, stored_bytes

LENGTHS, BYTES = (3, 1, 7, 2, 5), 12


def rows(index: int) -> Tensor:
    """[length, BYTES] of a sample, all different."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, 256, (LENGTHS[index], BYTES), generator=generator, dtype=torch.uint8)


def assert_reads(store: SampleStore, indices: list[int]) -> None:
    found = store.read(indices)
    assert found is not None
    assert torch.equal(found, torch.cat([rows(index) for index in indices]))


def make(folder: Path, rank: int = 0, max_bytes: int | None = None, reserve_bytes: int = 0) -> SampleStore:
    store = SampleStore(folder, rank, LENGTHS, BYTES, max_bytes, reserve_bytes)
    store.refresh()
    return store


def stored(folder: Path, samples: list[int], rank: int = 0) -> SampleStore:
    store = make(folder, rank)
    assert all(store.is_wanted(index) for index in samples)
    assert store.write({index: rows(index) for index in samples}) == len(samples)
    store.sync()
    store.refresh()
    return store


def test_samples_come_back_in_the_order_asked_for_from_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_MAX_OPEN", 2)
    first, *others = [stored(tmp_path, samples, rank) for rank, samples in enumerate([[4, 1], [0], [2], [3]])]
    assert first.read([2]) is None  # The others came after its look.
    first.refresh()
    for order in ([4, 0, 2, 1, 3], [3], [1, 1]):
        assert_reads(first, order)
    nothing = first.read([])
    assert nothing is not None
    assert nothing.shape == (0, BYTES)
    assert not any(first.is_wanted(index) for index in range(5))
    assert [store.own_bytes for store in (first, *others)] == [6 * BYTES, 3 * BYTES, 7 * BYTES, 2 * BYTES]
    # Also those of ranks that are no more.
    assert first.num_bytes() == sum(LENGTHS) * BYTES
    assert stored_bytes(tmp_path) > 0
    others_files = [tmp_path / name for name in ("rank-1.bin", "rank-000001.done", ".rank-00000.json.7.tmp")]
    for path in others_files:
        path.write_bytes(b"\xff")
    (tmp_path / ".rank-00000.done.7.tmp").touch()
    first.refresh()
    assert len(rank_files(tmp_path)) == 8
    remove_store(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others_files)


def test_only_what_was_synced_is_believed(tmp_path):
    store = stored(tmp_path, [1])
    store.write({2: rows(2)})
    assert not store.is_wanted(2)
    assert store.read([2]) is None
    # A process that ends here has written it in vain.
    store.close()
    again = make(tmp_path)
    assert_reads(again, [1])
    assert again.read([1, 2]) is None
    assert again.is_wanted(2)
    assert again.own_bytes == BYTES
    again.write({2: rows(2)})
    again.sync()
    assert_reads(stored(tmp_path, []), [1, 2])


def test_damaged_files_are_not_believed(tmp_path):
    stored(tmp_path, [0, 3, 4]).close()
    data, done = tmp_path / "rank-00000.bin", tmp_path / "rank-00000.done"
    with data.open("r+b") as file:
        file.truncate(sum(LENGTHS[:4]) * BYTES + 1)  # Cuts the last sample.
    store = make(tmp_path)
    assert store.own_bytes == (LENGTHS[0] + LENGTHS[3]) * BYTES
    assert store.is_wanted(4)
    assert store.read([4]) is None
    assert_reads(store, [0, 3])
    with data.open("r+b") as file:
        file.truncate(2)  # While it is read.
    assert store.read([3]) is None
    assert store.is_wanted(3)
    done.write_bytes(b"\xff\xff")
    assert make(tmp_path).read([0]) is None
    done.unlink()
    data.unlink()
    assert make(tmp_path).read([0]) is None


def test_a_bound_takes_the_first_samples(tmp_path):
    store = make(tmp_path, max_bytes=11 * BYTES)
    assert store.num_storable == 3
    assert store.needed_bytes == 11 * BYTES
    assert [store.is_wanted(index) for index in range(5)] == [True, True, True, False, False]
    assert num_storable(LENGTHS, BYTES, 11 * BYTES - 1) == 2
    assert num_storable(LENGTHS, BYTES, 1) == 0
    assert num_storable(LENGTHS, BYTES, None) == num_storable(LENGTHS, BYTES, 10**6) == 5


def test_a_full_disk_is_told_and_takes_no_more(tmp_path):
    (tmp_path / "rank-00000.bin").symlink_to("/dev/full")
    store = make(tmp_path)
    assert not store.write({0: rows(0)})
    assert store.problem is not None
    assert store.problem.strerror == "No space left on device"
    assert not store.is_wanted(1)
    store.sync()
    assert store.own_bytes == 0
    assert not (tmp_path / "rank-00000.done").exists()


def test_the_reserve_of_the_disk_is_kept(tmp_path):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    size = 64 * os.sysconf("SC_PAGESIZE")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)], check=False)
    if made.returncode:
        pytest.skip("a small disk cannot be mounted here")
    disk = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    # It is there as long as something of it is open, and gone with this process in any case.
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    try:
        folder, lengths, per_token, reserve = Path(f"/proc/self/fd/{disk}"), [1] * 64, size // 64, size // 2
        store = SampleStore(folder, 0, lengths, per_token, reserve_bytes=reserve)
        page = torch.ones(1, per_token, dtype=torch.uint8)
        taken = [store.write({index: page, index + 1: page}) for index in range(0, 48, 2) if store.is_wanted(index)]
        assert taken in ([2] * 16 + [0], [2] * 15 + [0])  # A page may be the folder's.
        assert store.problem is not None
        assert "stays free for checkpoints" in store.problem.strerror
        assert shutil.disk_usage(folder).free >= reserve
        store.sync()
        assert store.own_bytes == sum(taken) * per_token
        store.close()
    finally:
        os.close(disk)
    assert not any(tmp_path.iterdir())


def test_a_reserve_that_is_not_there_takes_nothing(tmp_path):
    store = make(tmp_path, reserve_bytes=shutil.disk_usage(tmp_path).free + 2**40)
    assert not store.write({0: rows(0)})
    assert store.problem is not None
    assert not any(tmp_path.iterdir())
    assert make(tmp_path, reserve_bytes=1).write({0: rows(0)}) == 1


def test_much_that_is_written_is_synced_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_SYNC_BYTES", 10 * BYTES)
    store = make(tmp_path)
    for index, own in ((0, 0), (1, 0), (2, 11), (3, 11), (4, 11)):
        store.write({index: rows(index)})
        assert store.own_bytes == own * BYTES
    store.sync()
    assert_reads(make(tmp_path), [0, 1, 2, 3, 4])


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_encodings_say_their_size_and_their_error(compute):
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(9, 24, generator=generator) * torch.logspace(-3, 3, 9)[:, None]).to(compute)
    states[4] = 0
    errors: dict[StoredDtype, float] = {"compute": 0.0, "bfloat16": 2**-8, "float8": 2**-4}
    for stored_as, relative in errors.items():
        found = encode(states, stored_as)
        assert found.dtype == torch.uint8
        assert found.shape == (9, bytes_per_token(24, stored_as, compute))
        back = decode(found, stored_as, compute)
        assert back.dtype == compute
        # float8 has three bits after the first one, and its smallest step below them is 2**-9 of 448 of the largest.
        largest = states.float().abs().amax(1, keepdim=True)
        least = largest * 2**-10 / 448 if stored_as == "float8" else torch.zeros_like(largest)
        allowed = (states.float().abs() * relative).maximum(least) * (1.01 + (compute != torch.float32) * 0.1)
        assert ((back.float() - states.float()).abs() <= allowed).all(), stored_as
    assert torch.equal(decode(encode(states, "compute"), "compute", compute), states)
