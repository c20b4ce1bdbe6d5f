"""Where do a run's numbers go while it trains, and how do they survive an interruption?"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_text, parse_json, read_bytes, to_json
from sparse_zero.optional import require

FILE_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
# Of the file: a million steps take some 400 MB.
MAX_BYTES = 2**30
KINDS = ("train", "validation", "reselection", "event")

# Fields that place a row rather than measure something; TensorBoard gets the others.
_PLACE = ("kind", "step", "skipped", "changed")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics file, in the order in which they were written.

    An unfinished last line, as an interrupted process leaves it, is passed over.

    Raises:
        InputError: the file cannot be read, or a line is no row of metrics.
    """
    # The cut may lie within a character; what it leaves is passed over with its line.
    text = read_bytes(path, MAX_BYTES).decode("utf-8", errors="replace")
    lines = text.split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, strict=True)
        except ValueError as error:
            if number == len(lines):  # Every complete line ends with a newline, so this one was cut off.
                break
            raise InputError(f"{path} line {number} is no JSON ({error}): delete that line") from error
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or row.get("kind") not in KINDS:
            raise InputError(f"{path} line {number} is no row of metrics (kind, step): delete that line")
        rows.append(row)
    return rows


def _is_done(row: Mapping[str, Any], resumed_step: int) -> bool:
    """Whether a row tells of what came before the checkpoint; a re-selection comes after that of its step."""
    step: int = row["step"]
    return step < resumed_step or (step == resumed_step and row["kind"] != "reselection")


class MetricsLog:
    """Appends rows to ``metrics.jsonl``, one JSON object a line, each visible as soon as it is written.

    Only one rank may own the log of a run folder.

    Args:
        run_folder: created when missing.
        resumed_step: the last step of the checkpoint that training continues from: rows of what comes after the
            checkpoint, which will be done again, are removed. None: a new run, all earlier rows are removed.
        tensorboard: also write the numbers for TensorBoard, below ``run_folder/tensorboard``.

    Raises:
        InputError: TensorBoard is asked for and not installed, or the file to continue is damaged.
    """

    def __init__(self, run_folder: Path, *, resumed_step: int | None = None, tensorboard: bool = False) -> None:
        writer_module = None
        if tensorboard:
            # torch's module reports a missing tensorboard under the latter's name: ask for that one first.
            for module in ("tensorboard", "torch.utils.tensorboard"):
                writer_module = require(module, extra="tracking", purpose="write the metrics for TensorBoard")
        self.path = run_folder / FILE_NAME
        self._keep_until(resumed_step)
        self._file: IO[str] = self.path.open("a", encoding="utf-8", newline="\n")
        self._writer: Any = None
        if writer_module is not None:
            self._writer = writer_module.SummaryWriter(
                log_dir=str(run_folder / TENSORBOARD_FOLDER),
                purge_step=0 if resumed_step is None else resumed_step + 1,
            )

    def _keep_until(self, resumed_step: int | None) -> None:
        rows = read_metrics(self.path) if resumed_step is not None and self.path.exists() else []
        kept = [row for row in rows if resumed_step is not None and _is_done(row, resumed_step)]
        atomic_write_text(self.path, "".join(to_json(row) + "\n" for row in kept))

    def write(self, row: Mapping[str, object]) -> None:
        """Append one row: its ``kind`` (train, validation, reselection, event), its ``step``, and its numbers.

        Non-finite numbers are written as null; TensorBoard does not get them.
        """
        kind, step = row.get("kind"), row.get("step")
        if kind not in KINDS or not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"a row of metrics needs a kind of {', '.join(KINDS)} and a whole step, not {dict(row)}")
        self._file.write(to_json(row) + "\n")
        self._file.flush()
        if self._writer is None:
            return
        if kind == "event":
            self._writer.add_text("events", str(row.get("event", "")), global_step=step)
        for name, value in row.items():
            if name not in _PLACE and isinstance(value, (int, float)) and math.isfinite(value):
                self._writer.add_scalar(f"{kind}/{name}", value, global_step=step)

    def event(self, step: int, event: str) -> None:
        """Append a row that says in words what happened at ``step``."""
        self.write({"kind": "event", "step": step, "event": event})

    def close(self) -> None:
        """Close the files; calling it again does nothing."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
