"""When does a run write checkpoints, which ones does it keep, and how long does training wait for them?"""

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher.config import RunConfig, resolved_yaml
from launcher.run_folder import RunFolder
from launcher.yaml_files import parse_yaml
from models.gather import gather_json
from sparse_zero.checkpoint.checkpoint import Snapshot, take_snapshot
from sparse_zero.checkpoint.folders import MANIFEST, set_aside
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.checkpoint.writer import CheckpointWriter
from sparse_zero.collectives import failing_together


@dataclass(frozen=True, kw_only=True)
class _Best:
    """The checkpoint with the lowest validation loss so far."""

    step: int
    validation_loss: float
    # Whose loss it is: settings of the validation data, with which a start may differ from the one before.
    of: Mapping[str, Any]


def _validation_data(config: RunConfig) -> dict[str, Any]:
    return {"data.validation": config.data.validation, "data.validation_split": config.data.validation_split}


def _known_best(config: RunConfig, folder: RunFolder, earlier: Mapping[str, Any]) -> _Best | None:
    """What the checkpoint that is continued from tells of the best one, if that is still there. Collective.

    None, with a warning, where losses of this start are of other data: they are not to be compared.
    """
    told = earlier.get("best")
    if not isinstance(told, Mapping):
        return None
    step, loss = told.get("step"), told.get("validation_loss")
    if not isinstance(step, int) or not isinstance(loss, (int, float)):
        return None
    # Where nodes have disks of their own, the others may not have it; all ranks must say the same.
    is_there = any(gather_json((folder.checkpoint(step) / MANIFEST).is_file()))
    if not is_there:
        return None
    now = _validation_data(config)
    of = earlier.get("best_of") or now
    if config.checkpoint.keep_best != "none" and of != now:
        name = next(key for key in now if of.get(key) != now[key])
        warnings.warn(
            f"{name} was {of.get(name)!r} when the best checkpoint was found and is {now[name]!r}: losses of other "
            f"data are not compared, checkpoint.keep_best begins anew, and {folder.checkpoint(step).name} is kept no "
            "longer than others",
            stacklevel=3,
        )
        return None
    return _Best(step=step, validation_loss=float(loss), of=of)


class RunCheckpoints:
    """Writes the checkpoints of one run; on every rank, alike. Collective when it is made.

    Training waits for a copy of the state, and for the write before if that is not done yet. Whatever goes wrong while
    a checkpoint is written in the background ends all ranks at their next step, see :meth:`has_failed`. As a context,
    it waits at its end.

    Args:
        config: of the run.
        folder: of the run.
        base: identity of the base, told in every checkpoint.
        earlier: what the checkpoint that is continued from was told.
        writes: whether this rank gets the state and writes it.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        base: BaseIdentity | None,
        earlier: Mapping[str, Any],
        *,
        writes: bool,
    ) -> None:
        self._validation_data = _validation_data(config)
        self._config, self._folder, self._base, self._writes = config.checkpoint, folder, base, writes
        self._run_config: dict[str, Any] = parse_yaml(resolved_yaml(config), "the resolved config")
        self._writer = CheckpointWriter(background=config.checkpoint.background)
        self._best = _known_best(config, folder, earlier)
        # Seconds that training has waited, and for how many checkpoints.
        self.stall_seconds, self.num_saves = 0.0, 0

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after ``step`` steps, by their number."""
        every = self._config.every
        return every is not None and step % every == 0

    def is_best(self, step: int, validation_loss: float) -> bool:
        """Whether the state after ``step`` steps is the best so far and to be kept; on all ranks, with one loss."""
        is_lower = math.isfinite(validation_loss) and (
            self._best is None or validation_loss < self._best.validation_loss
        )
        if self._config.keep_best == "none" or not is_lower:
            return False
        self._best = _Best(step=step, validation_loss=validation_loss, of=self._validation_data)
        return True

    @property
    def has_failed(self) -> bool:
        """Whether a write of this rank has failed; all ranks must then call :meth:`wait`."""
        return self._writer.has_failed

    def wait(self) -> None:
        """Return when everything is written. Collective.

        Raises:
            Exception: of the write that failed, on its rank; :class:`~sparse_zero.collectives.PeerError` on the others.
        """
        with failing_together():
            self._writer.wait()

    def save(self, engine: Any, step: int, extra: Mapping[str, Any]) -> None:
        """Save the state after ``step`` steps: what is written, is so in the background. Collective.

        Args:
            engine: between two steps.
            step: optimizer steps done.
            extra: what a later start is to be told, JSON values.

        Raises:
            Exception: see :meth:`wait`.
        """
        started = time.perf_counter()
        self.wait()
        best = None if self._best is None else {"step": self._best.step, "validation_loss": self._best.validation_loss}
        snapshot = take_snapshot(
            engine,
            extra={**extra, "best": best, "best_of": None if self._best is None else dict(self._best.of)},
            base=self._base,
            config=self._run_config,
            random_states=False,  # All streams are seeded by the step.
            keep=self._writes,
        )
        with failing_together():
            if snapshot is not None:
                self._submit(snapshot, self._folder.checkpoint(step))
        self.stall_seconds += time.perf_counter() - started
        self.num_saves += 1

    def _submit(self, snapshot: Snapshot, checkpoint: Path) -> None:
        keep, best = self._config.keep, None if self._best is None else self._folder.checkpoint(self._best.step)
        set_aside(checkpoint)
        self._writer.submit(snapshot, checkpoint, lambda: self._folder.mark_latest(checkpoint, keep, best))

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait; collective where the block ended well, and quiet where it raised."""
        if error is None:
            self.wait()
        else:
            self._writer.__exit__(kind, error, trace)
