"""`sparse-zero inspect`: what is in a selection file or an adapter, and what does it share with another one?"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.common import Parser, add_command, check_keeps_inputs
from launcher.run_folder import SCORES_NAME, SELECTION_NAME, check_can_write_in, check_out_file, scores_beside
from sparse_zero.errors import InputError

if TYPE_CHECKING:
    from sparse_zero import Selection
    from sparse_zero.selection.region_scores import RegionScores


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    parser = add_command(
        subparsers,
        "inspect",
        "show the regions of a selection and their scores, or what two selections have in common",
        """
sparse-zero inspect runs/quickstart                                  tables, maps and histograms, in the terminal
sparse-zero inspect runs/quickstart --by layer                       or: --by weight
sparse-zero inspect runs/quickstart/adapter                          what an adapter trained
sparse-zero inspect smt.safetensors --html smt.html --png pictures   one page with all pictures, and the pictures
sparse-zero inspect random.safetensors --scores smt.scores.safetensors
sparse-zero inspect smt.safetensors random.safetensors               where they agree: entries and regions in both
""",
        config=False,
    )
    parser.add_argument("path", metavar="PATH", help="a selection file, an adapter folder or a run folder")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="another one of the same model, to compare with")
    parser.add_argument(
        "--scores",
        metavar="FILE",
        help="scores of the regions, as `sparse-zero select` writes them; default: the file beside the selection "
        "(NAME.scores.safetensors, or scores.safetensors in a run folder)",
    )
    parser.add_argument(
        "--by", choices=("module", "layer", "weight"), default="module", help="a row for each; default: module"
    )
    parser.add_argument("--html", metavar="FILE", help="write one page with all tables and pictures")
    parser.add_argument("--png", metavar="FOLDER", help="write all pictures: maps of scores, histograms, budget curve")
    return parser


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    file = selection_file(Path(args.path), "PATH")
    other_file = None if args.other is None else selection_file(Path(args.other), "OTHER")
    if args.html is not None:
        check_out_file(Path(args.html), "--html")
        check_keeps_inputs(Path(args.html), "--html", {"PATH": file, "OTHER": other_file, "--scores": args.scores})
    if args.png is not None:
        if Path(args.png).is_file():
            raise InputError(f"--png is {args.png}, which is a file: name a folder")
        check_can_write_in(Path(args.png), f"--png is {args.png}")

    # heavy: torch
    from launcher.selection_overlap import compare
    from launcher.selection_terminal import new_console, print_facts, print_overlap, print_selection
    from sparse_zero import Selection

    selection = Selection.load(file)
    second = None if other_file is None else Selection.load(other_file)
    console = new_console()
    scores, remark = read_scores(selection, file, args.scores)
    compared = None if second is None else compare(selection, second)
    if args.html or args.png:
        from sparse_zero.optional import require

        require("matplotlib", extra="plots", purpose="draw the pictures (--html, --png)")
    if second is None or compared is None:
        print_selection(console, args.path, selection, scores, args.by)
    else:
        second_scores, _ = read_scores(second, other_file or file, args.scores)
        print_facts(console, f"PATH   {args.path}", selection, scores)
        console.print()
        print_facts(console, f"OTHER  {args.other}", second, second_scores)
        console.print()
        print_overlap(console, compared, args.by, selection.metadata.get("num_layers"))
    if remark:
        console.print(remark, soft_wrap=True)
    if args.png or args.html:
        from launcher import selection_page  # heavy: matplotlib

        other = None if second is None or compared is None else (args.other, second, compared)
        pictures = Path(args.png) if args.png else None
        if args.html:
            page = Path(args.html)
            selection_page.write_selection_page(page, args.path, selection, scores, other, pictures)
            console.print(f"page written to {page}", soft_wrap=True)
        elif pictures is not None:
            selection_page.write_pngs(selection_page.all_drawings(selection, scores, other), pictures)
        if pictures is not None:
            console.print(f"pictures written to {pictures}", soft_wrap=True)
    return 0


def selection_file(path: Path, argument: str) -> Path:
    """The selection in ``path``: itself, or the one in that adapter or run folder."""
    if not path.exists():
        raise InputError(f"{argument} is {path}, which does not exist: name a selection file or an adapter folder")
    if path.is_file():
        return path
    for candidate in (path / SELECTION_NAME, path / "adapter" / SELECTION_NAME):
        if candidate.is_file():
            return candidate
    raise InputError(f"{argument} is {path}, a folder without {SELECTION_NAME}: name an adapter or run folder")


def read_scores(selection: "Selection", file: Path, given: str | None) -> "tuple[RegionScores | None, str]":
    """The scores that are named, or lie beside the selection; and what to say where those beside it do not fit.

    Raises:
        InputError: the named file has no scores, or not of the model and the regions of the selection.
    """
    from launcher.selection_stats import check_scores_fit
    from sparse_zero.selection.region_scores import RegionScores

    if given is not None:
        scores = RegionScores.load(given)
        check_scores_fit(selection, scores, f"--scores {given}")
        return scores, ""
    beside = [scores_beside(file)]
    if file.name == SELECTION_NAME:
        beside.append(file.with_name(SCORES_NAME))
        if file.parent.name == "adapter":
            beside.append(file.parent.parent / SCORES_NAME)
    for path in beside:
        if path.is_file():
            scores = RegionScores.load(path)
            try:
                check_scores_fit(selection, scores, str(path))
            except InputError as error:
                return None, f"shown without scores: {error}"
            return scores, ""
    return None, ""
