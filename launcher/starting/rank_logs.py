"""What has a rank written, how is it kept in the run folder, and what of it is shown where the run was launched?

A rank's standard output and error go to two files of its own in the folder of its node's guard, so that ranks of any
launcher are told apart and hundreds of them do not speak at once. The guard reads them as they grow. It copies them
into ``logs/rank-N.log`` of the run folder, from the moment when the rank says that the folder is this run's; what is
refused before that leaves no trace there.
"""

import contextlib
import os
import socket
import time
from pathlib import Path

# Standard output and error, by the descriptor.
STREAMS = {1: "out", 2: "err"}
# Read at once, so that a guard does not forget the rest of its work over a rank that writes without end.
_PIECE_BYTES, _MOST_PIECES = 1 << 18, 16
# Kept of each stream, for last words.
_TAIL_CHARACTERS = 1 << 16
# How what explains the end of a rank begins: Python's errors, ours, and those of libraries that crash.
_CRASH = "Fatal Python error"
ERROR_SIGNS = ("Traceback (most recent call last)", "sparse-zero: error:", _CRASH)
# Of last words, and of the stacks of a rank.
_WORDS_CHARACTERS = 20_000


def stream_file(folder: Path, rank: int | str, descriptor: int) -> Path:
    """Where a rank writes what goes to one of its descriptors."""
    return folder / f"rank-{rank}.{STREAMS[descriptor]}"


def redirect(folder: Path, rank: str) -> None:
    """Have this process, and what it becomes, write into the files of ``rank``; where they cannot be, nothing."""
    for descriptor in STREAMS:
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            opened = os.open(stream_file(folder, rank, descriptor), flags, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)


def last_error(text: str, most_lines: int = 40) -> str:
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


class RankLog:
    """What one rank has written.

    Args:
        folder: of the guard, in which the rank's files are.
        rank: whose.
        keep_in: folder of the run for logs, made when it is needed; None: nothing is kept.
    """

    def __init__(self, folder: Path, rank: int, keep_in: Path | None) -> None:
        self._folder, self._rank, self._keep_in = folder, rank, keep_in
        self._read = dict.fromkeys(STREAMS, 0)
        # Read, but neither kept nor given up yet; and not shown yet.
        self._unkept: list[bytes] = []
        self._unshown: list[tuple[str, str]] = []
        self._tails = dict.fromkeys(STREAMS, "")
        # Characters of standard error so far.
        self._num_characters = 0
        self._has_heading = self.has_told = False

    def read(self, *, keeps: bool) -> None:
        """Take what is new.

        Args:
            keeps: whether it, and what came before, may go to the run folder.
        """
        for descriptor, stream in STREAMS.items():
            for _ in range(_MOST_PIECES):
                piece = self._piece(descriptor)
                if not piece:
                    break
                self._unkept.append(piece)
                text = piece.decode(errors="replace")
                self._unshown.append((stream, text))
                self._tails[descriptor] = (self._tails[descriptor] + text)[-_TAIL_CHARACTERS:]
                self._num_characters += len(text) if descriptor == 2 else 0
        if self._rank != 0:
            self._unshown.clear()
        if keeps and self._unkept:
            self._keep()

    def _piece(self, descriptor: int) -> bytes:
        with contextlib.suppress(OSError), stream_file(self._folder, self._rank, descriptor).open("rb") as file:
            file.seek(self._read[descriptor])
            piece = file.read(_PIECE_BYTES)
            if len(piece) == _PIECE_BYTES:  # The rest of a line, or of a letter, comes with the next piece.
                piece = piece[: piece.rfind(b"\n") + 1] or piece
            self._read[descriptor] += len(piece)
            return piece
        return b""

    def _keep(self) -> None:
        if self._keep_in is None:
            return
        with contextlib.suppress(OSError):  # A full disk is told by those who have something to save.
            self._keep_in.mkdir(exist_ok=True)
            with (self._keep_in / f"rank-{self._rank}.log").open("ab") as file:
                if not self._has_heading:
                    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                    file.write(f"== rank {self._rank} on {socket.gethostname()}, {now}\n".encode())
                    self._has_heading = True
                file.writelines(self._unkept)
            self._unkept.clear()

    def take(self) -> list[tuple[str, str]]:
        """(stream, text) of what was read and not taken yet."""
        taken, self._unshown = self._unshown, []
        return taken

    def last_words(self) -> str:
        """What the rank, which has ended, said last; of its standard output where it said no error."""
        self.has_told = True
        return last_error(self._tails[2] if self._tails[2].strip() else self._tails[1])[-_WORDS_CHARACTERS:]

    def mark(self) -> int:
        """A place in what the rank says as errors, for :meth:`since`."""
        return self._num_characters

    def since(self, mark: int) -> str:
        """What the rank has said as errors since then."""
        new = self._num_characters - mark
        return self._tails[2][-new:][:_WORDS_CHARACTERS] if new else ""
