"""What the spawned ranks do in the tests of calibration by full fine-tuning."""

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparse_zero as sz
from sparse_zero.module_map import default_module_map
from sparse_zero.selection.calibration import Key, calibrate
from sparse_zero.selection.candidates import Candidates, find_candidates
from sparse_zero.selection.full_calibration import calibrate_full
from sparse_zero.selection.scores import resolve_score
from sparse_zero.zero import compat
from sparse_zero.zero.compat import inner_optimizer
from tests.distributed.workers import make_engine, train
from tests.sparse_zero.helpers import TinyModel, tiny_loss

NUM_BATCHES, BATCHES_PER_STEP, LEARNING_RATE = 12, 4, 1e-3
BLOCK = 6


def make_model(*, tie: bool = False, checkpointing: bool = False, bf16: bool = False) -> TinyModel:
    """The same weights on every rank."""
    torch.manual_seed(7)
    model = TinyModel(tie=tie)
    model.checkpointing = checkpointing
    return model.bfloat16() if bf16 else model


def make_batches() -> Tensor:
    """[NUM_BATCHES, 2, 9] token ids."""
    return torch.randint(0, 32, (NUM_BATCHES, 2, 9), generator=torch.Generator().manual_seed(5))


def make_config(**options: Any) -> sz.SelectionConfig:
    """Blocks, rows and columns, each with a score of its own; the embedding among them."""
    accumulate = options.pop("accumulate", "sum")
    return sz.SelectionConfig(
        regions=(
            sz.RegionConfig(
                kind="block", modules=("*.{q,k}_proj",), block_size=BLOCK, score="abs_of_mean", per_matrix=1
            ),
            sz.RegionConfig(kind="row", modules=("*.{q,v}_proj", "embed_tokens"), score="mean_of_abs", per_matrix=1),
            sz.RegionConfig(kind="column", modules=("*.o_proj",), score="gradient_times_weight", per_matrix=1),
            sz.RegionConfig(kind="row", modules=("*.o_proj",), score="wanda", per_matrix=1),
        ),
        accumulate=accumulate,
        calibration_batches=NUM_BATCHES,
        calibration_weights="full",
        full_calibration=sz.FullCalibrationConfig(
            learning_rate=LEARNING_RATE, batches_per_step=BATCHES_PER_STEP, **options
        ),
    )


def run_full(model: nn.Module, config: sz.SelectionConfig, loss_fn: Any = tiny_loss) -> dict[Key, Tensor]:
    """Scores by calibrate_full."""
    module_map = default_module_map(model)
    candidates = find_candidates(config, module_map)
    rules = {each.score: resolve_score(each.score) for each in candidates}
    scores, number = calibrate_full(
        model, make_batches(), candidates, rules, loss_fn, config=config, module_map=module_map
    )
    assert number == NUM_BATCHES
    return scores


# --- the plain loop: no code of ours but the candidates' names and kinds ---------------------------------------------


