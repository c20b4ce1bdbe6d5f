"""Could this config start on any machine: does what its sections say go together?

What depends on this machine, its files or the run folder is for :func:`launcher.preparing.check_run`. What is said here
costs no rank and no time in a queue.
"""

from launcher.config import RunConfig
from launcher.deepspeed_config import check_own_config
from launcher.training_config import DTYPE_OF_PRECISION
from sparse_zero.errors import InputError
from sparse_zero.selection.config import Kind, SelectionConfig
from sparse_zero.zero.optimizers import check_kinds


def check_config(config: RunConfig) -> None:
    """Everything that can be said of a run from its config alone.

    Raises:
        InputError: the first thing found wrong.
    """
    check_own_config(config)
    _check_precision(config)
    _check_quantized(config)
    kinds = trained_kinds(config)
    if kinds is not None:
        check_kinds(config.training.optimizer_config(), kinds)
        if config.selection.reselect is not None:
            from sparse_zero.reselection.migrate import check_kinds_can_change  # heavy: torch

            check_kinds_can_change(config.training.optimizer, kinds)
    # Of the user's own functions other machines may know more than this one.
    names = [name for name in score_names(config.selection) if ":" not in name]
    if names:
        from sparse_zero.selection.scores import resolve_score  # heavy: torch

        for name in names:
            resolve_score(name)


def score_names(selection: SelectionConfig) -> list[str]:
    """The scores that rank regions of a selection, each once."""
    return list(dict.fromkeys(selection.score_of(region) for region in selection.regions if region.kind != "whole"))


def trained_kinds(config: RunConfig) -> list[Kind] | None:
    """Kinds of region that the run may train, at any of its selections; None where a file says."""
    if config.selection.file is not None:
        return None
    kinds = [region.kind for region in config.selection.regions]
    # A head that is trained entirely is trained as its rows.
    return [*kinds, "row"] if config.model.classifies and "whole" in kinds else kinds


def _check_precision(config: RunConfig) -> None:
    """Refuse weights of another precision than the run's, and rounding where nothing is rounded."""
    wanted = DTYPE_OF_PRECISION[config.training.precision]
    if config.model.dtype != wanted:
        raise InputError(
            f"training.precision is {config.training.precision} but model.dtype is {config.model.dtype}: "
            f"set model.dtype to {wanted}, or training.precision to match"
        )
    rounds = config.zero.placement == "inplace" and config.training.precision != "fp32"
    if config.zero.rounding == "stochastic" and not rounds:
        raise InputError(
            f"zero.rounding is 'stochastic' with zero.placement {config.zero.placement} and training.precision "
            f"{config.training.precision}, where nothing is rounded at write-back: use zero.rounding nearest"
        )


def _check_quantized(config: RunConfig) -> None:
    """Refuse what does not go with a quantized base."""
    what = f"model.quantization is {config.model.quantization!r}"
    if config.model.quantization == "none":
        return
    if config.zero.placement == "inplace":
        raise InputError(
            f"{what} with zero.placement 'inplace', which writes values into the weights: set zero.placement to delta"
        )
    if config.selection.file is None and config.selection.calibration_weights == "full":
        raise InputError(
            f"{what} with selection.calibration_weights 'full', which trains all weights: set it to 'frozen', or "
            "select without quantization and name the selection as selection.file"
        )
