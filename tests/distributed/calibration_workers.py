"""What the spawned ranks do in the tests of calibration."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparse_zero as sz
from sparse_zero.collectives import PeerError, check_equal_on_all_ranks
from sparse_zero.errors import InputError
from sparse_zero.module_map import default_module_map
from sparse_zero.selection.accumulators import Accumulators, _available_memory, _ranks_on_this_host
from sparse_zero.selection.calibration import Key, calibrate
from sparse_zero.selection.candidates import Candidates, find_candidates
from tests.sparse_zero.helpers import TinyModel, tiny_loss
from tests.sparse_zero.test_calibration import RULES, all_families, make_batches, make_mixed, make_model, state_of

# Rules and settings whose results must not depend on the world size.
VARIANTS: dict[str, dict[str, Any]] = {
    "abs_of_mean": {"score": "abs_of_mean"},
    "mean_of_abs": {"score": "mean_of_abs"},
    "squares on disk": {"score": "squares", "accumulator_dtype": "float64"},
    "squares per step": {"score": "squares", "accumulate": "per_step"},
    "abs_of_mean per step": {"score": "abs_of_mean", "accumulate": "per_step"},
    "gradient_times_weight": {"score": "gradient_times_weight", "accumulator_dtype": "float64"},
    "gradient_times_weight per step": {"score": "gradient_times_weight", "accumulate": "per_step"},
}
NORMS: dict[str, dict[str, Any]] = {"wanda": {"score": "wanda"}, "everything": {"score": "everything"}}


def settings_of(variant: str, folder: str | None) -> sz.SelectionConfig:
    """The selection's config of a variant; norms are those of linears only."""
    options = dict((VARIANTS | NORMS)[variant])
    regions = all_families(options.pop("score"))
    if variant in NORMS:
        regions = regions[:4]
    if "disk" in variant:
        options["accumulator_folder"] = folder
    return sz.SelectionConfig(regions=regions, **options)


def dropping(model: nn.Module) -> nn.Module:
    """With dropout, whose random numbers are those of the micro-batch and not of the rank."""
    hook = lambda _, args, output: nn.functional.dropout(output, 0.2)  # noqa: E731
    model.get_submodule("layers.0.self_attn").register_forward_hook(hook)
    return model


def scores_of(
    model: nn.Module, config: sz.SelectionConfig, batches: list[Tensor], plain: nn.Module | None = None
) -> dict[Key, Tensor]:
    """Calibrate, and check that all ranks got the same bits."""
    module_map = default_module_map(plain or model)
    candidates = find_candidates(config, module_map)
    scores, number = calibrate(model, batches, candidates, RULES, tiny_loss, config=config, module_map=module_map)
    assert number == len(batches)
    sha = hashlib.sha256()
    for tensor in scores.values():
        sha.update(tensor.numpy().tobytes())
    check_equal_on_all_ranks(sha.hexdigest(), "the scores")
    return scores


def as_lists(scores: dict[Key, Tensor]) -> dict[str, list[float]]:
    """For JSON, which keeps fp64 as it is."""
    return {f"{weight}/{kind}": tensor.reshape(-1).tolist() for (weight, kind), tensor in scores.items()}


def strip_sums_and_dense_sums(batches: list[Tensor]) -> float:
    """Largest difference of region sums by strips to those of accumulated fp32 gradients, over the sums of |g|."""
    by_strips = scores_of(make_mixed(), sz.SelectionConfig(regions=all_families("sums")), batches)
    dense = scores_of(make_mixed(), sz.SelectionConfig(regions=all_families("dense_sums")), batches)
    absolute = scores_of(make_mixed(), sz.SelectionConfig(regions=all_families("l1")), batches)
    return max(float(((by_strips[key] - dense[key]).abs() / (absolute[key] + 1e-30)).max()) for key in dense)


