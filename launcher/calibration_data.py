"""Which data chose a selection, and in which form? Told with it: no other choice wins silently."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from models.records import local_files
from sparse_zero.checkpoint.folders import file_sha256
from sparse_zero.errors import InputError

# In the metadata of scores and selections. Those without it, or without some of what stands in it, were chosen before
# that was recorded, or without data.
_KEY = "calibration_data"
_CONTENT = "content"


def record_calibration_data(metadata: MutableMapping[str, Any], config: RunConfig, *, content: bool = False) -> None:
    """Write into the metadata of scores or of a selection what the calibration data was.

    Args:
        metadata: is changed.
        config: of the run.
        content: whether the data was just read: a hash of its files is recorded, too.
    """
    if config.calibrates:
        metadata[_KEY] = {**_named(config), **_form(config)}
        if content:
            metadata[_KEY][_CONTENT] = _content(config)


def check_calibration_data(
    metadata: Mapping[str, Any], config: RunConfig, made: str, remedy: str, *, named_only: bool = False
) -> None:
    """Raise where scores or a selection were made by other data than the config names.

    Args:
        metadata: of the scores or the selection.
        config: of the run.
        made: what was made, and of which file, such as ``the scores in a.safetensors were computed``.
        remedy: what to do about it.
        named_only: compare ``data.calibration`` alone, where the training data may be another by now, or in another
            form.

    Raises:
        InputError: names the field and both values, or the data whose files have changed.
    """
    recorded = metadata.get(_KEY)
    if not isinstance(recorded, Mapping) or not config.calibrates:
        return
    for name, value in {**_named(config), **({} if named_only else _form(config))}.items():
        if name in recorded and recorded[name] != value:
            field = name if name.startswith("model.") else f"data.{name}"
            raise InputError(f"{field} is {value!r}, and {made} with {recorded[name]!r}: {remedy}")
    # The files need not be there: nothing else reads them.
    found = None if named_only or recorded.get(_CONTENT) is None else _content(config)
    if found is not None and found != recorded[_CONTENT]:
        split, source, _ = _source(config)
        raise InputError(f"data.{split} {source!r} has changed since {made}: {remedy}")


def _source(config: RunConfig) -> tuple[str, str, str]:
    """Which setting names the data, what it names, and the split."""
    data = config.data
    if data.calibration is not None:
        return "calibration", data.calibration, data.calibration_split
    return "train", data.train, data.train_split


def _named(config: RunConfig) -> dict[str, Any]:
    data = config.data
    split = None if data.calibration is None else data.calibration_split
    return {"calibration": data.calibration, "calibration_split": split}


def _form(config: RunConfig) -> dict[str, Any]:
    """All else that decides the samples."""
    data = config.data
    form: dict[str, Any] = {
        "format": data.format,
        "template": data.template,
        "max_length": data.max_length,
        "labels": data.labels,
        "model.tokenizer": config.model.tokenizer,
    }
    form |= {f"fields.{name}": value for name, value in dataclasses.asdict(data.fields).items() if name != "answer"}
    if data.calibration is None:
        form |= {"train": data.train, "train_split": data.train_split, "limit": data.limit}
    found: dict[str, Any] = json.loads(json.dumps(form))  # As it is read from a file.
    return found


def _content(config: RunConfig) -> str | None:
    """Hash of the files of the data; None where they are not here, or the data is on the hub."""
    split, source, name = _source(config)
    files: list[Path] = []
    with suppress(InputError):  # A folder without the split.
        files = local_files(source, field=f"data.{split}", split=name, data_format=config.data.format)
    digests = "\n".join(file_sha256(path) for path in files)
    return hashlib.sha256(digests.encode()).hexdigest() if files else None
