"""How is a command told on a page, so that it can be repeated elsewhere and says nothing of this machine's folders?"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def override(name: str, value: Any) -> str:
    """``--name=value`` for a shell; of a path that leads elsewhere on every machine, its last part."""
    text = value if isinstance(value, str) else json.dumps(value)
    return shlex.quote(f"{name}={_last_part(text)}")


def of_this_machine(word: str) -> str:
    """A flag, a value or ``--flag=value``, as :func:`override` tells it."""
    name, joined, value = word.partition("=")
    return shlex.quote(f"{name}={_last_part(value)}" if joined else _last_part(word))


def _last_part(text: str) -> str:
    if os.path.isabs(os.path.expanduser(text)) or Path(text).parts[:1] == ("..",):
        return f".../{Path(text).name}"
    return text


def command_of(script: str, config: Path, overrides: Sequence[str]) -> str:
    """What makes a study anew.

    Args:
        script: its path in the repository.
        config: as it was given.
        overrides: ``--section.key=value``.
    """
    pairs = [each.partition("=") for each in overrides]
    words = [override(name, value) for name, _, value in pairs]
    place = config.name if config.is_absolute() or config.parts[:1] == ("..",) else config
    return " ".join([f"python {script} --config {place}", *words])
