"""Which data, other than those that are trained on, chose a selection? Told with it: no other choice wins silently."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from launcher.config import RunConfig
from sparse_zero.errors import InputError

# In the metadata of scores and selections. Those without it were chosen before it was recorded, or without data.
_KEY = "calibration_data"


def record_calibration_data(metadata: MutableMapping[str, Any], config: RunConfig) -> None:
    """Write into the metadata of scores or of a selection what ``data.calibration`` was."""
    if config.calibrates:
        metadata[_KEY] = _of(config)


def check_calibration_data(metadata: Mapping[str, Any], config: RunConfig, made: str, remedy: str) -> None:
    """Raise where scores or a selection were made by other data than the config names.

    Args:
        metadata: of the scores or the selection.
        config: of the run.
        made: what was made, and of which file, such as ``the scores in a.safetensors were computed``.
        remedy: what to do about it.

    Raises:
        InputError: names the field and both values.
    """
    recorded = metadata.get(_KEY)
    if not isinstance(recorded, Mapping) or not config.calibrates:
        return
    for name, value in _of(config).items():
        if recorded.get(name) != value:
            raise InputError(f"data.{name} is {value!r}, and {made} with {recorded.get(name)!r}: {remedy}")


def _of(config: RunConfig) -> dict[str, Any]:
    data = config.data
    split = None if data.calibration is None else data.calibration_split
    return {"calibration": data.calibration, "calibration_split": split}
