"""The whole way from a model and data to a selection: candidates, scores, budget, choice?"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_zero.collectives import check_equal_on_all_ranks, failing_together, of_rank_zero
from sparse_zero.errors import InputError
from sparse_zero.flops import flop_shape
from sparse_zero.layers.quantized_linear import acting_parameter
from sparse_zero.module_map import ModuleMap, default_module_map, parameter_shape
from sparse_zero.selection.budget import SUMMATION_NOISE, Choice, choose
from sparse_zero.selection.calibration import Key, LossFunction, calibrate, default_loss
from sparse_zero.selection.candidates import Candidates, depth_of, find_candidates, find_whole, match_matrices
from sparse_zero.selection.config import SelectionConfig
from sparse_zero.selection.depth import choose_depth, depth_of_weights
from sparse_zero.selection.full_calibration import calibrate_full, check_can_train
from sparse_zero.selection.region_scores import RegionScores
from sparse_zero.selection.regions import WeightSelection
from sparse_zero.selection.scores import (
    DATA_NEEDS,
    ScoreRule,
    check_rule,
    checked_scores,
    generator_for,
    resolve_score,
)
from sparse_zero.selection.selection import Selection
from sparse_zero.selection.shares import check_budget
from sparse_zero.zero.compat import whole

# Training state of one entry beside its value and gradient: an fp32 master and AdamW's two fp32 moments.
_OPTIMIZER_BYTES = 12


class SelectionWarning(UserWarning):
    """The selection is valid, but not quite what was asked for; the message says in which respect."""


def num_parameters(model: nn.Module, module_map: ModuleMap | None = None) -> int:
    """All parameters of the model, tied ones counted once: what a budget's fraction is a fraction of.

    A quantized matrix counts with its entries, however many of them share a byte.
    """
    matrices = (module_map or default_module_map(model)).by_parameter()
    total = 0
    for name, parameter in model.named_parameters():
        matrix = matrices.get(name)
        if matrix is not None and matrix.is_quantized:
            total += math.prod(matrix.shape) * (matrix.num_slices or 1)
        else:
            total += math.prod(parameter_shape(parameter))
    return total


def bytes_per_parameter(model: nn.Module, candidates: Iterable[Candidates], vectors: Iterable[str]) -> int:
    """Bytes of training state of one entry: value and gradient in the weight's dtype, fp32 master and two moments.

    Where dtypes are mixed, the widest one of what may be trained counts.
    """
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in dict.fromkeys([*(c.matrix.parameter for c in candidates), *vectors])]
    # A quantized weight's own dtype says nothing about its values'.
    floating = [p for p in chosen if p.is_floating_point()] or [p for p in parameters.values() if p.is_floating_point()]
    return 2 * max(p.element_size() for p in floating) + _OPTIMIZER_BYTES


def check_selection(model: nn.Module, config: SelectionConfig, module_map: ModuleMap | None = None) -> list[Candidates]:
    """Everything about ``config`` that can be checked against ``model`` before any data are read.

    Works on a model on the meta device. Returns the candidates that :func:`score_regions` will score.

    Raises:
        InputError: patterns, sizes, scores or budget do not fit the model.
    """
    module_map = module_map or default_module_map(model)
    candidates, vectors = _find_regions(model, config, module_map)
    rules = _rules(candidates)
    for each in candidates:
        check_rule(rules[each.score], each)
    if config.calibration_weights == "full" and not any(rule.needs_data for rule in rules.values()):
        raise InputError(
            "selection.calibration_weights is 'full', but no score reads what that training computes "
            f"({', '.join(rules) or 'there is none'}): set it to 'frozen', or use a score of the gradient"
        )
    if config.calibration_weights == "full":
        check_can_train(model)
    check_budget(
        candidates,
        config.budget,
        module_map=module_map,
        num_parameters_model=num_parameters(model, module_map),
        bytes_per_parameter=bytes_per_parameter(model, candidates, vectors),
    )
    return candidates


def _rules(candidates: Iterable[Candidates]) -> dict[str, ScoreRule]:
    return {name: resolve_score(name) for name in dict.fromkeys(c.score for c in candidates)}


def _find_regions(
    model: nn.Module, config: SelectionConfig, module_map: ModuleMap
) -> tuple[list[Candidates], dict[str, WeightSelection]]:
    """What competes or is fixed by number, and what is trained entirely: vectors, and matrices of a head."""
    if config.file is not None:
        raise InputError(f"selection.file is {config.file}: nothing is left to select; use Selection.load")
    candidates = find_candidates(config, module_map)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    lengths = {name: parameter_shape(parameters[name])[0] for name in module_map.vectors}
    entire = find_whole(config, module_map, lengths)
    for each in candidates:
        if each.weight in entire:
            raise InputError(
                f"selection.regions trains {each.weight} entirely (kind whole) and names its {each.kind}s too: take "
                f"{each.matrix.name!r} out of one of the families"
            )
    return candidates, entire


def entire_names(model: nn.Module, config: SelectionConfig, module_map: ModuleMap | None = None) -> list[str]:
    """Names of what the families of kind whole train: vectors, and matrices of a head.

    Raises:
        InputError: a pattern that matches nothing.
    """
    return list(_find_regions(model, config, module_map or default_module_map(model))[1])


@torch.no_grad()
def _scores_without_data(
    model: nn.Module, candidates: Sequence[Candidates], rules: Mapping[str, ScoreRule], seed: int
) -> dict[Key, Tensor]:
    """Scores by rules that read weights or nothing. Collective: every rank gets rank 0's bits."""
    found: dict[Key, Tensor] = {}
    failure: Exception | None = None
    for each in candidates:
        rule = rules[each.score]
        with ExitStack() as stack:
            needs: dict[str, Any] = {}
            if "weight" in rule.needs:
                parameter = model.get_parameter(each.matrix.parameter)
                stack.enter_context(whole(parameter))
                needs["weight"] = each.matrix.view(acting_parameter(model, each.matrix.parameter), each.slice_index)
            if failure is not None:
                continue
            try:
                if "generator" in rule.needs:
                    needs["generator"] = generator_for(each, seed)
                found[each.weight, each.kind] = checked_scores(rule.function(each, **needs), each)
            except Exception as error:  # Whatever a rule raises; the other ranks wait in the next collective.
                failure = error
    with failing_together():
        if failure is not None:
            raise failure
    if not found:
        return found
    # A sum over a weight depends on the number of threads, in its last bits.
    flat = of_rank_zero(torch.cat([scores.reshape(-1) for scores in found.values()]))
    pieces = flat.split([scores.numel() for scores in found.values()])
    return {key: piece.reshape(found[key].shape) for key, piece in zip(found, pieces, strict=True)}