def scores_on_ranks(number: int, folder: str) -> dict[str, Any]:
    """Scores of every variant from ``number`` micro-batches."""
    batches = make_batches(number)
    scores = {
        variant: as_lists(scores_of(dropping(make_mixed()), settings_of(variant, folder), batches))
        for variant in VARIANTS | NORMS
    }
    dist.barrier()
    assert list(Path(folder).iterdir()) == []
    return {"scores": scores, "strips": strip_sums_and_dense_sums(batches)}


def engine_of(model: nn.Module) -> Any:
    """A DeepSpeed engine without an optimizer that shards every weight."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def sharded_scores(number: int, checkpointing: str, folder: str) -> dict[str, float]:
    """Largest relative difference of scores under ZeRO-3 to those of the plain model, by variant."""
    batches = make_batches(number)
    found = {}
    for variant in VARIANTS | NORMS:
        config = settings_of(variant, folder)
        plain = scores_of(dropping(make_mixed()), config, batches)
        engine = engine_of(dropping(make_mixed(checkpointing)))
        assert all(parameter.numel() == 0 for parameter in engine.module.parameters())
        before = state_of(engine.module)
        sharded = scores_of(engine.module, config, batches)
        after = state_of(engine.module)
        assert before == after, [name for name in before if before[name] != after[name]]
        differences = [(sharded[key] - plain[key]).abs().max() / plain[key].abs().max() for key in plain]
        found[variant] = float(torch.stack(differences).max())
        engine.destroy()
    return found


def errors_on_ranks(folder: str) -> dict[str, dict[str, str]]:
    """What each rank raises when one of them fails, by case."""
    config = sz.SelectionConfig(regions=all_families("squares"), accumulator_folder=folder)
    batches = make_batches(2 * dist.get_world_size())

    def third_is_nan(model: TinyModel, tokens: Tensor) -> Tensor:
        return tiny_loss(model, tokens) * (float("nan") if torch.equal(tokens, batches[2]) else 1.0)

    def third_fails(model: TinyModel, tokens: Tensor) -> Tensor:
        if torch.equal(tokens, batches[2]):
            raise ArithmeticError("no third micro-batch")
        return tiny_loss(model, tokens)

    def poison(module: nn.Module, args: Any, output: Tensor) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            output.register_hook(lambda gradient: gradient * float("inf"))

    def caught(model: nn.Module, loss_fn: Any, config: sz.SelectionConfig = config) -> str:
        module_map = default_module_map(model)
        candidates = find_candidates(config, module_map)
        before = state_of(model)
        try:
            calibrate(model, batches, candidates, RULES, loss_fn, config=config, module_map=module_map)
        except (InputError, ArithmeticError, PeerError, RuntimeError) as error:
            assert state_of(model) == before
            return f"{type(error).__name__}: {error}"
        return ""

    poisoned = make_mixed()
    poisoned.layers[0].self_attn.register_forward_hook(poison)
    missing = f"{folder}/only_elsewhere" if dist.get_rank() == 1 else folder
    elsewhere = sz.SelectionConfig(regions=all_families("squares"), accumulator_folder=missing)
    found = {
        "nan": caught(make_mixed(), third_is_nan),
        "exception": caught(make_mixed(), third_fails),
        "gradient": caught(poisoned, tiny_loss),
        "rule": caught(make_mixed(), tiny_loss, sz.SelectionConfig(regions=all_families("failing_in_one"))),
        "folder": caught(make_mixed(), tiny_loss, elsewhere),
        "nan, sharded": caught(engine_of(make_model()).module, third_is_nan, sharded_config()),
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    # Only now has every rank ended its last case.
    assert list(Path(folder).iterdir()) == []
    return {case: {str(rank): each[case] for rank, each in enumerate(gathered)} for case in found}


def only_on_rank_1(what: str) -> None:
    """Raise there."""
    if dist.get_rank() == 1:
        raise ArithmeticError(f"{what} on rank 1")


def of_weights(regions: Candidates, *, weight: Tensor) -> Tensor:
    """A rule that reads no data, and fails on one rank."""
    only_on_rank_1("a rule of weights")
    return regions.sums(weight.abs())


def of_gradients(regions: Candidates, *, gradient: Tensor) -> Tensor:
    """A rule that is called in backward (per step), and fails on one rank."""
    only_on_rank_1("a rule of gradients")
    return regions.sums(gradient.abs())


def lone_failures(stage: int) -> dict[str, list[str]]:
    """What every rank says where rank 1 alone fails, by case; the ranks meet again after each of them."""
    rank = dist.get_rank()
    found = {}

    def attempt(case: str, score: str, *, pattern: str = "layers.*", data: Any = None, **options: Any) -> None:
        region = sz.RegionConfig(kind="row", modules=(pattern,), per_matrix=1, score=score)
        model = make_model() if stage < 3 else engine_of(make_model()).module
        try:
            sz.score_regions(
                model,
                make_batches(2 * dist.get_world_size()) if data is None else data,
                sz.SelectionConfig(regions=(region,), **options),
                tiny_loss,
            )
            said = ""
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        gathered: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(gathered, said)
        found[case] = gathered

    def breaking_off() -> Any:
        for number, batch in enumerate(make_batches(2 * dist.get_world_size())):
            if number == 2:
                only_on_rank_1("data")
            yield batch

    attempt("pattern", "magnitude", pattern="nowhere.*" if rank == 1 else "layers.*")
    attempt("score", "l1" if rank == 0 else f"{__name__}:missing")
    attempt("rule of weights", f"{__name__}:of_weights")
    # Under ZeRO-3 the other ranks are in the gathering of the next layer's weight when it raises.
    attempt("rule of gradients", f"{__name__}:of_gradients", accumulate="per_step")
    attempt("data", "l1", data=breaking_off())
    if stage < 3:
        full = sz.FullCalibrationConfig(stage=3, batches_per_step=2 * dist.get_world_size())
        options: dict[str, Any] = {"calibration_batches": 2 * dist.get_world_size(), "full_calibration": full}
        score = f"{__name__}:of_gradients"
        attempt("full", score, accumulate="per_step", calibration_weights="full", **options)
    return found


def memory_on_ranks() -> dict[str, Any]:
    """What accumulators say that the host could hold for one rank, and not for all."""
    available = _available_memory()
    assert available is not None
    shapes = {"huge": (1024, int(0.7 * available) // 4096)}
    try:
        Accumulators(shapes, "float32")
        said = ""
    except (InputError, PeerError) as error:
        said = f"{type(error).__name__}: {error}"
    gathered: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(gathered, said)
    return {"said": gathered, "ranks": _ranks_on_this_host()}


def sharded_config() -> sz.SelectionConfig:
    """Rows of all attention matrices of a TinyModel."""
    region = sz.RegionConfig(kind="row", modules=("layers.*.self_attn.*",), per_matrix=1, score="squares")
    return sz.SelectionConfig(regions=(region,))


def accumulators_on_ranks(folder: str) -> dict[str, Any]:
    """Sums over the ranks, of weights with several pieces, for every owner."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shape = (2100, 2003)  # More than one piece, and not a multiple of it.
    names = [f"weight{number}" for number in range(world_size)]
    generator = torch.Generator().manual_seed(rank)
    exact = torch.zeros(shape, dtype=torch.float64)
    for other in range(world_size):
        exact += torch.randn(shape, generator=torch.Generator().manual_seed(other)).double()
    gradient = torch.randn(shape, generator=generator)
    report: dict[str, Any] = {"right": [], "elsewhere": []}
    for place in (None, folder):
        with Accumulators(dict.fromkeys(names, shape), "float32", place) as accumulators:
            for name in names:
                accumulators.add(name, gradient)
            for owner, name in enumerate(names):
                taken = accumulators.take(name, owner)
                is_right = taken is not None and torch.allclose(taken, exact, rtol=1e-15, atol=1e-15)
                report["right" if owner == rank else "elsewhere"].append(is_right if owner == rank else taken is None)
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, report)
    return {name: [value for each in gathered for value in each[name]] for name in report}
