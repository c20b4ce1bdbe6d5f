#!/usr/bin/env python3
"""Where is the quickstart's model? Makes its folder if needed and prints it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.smollm2 import default_cache, smollm2_folder
from sparse_zero.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=None, help="folder to keep it in (default: the user's cache)")
    arguments = parser.parse_args()
    try:
        print(smollm2_folder((arguments.cache or default_cache()).expanduser()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
