"""How much memory has this process held at most, since a moment of our choice?"""

import re
import resource
import sys
import threading
import weakref
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

# cuda: the CUDA allocator's own peak on one device.
# kernel: the kernel's high-water mark of the resident size, which a write can set back.
# sampled: the largest resident size seen by a thread that looks every few milliseconds.
# process: the high-water mark since the process started; it cannot be set back.
Source = Literal["cuda", "kernel", "sampled", "process"]

PROCESS_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# The kernel's documented request to set VmHWM back to VmRSS (Documentation/filesystems/proc.rst).
_RESET_HIGH_WATER_MARK = "5"


def status_bytes(field: str, status: Path = PROCESS_STATUS) -> int | None:
    """A memory field of a Linux status file, by default this process's, in bytes; None where it is not offered."""
    try:
        match = re.search(rf"^{field}:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _rusage_peak_bytes() -> int:
    """The largest resident size since the process started, as POSIX reports it."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, the others KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """Peak memory of this process: on CUDA of the allocator, on a CPU of the resident size.

    On a CPU the figure contains the interpreter and its libraries. Where the kernel does not let the
    mark be set back, :meth:`reset` starts a sampling thread; ``source`` always tells which figure it is.

    The kernel's mark is one per process, so a reset by one instance is seen by all: whoever wants both
    per-phase and whole-run peaks takes the maximum over the phases.

    Args:
        device: where the memory lies; None is the current CUDA device if there is one, else the CPU.
        sample_seconds: time between two looks of the sampling thread.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        sample_seconds: float = 0.01,
        status_path: Path = PROCESS_STATUS,
        clear_refs_path: Path = _CLEAR_REFS,
    ) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(default if device is None else device)
        self._sample_seconds = sample_seconds
        self._status_path = status_path
        self._clear_refs_path = clear_refs_path
        self._sampled_bytes = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.source: Source = "cuda"
        if self.device.type != "cuda":
            self.source = "kernel" if self._status("VmHWM") is not None else "process"

    def _status(self, field: str) -> int | None:
        return status_bytes(field, self._status_path)

    def current_bytes(self) -> int | None:
        """Memory held now; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self._status("VmRSS")

    def peak_bytes(self) -> int:
        """The largest memory held since the last :meth:`reset`, or since the process started."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.source == "sampled":
            self._sample()
            return self._sampled_bytes
        kernel = self._status("VmHWM")
        return _rusage_peak_bytes() if kernel is None else kernel

    def reset(self) -> bool:
        """Let the peak start again from the memory held now; False where that is impossible."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        if self.source == "kernel" and self._reset_kernel():
            return True
        if self._status("VmRSS") is None:
            self.source = "process"
            return False
        self.source = "sampled"
        self._sampled_bytes = 0
        self._sample()
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(
                target=_keep_sampling,
                args=(weakref.ref(self), self._stop, self._sample_seconds),
                name="peak-memory",
                daemon=True,
            )
            self._thread.start()
        return True

    def close(self) -> None:
        """Stop the sampling thread, if there is one. The peak stays readable."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> "PeakMemory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reset_kernel(self) -> bool:
        """Ask the kernel to set its mark back; False when it refuses or ignores the request."""
        before, held = self._status("VmHWM"), self._status("VmRSS")
        try:
            self._clear_refs_path.write_text(_RESET_HIGH_WATER_MARK)
        except OSError:
            return False
        after = self._status("VmHWM")
        if before is None or held is None or after is None:
            return False
        # Some sandboxes accept the write and do nothing: the mark then stays above what is held.
        return after < before or after <= held

    def _sample(self) -> None:
        # Read first: a reset meanwhile must not be undone by a peak from before it.
        found = self._status("VmRSS") or 0
        self._sampled_bytes = max(self._sampled_bytes, found)


def _keep_sampling(owner: "weakref.ref[PeakMemory]", stop: threading.Event, seconds: float) -> None:
    """Look until ``stop`` is set, or until nobody holds the owner any more: an owner left open keeps no thread."""
    while not stop.wait(seconds):
        peak = owner()
        if peak is None:
            return
        peak._sample()
        del peak
