"""What has a rank written, how is it kept in the run folder, and what of it is shown where the run was launched?

A rank's standard output and error go to two files of its own in the folder of its node's guard, so that ranks of any
launcher are told apart and hundreds of them do not speak at once. The guard reads them as they grow. It copies them
into ``logs/rank-N.log`` of the run folder, from the moment when the rank says that the folder is this run's; what is
refused before that leaves no trace there. What is copied gives its room back.
"""

import contextlib
import ctypes
import os
import re
import socket
import time
from pathlib import Path

# Standard output and error, by the descriptor.
STREAMS = {1: "out", 2: "err"}
# Read at once of a rank that lives, so that the guard does not forget its work over one that writes without end.
_PIECE_BYTES, _MOST_PIECES = 1 << 18, 16
# Shown of rank 0 in one report: a launcher that was stopped for long is not flooded.
_SHOWN_CHARACTERS = 1 << 18
# Kept of each stream, for last words, of which stacks take most.
_TAIL_CHARACTERS = 1 << 18
# Of the stacks of a rank, the last of which is the main thread's.
_STACKS_CHARACTERS = 20_000
# How what explains the end of a rank begins: Python's errors, ours, and those of libraries that crash.
_CRASH = "Fatal Python error"
ERROR_SIGNS = ("Traceback (most recent call last)", "sparse-zero: error:", _CRASH)
# Lines of an error; many more where they are all that is left of the rank.
_LINES, _LINES_UNKEPT = 40, 400
# Room is given back in pieces of so many bytes at least: fallocate's PUNCH_HOLE and KEEP_SIZE.
_HOLE_BYTES, _PUNCH = 1 << 20, 0x02 | 0x01


def stream_file(folder: Path, rank: int | str, descriptor: int) -> Path:
    """Where a rank writes what goes to one of its descriptors."""
    return folder / f"rank-{rank}.{STREAMS[descriptor]}"


def ranks_that_wrote(folder: Path) -> list[int]:
    """Ranks that have begun to write there."""
    found = (re.fullmatch(r"rank-(\d+)\.err", path.name) for path in folder.glob("rank-*.err"))
    return sorted(int(match[1]) for match in found if match)


def redirect(folder: Path, rank: str) -> None:
    """Have this process, and what it becomes, write into the files of ``rank``; where they cannot be, nothing."""
    for descriptor in STREAMS:
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            opened = os.open(stream_file(folder, rank, descriptor), flags, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)


def last_error(text: str, most_lines: int = _LINES) -> str:
    """The end of what a rank has said: from its last error on, if it said one; of a crash the thread that crashed."""
    lines = text.rstrip().splitlines()
    begins = [number for number, line in enumerate(lines) if line.startswith(ERROR_SIGNS)]
    if not begins:
        return "\n".join(lines[-10:])
    found = lines[begins[-1] :]
    if found[0].startswith(_CRASH):
        crashed = next((number for number, line in enumerate(found) if line.startswith("Current thread")), 1)
        stack = found[crashed:]
        stack = stack[: stack.index("")] if "" in stack else stack
        return "\n".join([found[0], *(stack if len(stack) <= most_lines else [*stack[:most_lines], "..."])])
    return "\n".join(found if len(found) <= most_lines else ["...", *found[-most_lines:]])


class _Stream:
    """One of a rank's two files: what was read of it, and what was kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.read_bytes = self.kept_bytes = self._freed_bytes = 0
        self.tail = ""

    def piece(self, begin: int, *, is_whole: bool) -> bytes:
        """What lies from ``begin`` on, up to the end of a line unless there is no more to come."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(begin)
            piece = file.read(_PIECE_BYTES)
            if is_whole and len(piece) < _PIECE_BYTES:
                return piece
            # A line without end, as of a progress bar, comes as it is.
            return piece[: piece.rfind(b"\n") + 1] or (piece if len(piece) == _PIECE_BYTES else b"")
        return b""

    def keep(self, log: int) -> None:
        """Append what was read and not kept yet to an open file.

        Raises:
            OSError: it cannot be written; what was, counts as kept.
        """
        while self.kept_bytes < self.read_bytes:
            piece = self.piece(self.kept_bytes, is_whole=True)[: self.read_bytes - self.kept_bytes]
            if not piece:
                return
            self.kept_bytes += os.write(log, piece)
        if self.kept_bytes - self._freed_bytes >= _HOLE_BYTES:
            self._free()

    def _free(self) -> None:
        """Give back the room of what is kept; the rank goes on writing at the end, wherever that is."""
        with contextlib.suppress(OSError, AttributeError), self._path.open("rb+") as file:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
            # Only from the last hole on; the last page may be in use.
            libc.fallocate(file.fileno(), _PUNCH, self._freed_bytes, self.kept_bytes - self._freed_bytes)
            self._freed_bytes = self.kept_bytes


