"""How does a command say a line to its user?"""

import sys
from contextlib import suppress


def say(text: str) -> None:
    """Print a line on the error stream, with the command's name; nothing where the terminal is gone."""
    with suppress(OSError):
        print(f"sparse-zero: {text}", file=sys.stderr, flush=True)