def score_regions(
    model: nn.Module,
    batches: Iterable[Any] | None,
    config: SelectionConfig,
    loss_fn: LossFunction | None = None,
    *,
    module_map: ModuleMap | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> RegionScores:
    """Score every candidate region: the part of :func:`select` that costs time. Collective.

    The arguments are those of :func:`select`. The budget is checked, and not used.

    Raises:
        InputError: patterns, sizes, scores or budget do not fit the model, calibration has no data, meets numbers
            that are not finite, or does not reach a module.
    """
    with failing_together():
        module_map = module_map or default_module_map(model)
        candidates = check_selection(model, config, module_map)
        rules = _rules(candidates)
        by_data = [c for c in candidates if rules[c.score].needs_data]
        if by_data and batches is None:
            raise InputError(f"selection.score {by_data[0].score} reads data: pass calibration batches")
    scores: dict[Key, Tensor] = {}
    num_batches = 0
    if by_data:
        assert batches is not None
        run = calibrate_full if config.calibration_weights == "full" else calibrate
        scores, num_batches = run(
            model,
            batches,
            by_data,
            rules,
            loss_fn or default_loss,
            config=config,
            module_map=module_map,
            on_batch=on_batch,
        )
    # After calibration, which may train weights that stay.
    without_data = [c for c in candidates if not rules[c.score].needs_data]
    scores.update(_scores_without_data(model, without_data, rules, config.seed))
    metadata = {
        "config": dataclasses.asdict(config),
        "num_calibration_batches": num_batches,
        "rules": {
            name: {"needs": sorted(rule.needs), "size_neutral": rule.size_neutral} for name, rule in rules.items()
        },
    }
    return RegionScores(candidates, scores, metadata)


def _calibration_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What scores that read data depend on; budget, pick and per_matrix are not among it."""
    names = ["accumulate", "accumulator_dtype", "calibration_batches", "calibration_batch_size", "calibration_weights"]
    # A config from a file may lack what is younger, and have anything else in its place.
    found = {name: config.get(name) for name in [*names, "seed"]}
    if config.get("calibration_weights") == "full":
        settings = config.get("full_calibration")
        for name in ("learning_rate", "batches_per_step"):
            found[f"full_calibration.{name}"] = settings.get(name) if isinstance(settings, Mapping) else None
    return found


def _scores_for(scores: RegionScores, candidates: Sequence[Candidates], config: SelectionConfig) -> RegionScores:
    """The part of ``scores`` that ``config`` chooses among.

    Raises:
        InputError: it asks for regions that were not scored, or for a calibration that was another one.
    """
    scored = {(c.weight, c.kind): c for c in scores.candidates}
    for each in candidates:
        was = scored.get((each.weight, each.kind))
        if was is None:
            raise InputError(
                f"selection.regions has {each.kind}s of {each.weight}, which were not scored: score them too, or take "
                "them out"
            )
        for what in ("shape", "block_shape", "score"):
            if getattr(was, what) != getattr(each, what):
                raise InputError(
                    f"selection.regions has {each.kind}s of {each.weight} with {what} {getattr(each, what)}, and "
                    f"scored was {getattr(was, what)}: score them again, or choose among the scored ones"
                )
    needs: frozenset[str] = frozenset().union(*(scores.needs(c.score) for c in candidates))
    if "config" in scores.metadata and needs & (DATA_NEEDS | {"generator"}):
        recorded, asked = _calibration_of(scores.metadata["config"]), _calibration_of(dataclasses.asdict(config))
        for name in asked if needs & DATA_NEEDS else ("seed",):
            used = recorded.get(name)
            if asked[name] == used:
                continue
            if name == "calibration_batches":
                # What was read counts: callers of score_regions may pass more or fewer than the config says.
                used = scores.metadata.get("num_calibration_batches", used)
            if asked[name] != used:
                raise InputError(
                    f"selection.{name} is {asked[name]!r}, and the scores were computed with {used!r}: "
                    "score again, or set it to that"
                )
    return RegionScores(
        candidates, {(c.weight, c.kind): scores.scores[c.weight, c.kind] for c in candidates}, scores.metadata
    )


def _warn_of_noise(candidates: Sequence[Candidates], scores: RegionScores, choice: Choice) -> None:
    """Warn where rounding may have decided: only scores that read data are summed in an order that may change."""
    for margin, is_fixed in ((choice.cut_margin, False), (choice.per_matrix_cut_margin, True)):
        members = [c for c in candidates if (c.per_matrix is not None) == is_fixed]
        if margin is not None and margin < SUMMATION_NOISE and any(scores.needs(c.score) & DATA_NEEDS for c in members):
            where = " of a family with per_matrix" if is_fixed else ""
            warnings.warn(
                f"scores at the cut{where} differ by {margin:.1e} relative, within summation noise: "
                "another world size might choose another region there",
                SelectionWarning,
                stacklevel=4,
            )


def _warn_of_depth(left_out: Sequence[str], lowest: int) -> None:
    """Warn of what the config asks for whatever its score, and the depth leaves out."""
    if left_out:
        warnings.warn(
            f"selection.depth_tradeoff makes layer {lowest} the lowest: {len(set(left_out))} vectors, or matrices with "
            f"per_matrix, below it are left out ({left_out[0]}, ...)",
            SelectionWarning,
            stacklevel=3,
        )


def _warn_of_rest(
    candidates: Sequence[Candidates],
    scores: RegionScores,
    choice: Choice,
    config: SelectionConfig,
    module_map: ModuleMap,
) -> None:
    """Warn where the budget, or a part of it, is more than all regions it may be spent on."""
    budget, competing = config.budget, [c for c in candidates if c.per_matrix is None]
    if budget is None or not competing:
        return

    def is_exhausted(c: Candidates) -> bool:
        chosen = choice.weights.get(c.weight)
        number = 0 if chosen is None else chosen.num_regions(c.kind)
        return number == int((scores.scores[c.weight, c.kind] > -math.inf).sum())

    open_weights = {c.weight for c in competing if not is_exhausted(c)}
    covered: list[str] = []
    if not open_weights:
        covered = ["the budget covers every candidate region"]
    elif budget.over == "matrix":
        full = sorted({c.weight for c in competing} - open_weights)
        if full:
            covered = [f"the equal parts of the budget cover every region of {len(full)} matrices ({full[0]}, ...)"]
    for group in budget.groups if open_weights else ():
        matched = {m.parameter for m in match_matrices(group.modules, module_map, "selection.budget.groups.modules")}
        if not open_weights & {c.weight for c in competing if c.matrix.parameter in matched}:
            covered.append(f"the share of the group {', '.join(group.modules)} covers every region of it")
    left = [
        f"{number:,} {unit}"
        for number, unit in (
            (choice.bytes_left, "bytes"),
            (choice.num_parameters_left, "parameters"),
            (choice.num_regions_left, "regions"),
        )
        if number is not None
    ]
    for what in covered:
        warnings.warn(f"{what}: {left[0]} of the budget are left unused", SelectionWarning, stacklevel=4)


def choose_regions(
    model: nn.Module, scores: RegionScores, config: SelectionConfig, *, module_map: ModuleMap | None = None
) -> Selection:
    """Rank scored regions and take what the budget allows. Collective: every rank calls it with equal arguments.

    Args:
        model: read for names, shapes and dtypes only, so that the meta device will do.
        scores: of all regions that ``config`` names, or of more. Budget, per_matrix and pick may be others than
            when they were computed.
        config: candidates and budget.
        module_map: the model's family; default: read from module names.

    Raises:
        InputError: budget or regions do not fit the model or the scores, or the ranks disagree.
    """
    module_map = module_map or default_module_map(model)
    candidates, vectors = _find_regions(model, config, module_map)
    scores = _scores_for(scores, candidates, config)
    total = num_parameters(model, module_map)
    bytes_of_one = bytes_per_parameter(model, candidates, vectors)
    depths = [depth_of(c.matrix.names(), module_map) for c in candidates]
    depth_of_vector = {name: depth_of([name], module_map) for name in vectors}

    def choose_from(lowest: int) -> Choice:
        """Among what lies in this layer or above."""
        members = [c for c, depth in zip(candidates, depths, strict=True) if depth >= lowest]
        return choose(
            members,
            scores.scores,
            config.budget,
            module_map=module_map,
            whole={name: whole for name, whole in vectors.items() if depth_of_vector[name] >= lowest},
            num_parameters_model=total,
            bytes_per_parameter=bytes_of_one,
            size_neutral=all(scores.is_size_neutral(c.score) for c in candidates if c.per_matrix is None),
        )

    lowest, shape = -1, flop_shape(model, module_map)
    if config.depth_tradeoff:
        lowest, choice = choose_depth(
            depths,
            choose_from,
            lambda choice: scores.share_captured(Selection(choice.weights))["total"] or 0.0,
            lambda choice: depth_of_weights(choice.weights, shape, module_map).step_operations,
            config.depth_tradeoff,
        )
    else:
        choice = choose_from(lowest)
    rivals = [c for c, depth in zip(candidates, depths, strict=True) if depth >= lowest]
    fixed = [(c.weight, depth) for c, depth in zip(candidates, depths, strict=True) if c.per_matrix is not None]
    _warn_of_depth([name for name, depth in [*depth_of_vector.items(), *fixed] if depth < lowest], lowest)
    _warn_of_noise(rivals, scores, choice)
    _warn_of_rest(rivals, scores, choice, config, module_map)
    selection = Selection(
        choice.weights,
        {
            "config": dataclasses.asdict(config),
            "num_parameters_model": total,
            "num_layers": module_map.num_layers,
            "num_calibration_batches": scores.metadata.get("num_calibration_batches"),
            "depth": dataclasses.asdict(depth_of_weights(choice.weights, shape, module_map)),
            **choice.metadata(),
        },
    )
    captured = scores.share_captured(selection)
    selection.metadata["share_captured"] = {"total": captured["total"], "by_kind": captured["by_kind"]}
    if dist.is_initialized():
        check_equal_on_all_ranks(selection.digest(), "the selection")
    return selection


def select(
    model: nn.Module,
    batches: Iterable[Any] | None,
    config: SelectionConfig,
    loss_fn: LossFunction | None = None,
    *,
    module_map: ModuleMap | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Selection:
    """Calibrate, rank and choose: :func:`score_regions`, then :func:`choose_regions`. Collective.

    Every rank calls it with equal arguments.

    Args:
        model: dense model with weights; unchanged afterwards, unless ``full_calibration.keep_weights_in`` says else.
        batches: micro-batches of fixed composition, the same sequence on every rank (a rank computes its
            share of them); None if no score reads data. All of them are read, whatever ``calibration_batches`` is;
            ``num_calibration_batches`` in the selection's metadata is their number.
            A batch is what ``loss_fn`` takes; by default a mapping whose items become keyword arguments of the model:
            ``input_ids`` and ``labels`` (int64, [batch, length]; -100 where the loss skips a position), and an
            ``attention_mask`` where there is padding. Its tensors lie on the model's device.
        config: candidates, scores and budget.
        loss_fn: ``loss_fn(model, batch)`` gives a scalar; default: ``model(**batch).loss``.
        module_map: the model's family; default: read from module names.
        on_batch: called after each micro-batch that this rank computed, for progress displays.

    Raises:
        InputError: patterns, sizes, scores or budget do not fit the model, calibration has no data, meets numbers
            that are not finite, or does not reach a module, or the ranks disagree.
    """
    module_map = module_map or default_module_map(model)
    scores = score_regions(model, batches, config, loss_fn, module_map=module_map, on_batch=on_batch)
    return choose_regions(model, scores, config, module_map=module_map)