class RankLog:
    """What one rank has written.

    Args:
        folder: of the guard, in which the rank's files are.
        rank: whose.
        keep_in: folder of the run for logs, made when it is needed; None: nothing is kept.
    """

    def __init__(self, folder: Path, rank: int, keep_in: Path | None) -> None:
        self._rank, self._keep_in = rank, keep_in
        self._streams = {descriptor: _Stream(stream_file(folder, rank, descriptor)) for descriptor in STREAMS}
        self._unshown: list[tuple[str, str]] = []
        self._keeps = self._has_heading = self._has_told = False

    def read(self, *, keeps: bool = False, has_ended: bool = False) -> None:
        """Take what is new.

        Args:
            keeps: whether all of it may go to the run folder, from now on.
            has_ended: there is nothing to come: it is read to its end.
        """
        self._keeps = self._keeps or keeps
        for descriptor, stream in self._streams.items():
            num_pieces = 0
            while (has_ended or num_pieces < _MOST_PIECES) and (
                piece := stream.piece(stream.read_bytes, is_whole=has_ended)
            ):
                num_pieces += 1
                stream.read_bytes += len(piece)
                text = piece.decode(errors="replace")
                stream.tail = (stream.tail + text)[-_TAIL_CHARACTERS:]
                if self._rank == 0:
                    self._unshown.append((STREAMS[descriptor], text))
        if self._keeps and self._keep_in is not None:
            with contextlib.suppress(OSError):  # A full disk is told by those who have something to save.
                self._keep(self._keep_in)

    def _keep(self, folder: Path) -> None:
        if all(stream.kept_bytes == stream.read_bytes for stream in self._streams.values()):
            return
        folder.mkdir(exist_ok=True)
        log = os.open(folder / f"rank-{self._rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if not self._has_heading:
                now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                os.write(log, f"== rank {self._rank} on {socket.gethostname()}, {now}\n".encode())
                self._has_heading = True
            for stream in self._streams.values():
                stream.keep(log)
        finally:
            os.close(log)

    @property
    def is_kept(self) -> bool:
        """Whether the run folder has it."""
        return self._has_heading

    def take(self) -> list[tuple[str, str]]:
        """(stream, text) of what rank 0 has written and was not taken yet; where it is too much, the end of it."""
        taken, self._unshown = self._unshown, []
        left = _SHOWN_CHARACTERS
        for number in range(len(taken) - 1, -1, -1):
            left -= len(taken[number][1])
            if left < 0:
                return [("err", "... (what rank 0 wrote here is left out)\n"), *taken[number + 1 :]]
        return taken

    def last_words(self) -> str:
        """What the rank, which has ended, said last, once; of its standard output where it said no error."""
        if self._has_told:
            return ""
        self._has_told = True
        errors = self._streams[2].tail
        text = errors if errors.strip() else self._streams[1].tail
        return last_error(text, _LINES if self.is_kept else _LINES_UNKEPT)

    def mark(self) -> int:
        """A place in what the rank says as errors, for :meth:`since`."""
        return self._streams[2].read_bytes

    def since(self, mark: int) -> str:
        """What the rank has said as errors since then; it is not shown again."""
        stream = self._streams[2]
        new = stream.read_bytes - mark
        text = stream.tail.encode()[-new:].decode(errors="replace") if new else ""
        self._unshown = [(name, shown) for name, shown in self._unshown if name != "err"]
        return text[-_STACKS_CHARACTERS:]
