"""What does it take to get the arithmetic word problems of the quickstart as files?

Usage: python scripts/make_word_problems.py --folder data/word_problems
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, and return the exit code: 0, or 2 with one line on stderr for unusable arguments."""
    from models.word_problems import write_word_problems
    from sparse_zero.errors import InputError

    parser = argparse.ArgumentParser(description="Write train.json, validation.json and test.json of word problems.")
    parser.add_argument("--folder", required=True, help="folder to write to; created if needed")
    parser.add_argument("--train", type=int, default=4000, help="training problems (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=100, help="validation problems (default: %(default)s)")
    parser.add_argument("--test", type=int, default=200, help="test problems (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal files (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        folder = write_word_problems(given.folder, given.train, given.validation, given.test, given.seed)
    except InputError as error:
        print(f"make_word_problems: {error}", file=sys.stderr)
        return 2
    print(f"{given.train} training, {given.validation} validation and {given.test} test problems in {folder}")
    return 0


if __name__ == "__main__":
    # Started as a script, the folder of this file is on the path, not the repository.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
