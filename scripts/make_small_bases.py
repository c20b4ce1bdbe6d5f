"""What does it take to get a tiny random model of a family, to try a config on?

Usage: python scripts/make_small_bases.py --family bloom --out bases/bloom
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_EXAMPLES = """
examples:
  python scripts/make_small_bases.py --family gpt_neox --out bases/gpt_neox
  python scripts/make_small_bases.py --family roberta --out bases/roberta --hidden 256 --layers 4
  sparse-zero train --config run.yaml --model.name_or_path=bases/gpt_neox

The weights are random: such a base shows that a config holds, how many parameters it trains and that the loss falls.
It knows nothing. Encoders (bert, roberta) have the head that predicts masked tokens, as published ones do; decoders
predict the next token. scripts/pretrain_llama.py makes a small Llama that has learned something.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder, and return the exit code: 0, or 2 with one line on stderr for unusable arguments."""
    from dataclasses import fields

    from models.small_bases import FAMILIES, Sizes, write_small_base
    from sparse_zero.errors import InputError

    parser = argparse.ArgumentParser(
        description="Write a small model with random weights and a tokenizer of its own, in seconds.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", required=True, choices=FAMILIES, help="model type")
    parser.add_argument("--out", required=True, type=Path, help="folder of the model, new or empty")
    sizes = Sizes()
    for each in fields(Sizes):
        parser.add_argument(f"--{each.name}", type=int, default=getattr(sizes, each.name), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal weights (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        chosen = Sizes(**{each.name: getattr(given, each.name) for each in fields(Sizes)})
        number = write_small_base(given.family, given.out, chosen, given.seed)
    except InputError as error:
        print(f"make_small_bases: {error}", file=sys.stderr)
        return 2
    print(f"a random {given.family} of {number:,} parameters in {given.out}")
    return 0


if __name__ == "__main__":
    # Started as a script, the folder of this file is on the path, not the repository.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
