"""What is chosen from scores of an earlier calibration, under another budget, without weights and data?"""

import os
from pathlib import Path

from launcher.calibration_data import check_calibration_data, record_calibration_data
from launcher.config import RunConfig
from launcher.kept_base import model_of
from launcher.process_ranks import find_ranks
from launcher.selection_terminal import save_choice
from models.base_identity import base_identity
from models.families import module_map
from models.heads import head_text
from models.loading import model_folder
from models.skeleton import load_skeleton
from sparse_zero.checkpoint.identity import BaseIdentity
from sparse_zero.errors import InputError
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.select import choose_regions


def choose_from_scores(config: RunConfig, scores_file: Path, out: Path, scores_out: Path | None) -> int:
    """Choose by the scores in a file as the config says, write the selection, and print what was chosen; returns 0.

    The model's weights are hashed, to tell that the scores are its own, and not loaded.

    Args:
        config: the run; its model, budget and regions are read. The regions must be among those that were scored.
        scores_file: as written by ``sparse-zero select``.
        out: the file of the selection.
        scores_out: a further file for the scores; None: they stay in ``scores_file`` alone.

    Raises:
        InputError: the scores are not of this model or of these regions, or the budget does not fit.
    """
    if find_ranks(os.environ).world_size > 1:
        raise InputError(f"--from-scores is {scores_file} on several ranks: it needs one process, without a launcher")
    if config.selection.file is not None:
        raise InputError(f"--from-scores is {scores_file} and selection.file {config.selection.file}: keep one of them")
    scores = RegionScores.load(scores_file)
    stored = scores.metadata.get("base")
    source = model_of(config, BaseIdentity(**stored) if stored else None)
    if stored:
        folder = model_folder(source)
        head = head_text(source, folder, config.training.seed)
        found = base_identity(folder, source.gguf_file, head=head)
        if found.sha256 != stored["sha256"]:
            raise InputError(
                f"--from-scores {scores_file} has scores of the base {stored['name']} ({stored['sha256'][:12]}), and "
                f"model.name_or_path is {found.name} ({found.sha256[:12]}): name that base, or score this one"
            )
    made = f"the scores in {scores_file} were computed"
    check_calibration_data(scores.metadata, config, made, "score again, or set it to that")
    model = load_skeleton(source)
    selection = choose_regions(model, scores, config.selection, module_map=module_map(model))
    selection.metadata["base"] = stored
    record_calibration_data(selection.metadata, config)
    save_choice(selection, scores, out, scores_out)
    return 0