def _region_sums(kind: str, matrix_OI: Tensor) -> Tensor:
    if kind == "row":
        return matrix_OI.sum(1)
    if kind == "column":
        return matrix_OI.sum(0)
    grid = [-(-side // BLOCK) for side in matrix_OI.shape]
    return torch.stack(
        [
            torch.stack(
                [
                    matrix_OI[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK].sum()
                    for j in range(grid[1])
                ]
            )
            for i in range(grid[0])
        ]
    )  # fmt: skip


def _plain_score(each: Candidates, gradient: Tensor, weight: Tensor, squares: Tensor | None) -> Tensor:
    number = _region_sums(each.kind, torch.ones_like(gradient))
    if each.score == "abs_of_mean":
        return _region_sums(each.kind, gradient).abs() / number
    if each.score == "mean_of_abs":
        return _region_sums(each.kind, gradient.abs()) / number
    if each.score == "gradient_times_weight":
        return _region_sums(each.kind, (gradient * weight).abs()) / number
    assert each.score == "wanda"
    assert squares is not None
    return _region_sums(each.kind, weight.abs() * squares.sqrt()) / number


def plain_loop(
    model: TinyModel, candidates: list[Candidates], *, per_step: bool, keep: bool
) -> tuple[dict[Key, Tensor], dict[str, Tensor]]:
    """Scores and final weights of single-process full AdamW with fp32 masters; dense gradients, scored in fp64."""
    parameters = dict(model.named_parameters())
    masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in parameters.items()}
    start = {name: parameter.detach().double() for name, parameter in parameters.items()}
    squares: dict[str, Tensor] = {}

    def count(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if torch._C._current_graph_task_id() == -1:  # Not where checkpointing runs the forward again.
                found = args[0].detach().double().flatten(0, -2).square().sum(0)
                squares[name] = squares.get(name, torch.zeros(())) + found

        return add

    for name in {each.module for each in candidates if each.score == "wanda"}:
        model.get_submodule(name).register_forward_hook(count(f"{name}.weight"))
    optimizer = torch.optim.AdamW(masters.values(), lr=LEARNING_RATE, weight_decay=0.0)
    total = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in parameters.items()}
    scores: dict[Key, Tensor] = {}
    for batches in make_batches().split(BATCHES_PER_STEP):
        optimizer.zero_grad()
        for batch in batches:
            model.zero_grad()
            tiny_loss(model, batch).backward()
            for name, parameter in parameters.items():
                gradient = parameter.grad
                assert gradient is not None
                master = masters[name]
                step = gradient.float() / BATCHES_PER_STEP
                master.grad = step if master.grad is None else master.grad + step
                total[name] += gradient.double() / NUM_BATCHES
            for each in candidates if per_step else ():
                if each.score != "wanda":
                    gradient, weight = parameters[each.weight].grad, parameters[each.weight].detach()
                    assert gradient is not None
                    found = _plain_score(each, gradient.double(), weight.double(), None) / NUM_BATCHES
                    key = (each.weight, each.kind)
                    scores[key] = scores.get(key, torch.zeros(())) + found
        optimizer.step()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(masters[name])
    last = {name: parameter.detach().double() for name, parameter in parameters.items()}
    for each in candidates:
        if (each.weight, each.kind) not in scores:
            weight = (last if keep else start)[each.weight]
            scores[each.weight, each.kind] = _plain_score(each, total[each.weight], weight, squares.get(each.weight))
    return scores, last


def _difference(found: Mapping[Any, Tensor], wanted: Mapping[Any, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(
        float((found[key].double() - wanted[key].double()).abs().max() / wanted[key].double().abs().max())
        for key in wanted
    )


# --- what the tests call ---------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that its weights do not tell."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "attributes": [sorted(set(vars(module))) for module in model.modules()],
        "dictionaries": [type(module._parameters) for module in model.modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "parameter_attributes": [dict(parameter.__dict__) for parameter in model.parameters()],
        "parameter_hooks": [
            (len(parameter._backward_hooks or ()), len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ()))
            for parameter in model.parameters()
        ],
        "bytes": [
            parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
            for parameter in model.parameters()
        ],
        "training": model.training,
    }


def compare(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every case against the plain loop, and the model's state before and after it."""
    report = []
    for case in cases:
        options = dict(case)
        shape = {name: options.pop(name) for name in ("tie", "checkpointing", "bf16") if name in options}
        config = make_config(**options)
        keep = config.full_calibration.keep_weights_in is not None
        model = make_model(**shape)
        model.embed_tokens.weight.__dict__["mark"] = "mine"
        model.embed_tokens.weight.requires_grad_(False)
        model.layers[0].self_attn.q_proj.bias.grad = torch.ones(20, dtype=model.lm_head.weight.dtype)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = _state(model)
        seen: dict[str, Any] = {}

        def loss_fn(engine: Any, batch: Tensor, seen: dict[str, Any] = seen) -> Tensor:
            seen["calls"] = seen.get("calls", 0) + 1
            if seen["calls"] == NUM_BATCHES // dist.get_world_size():
                inner = inner_optimizer(engine)
                parts = {"engine": engine, "zero": engine.optimizer, "inner": inner}
                parts |= {f"moment {number}": state["exp_avg"] for number, state in enumerate(inner.state.values())}
                if hasattr(engine.optimizer, "parameter_offload"):
                    parts["coordinator"] = engine.optimizer.parameter_offload.param_coordinator
                seen["alive"] = {name: weakref.ref(part) for name, part in parts.items()}
            return tiny_loss(engine, batch)

        found = run_full(model, config, loss_fn)
        gc.collect()
        reference = make_model(**shape)
        candidates = find_candidates(config, default_module_map(reference))
        wanted, trained = plain_loop(reference, candidates, per_step=config.accumulate == "per_step", keep=keep)
        after = dict(model.named_parameters())
        entry = {
            "case": case,
            "scores": _difference(found, wanted),
            "state": [name for name, value in _state(model).items() if str(value) != str(state[name])],
            "alive": [name for name, part in seen["alive"].items() if part() is not None],
            "watched": len(seen["alive"]),
            "calls": seen["calls"],
        }
        if keep:
            moved = {name: parameter.detach().double() - before[name].double() for name, parameter in after.items()}
            wanted_moves = {name: trained[name] - before[name].double() for name in moved}
            entry["weights"] = max(float((moved[name] - wanted_moves[name]).abs().max()) for name in moved)
            entry["moved"] = min(float(moved[name].abs().max()) for name in moved)
        else:
            entry["restored"] = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        report.append(entry)
    return report


def frozen_difference() -> float:
    """How far the scores of frozen weights are from those of trained ones."""
    config, model = make_config(), make_model()
    module_map = default_module_map(model)
    candidates = find_candidates(config, module_map)
    rules = {each.score: resolve_score(each.score) for each in candidates}
    frozen, _ = calibrate(model, make_batches(), candidates, rules, tiny_loss, config=config, module_map=module_map)
    return _difference(frozen, run_full(model, config))


def select_and_train(stage: int, keep: bool) -> dict[str, Any]:
    """Select with full calibration, then train the selection under ZeRO-2; against the same without the calibration."""
    tokens = torch.randint(0, 32, (3, 8, 9), generator=torch.Generator().manual_seed(3))
    size = dist.get_world_size()
    model = make_model(tie=True)
    config = make_config(stage=stage, keep_weights_in="written elsewhere" if keep else None)
    selection = sz.select(model, make_batches(), config, tiny_loss)
    again = make_model(tie=True)
    again.load_state_dict(model.state_dict())
    losses = []
    for each in (model, again):
        sz.sparsify(each, selection)
        engine = make_engine(each, 2, 8 // size, 1)
        losses.append(train(engine, tokens, 8 // size, 1))
    return {"parameters": selection.num_parameters, "losses": losses}


def refusals() -> dict[str, Any]:
    """What the ranks say together, and in which state they leave the model."""
    found: dict[str, Any] = {}

    def attempt(name: str, config: sz.SelectionConfig, batches: Any, loss_fn: Any = tiny_loss) -> None:
        model = make_model()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        state = _state(model)
        module_map = default_module_map(model)
        candidates = find_candidates(config, module_map)
        rules = {each.score: resolve_score(each.score) for each in candidates}
        try:
            calibrate_full(model, batches, candidates, rules, loss_fn, config=config, module_map=module_map)
        except Exception as error:
            unchanged = all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
            found[name] = [type(error).__name__, str(error), unchanged and str(_state(model)) == str(state)]

    def explode(engine: Any, batch: Tensor) -> Tensor:
        return tiny_loss(engine, batch) * float("inf")

    batches = make_batches()
    for stage in (2, 3):
        attempt(f"cut off {stage}", make_config(stage=stage), iter(batches[:6]))
        attempt(f"not finite {stage}", make_config(stage=stage), batches, explode)
    attempt("empty", make_config(), [])
    return found


def take_apart() -> dict[str, Any]:
    """Which names compat's teardown uses, and what it and DeepSpeed's own leave of an engine, by stage."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    report: dict[str, Any] = {}
    for stage in (2, 3):
        model = make_model()
        before = _state(model)

        def engine_of(model: nn.Module, stage: int = stage) -> Any:
            engine = deepspeed.initialize(
                model=model,
                optimizer=torch.optim.AdamW(model.parameters()),
                config={
                    "train_micro_batch_size_per_gpu": 2,
                    "zero_allow_untested_optimizer": True,
                    "zero_optimization": {"stage": stage},
                    "steps_per_print": 10**9,
                },
            )[0]
            for batch in make_batches()[:2]:
                engine.backward(tiny_loss(engine, batch))
                engine.step()
            return engine

        engine = engine_of(model)
        attributes = {name for module in model.modules() for name in vars(module)}
        new = attributes - {name for names in before["attributes"] for name in names}
        names = [*compat.MODULE_ATTRIBUTES, "ds_inflight_param_registry"] if stage == 3 else []
        on_engine = ("module_forward_pre_hook", "module_forward_post_hook", "optimizer", "basic_optimizer")
        cached = vars(PartitionedParameterCoordinator).get("_PartitionedParameterCoordinator__params_to_release")
        cells = getattr(cached, "__closure__", None) or ()
        found = {
            "the engine's attributes": [name for name in on_engine if getattr(engine, name, None) is None],
            "stage 3's attributes of modules": sorted(set(names) - new),
            "FWD_MODULE_STACK": []
            if stage == 2 or model in parameter_offload.FWD_MODULE_STACK
            else ["the model in it"],
            "the cache of __params_to_release": []
            if any(hasattr(cell.cell_contents, "cache_clear") for cell in cells)
            else ["cache_clear"],
            "empty_partition_cache": []
            if stage == 2 or hasattr(engine.optimizer, "empty_partition_cache")
            else ["on the optimizer"],
        }
        parts = {"engine": weakref.ref(engine), "optimizer": weakref.ref(engine.optimizer)}
        moments = [state["exp_avg"] for state in inner_optimizer(engine).state.values()]
        parts |= {f"moment {number}": weakref.ref(moment) for number, moment in enumerate(moments)}
        del moments
        compat.make_plain(engine)
        del engine
        gc.collect()
        after = _state(model)
        entry = {
            "names": found,
            "unknown": sorted(new - set(names)),
            "left": [name for name, value in after.items() if str(value) != str(before[name])],
            "alive": [name for name, part in parts.items() if part() is not None],
        }
        engine = engine_of(model)
        engine.destroy()
        part = weakref.ref(engine)
        del engine
        gc.collect()
        report[str(stage)] = {**entry, "outlives_destroy": part() is not None}
    return report
