"""Does the peak rise with what is held, and start again when asked?"""

import gc
import threading
from pathlib import Path

import pytest
import torch

from sparse_zero.memory.measure import PeakMemory, _rusage_peak_bytes

SIZE = 64 * 2**20
# Other allocations of the interpreter meanwhile.
SLACK = 16 * 2**20


def _touch_and_free() -> None:
    """Hold SIZE bytes for a moment; a mapping of its own goes back to the system when freed."""
    import mmap

    with mmap.mmap(-1, SIZE) as memory:
        for page in range(0, SIZE, 4096):
            memory[page] = 1


@pytest.fixture
def kernel() -> PeakMemory:
    peak = PeakMemory("cpu")
    if not peak.reset() or peak.source != "kernel":
        pytest.skip("this kernel does not set the high-water mark back")
    return peak


def test_the_kernels_mark_holds_the_peak_and_is_set_back(kernel: PeakMemory) -> None:
    before = kernel.peak_bytes()
    _touch_and_free()
    peak = kernel.peak_bytes()
    assert before + SIZE - SLACK < peak < before + SIZE + SLACK
    current = kernel.current_bytes()
    assert current is not None
    assert current < before + SLACK
    assert kernel.reset()
    assert kernel.peak_bytes() < before + SLACK


def _samplers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "peak-memory"}


def test_without_permission_a_thread_samples(tmp_path: Path) -> None:
    others = _samplers()
    with PeakMemory("cpu", sample_seconds=0.001, clear_refs_path=tmp_path / "absent" / "clear_refs") as peak:
        if peak.current_bytes() is None:
            pytest.skip("no /proc on this system")
        assert peak.reset()
        assert peak.source == "sampled"
        before = peak.peak_bytes()
        block = torch.zeros(SIZE // 4)
        held = threading.Event()
        held.wait(0.05)
        del block
        assert before + SIZE - SLACK < peak.peak_bytes() < before + SIZE + SLACK
        assert peak.reset()
        assert peak.peak_bytes() < before + SLACK
        assert _samplers() - others, "a thread looks"
    assert not _samplers() - others, "the thread has ended"
    assert peak.peak_bytes() > 0


def test_a_sampling_thread_ends_with_its_owner(tmp_path: Path) -> None:
    others = _samplers()
    peak = PeakMemory("cpu", sample_seconds=0.001, clear_refs_path=tmp_path / "absent" / "clear_refs")
    if not peak.reset():
        pytest.skip("no /proc on this system")
    (thread,) = _samplers() - others
    del peak
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_reset_that_the_kernel_ignores_is_noticed(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t  2000 kB\nVmRSS:\t  1000 kB\n")
    with PeakMemory("cpu", status_path=status, clear_refs_path=tmp_path / "clear_refs") as peak:
        assert (peak.source, peak.peak_bytes()) == ("kernel", 2000 * 1024)
        assert peak.reset()
        assert (tmp_path / "clear_refs").read_text() == "5"
        assert (peak.source, peak.peak_bytes()) == ("sampled", 1000 * 1024)


def test_without_proc_the_peak_is_the_processs(tmp_path: Path) -> None:
    peak = PeakMemory("cpu", status_path=tmp_path / "absent")
    assert peak.source == "process"
    assert not peak.reset(), "and says that it cannot start again"
    assert peak.current_bytes() is None
    assert peak.peak_bytes() > 2**20


def test_rusage_is_in_bytes() -> None:
    status = PeakMemory("cpu")
    if status.source != "kernel":
        pytest.skip("no /proc on this system")
    assert _rusage_peak_bytes() >= 0.5 * status.peak_bytes()


def test_cuda_asks_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    device = torch.device("cuda", 1)

    def answer(name: str, value: int | None) -> None:
        def called(asked: torch.device) -> int | None:
            assert asked == device
            calls.append(name)
            return value

        monkeypatch.setattr(torch.cuda, name, called)

    answer("max_memory_allocated", 7)
    answer("memory_allocated", 5)
    answer("reset_peak_memory_stats", None)
    peak = PeakMemory(device)
    assert (peak.source, peak.peak_bytes(), peak.current_bytes(), peak.reset()) == ("cuda", 7, 5, True)
    assert calls == ["max_memory_allocated", "memory_allocated", "reset_peak_memory_stats"]
