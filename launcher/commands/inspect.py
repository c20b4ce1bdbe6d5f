"""`sparse-zero inspect`: what is in a selection file or an adapter?"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.common import Parser, add_command
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from sparse_zero import Selection

# Columns of the table where no terminal says how wide it is: no weight's name is folded.
_FILE_WIDTH = 160


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    parser = add_command(
        subparsers,
        "inspect",
        "list the regions of a selection file or an adapter folder",
        """
sparse-zero inspect runs/quickstart/selection.safetensors
sparse-zero inspect runs/quickstart/adapter
""",
        config=False,
    )
    parser.add_argument("path", metavar="PATH", help="a selection file, an adapter folder or a run folder")
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    from rich.console import Console

    from sparse_zero import Selection

    file = selection_file(Path(args.path))
    selection = Selection.load(file)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    console.print(selection_table(selection))
    console.print(f"{selection.num_parameters:,} parameters in {len(selection.weights)} weights", highlight=False)
    console.print(f"digest {selection.digest()}", highlight=False, soft_wrap=True)
    return 0


def selection_table(selection: "Selection") -> "Table":
    """A row for every weight and kind: regions, parameters, and their share of the weight's own."""
    from rich.table import Table

    from sparse_zero.selection.config import KINDS

    table = Table(title="selection", caption="share: of the weight's own entries")
    table.add_column("weight", overflow="fold")
    table.add_column("shape")
    table.add_column("kind")
    for heading in ("regions", "parameters", "share"):
        table.add_column(heading, justify="right")
    for name, weight in sorted(selection.weights.items(), key=lambda item: _layer_order(item[0])):
        by_kind = weight.num_parameters_by_kind()
        for kind in KINDS:
            if not weight.num_regions(kind):
                continue
            label = (
                "block " + "x".join(str(side) for side in dict.fromkeys(weight.block_shape))
                if kind == "block"
                else kind
            )
            number = by_kind.get(kind, 0)
            share = number / (weight.shape[0] * weight.shape[1])
            regions = f"{weight.num_regions(kind):,}"
            shape = f"{weight.shape[0]} x {weight.shape[1]}"
            table.add_row(name, shape, label, regions, f"{number:,}", f"{share:.2%}")
    return table


def _layer_order(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def selection_file(path: Path) -> Path:
    """The selection in ``path``: itself, or the one in that adapter or run folder."""
    if not path.exists():
        raise InputError(f"PATH is {path}, which does not exist: name a selection file or an adapter folder")
    if path.is_file():
        return path
    for candidate in (path / "selection.safetensors", path / "adapter" / "selection.safetensors"):
        if candidate.is_file():
            return candidate
    raise InputError(f"PATH is {path}, a folder without selection.safetensors: name an adapter or run folder")
