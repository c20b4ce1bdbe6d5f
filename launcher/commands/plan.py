"""`sparse-zero plan`: how much memory will a run take, and what fits, before anything is loaded or rented?"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.common import OVERRIDES, Parser, add_command, check_keeps_inputs, inputs_of, read_run
from launcher.run_folder import check_out_file
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json

if TYPE_CHECKING:
    from launcher.config import RunConfig
    from launcher.plan.answers import Answer
    from launcher.plan.planned_run import Gpu, PlannedRun

# The same words as launcher.plan.defaults and launcher.plan.questions have: those import torch.
_METHODS = ("smt", "rocoft-rows", "rocoft-columns", "mixed", "diablo", "full", "lora", "dora", "qlora")
_WITH_ADAPTERS = ("lora", "dora", "qlora")
_QUESTIONS = ("gpus", "batch", "length", "budget", "stage")
_EXAMPLES = """
Does it fit? (milliseconds of arithmetic; --simulate runs the real code on tensors without data)
  sparse-zero plan --model llama-2-7b --method smt --gpu-memory 24 --ranks 8
  sparse-zero plan --config configs/runs/llama-2-7b-smt-1x8.yaml --ranks 8 --gpu-memory 24 --simulate
A classifier has no such arithmetic: it is simulated, and answers no other question.
  sparse-zero plan --config configs/runs/papers/rocoft-rows-roberta-base-rte.yaml --gpu-memory 24
How many GPUs of 24 GiB? How large may batch, length, budget be? Which stage, and why?
  sparse-zero plan --model llama-2-13b --method mixed --gpu-memory 24 --find gpus
  sparse-zero plan --model llama-2-7b --gpu-memory 24 --find batch --data.max_length=512
  sparse-zero plan --model llama-3.1-70b --method smt --gpu-memory 80 --ranks 8 --find stage
Beside full fine-tuning, LoRA, DoRA and QLoRA; or: which models fit on 8 x 80 GiB at all?
  sparse-zero plan --model llama-2-7b --method smt --gpu-memory 80 --compare
  sparse-zero plan --fits --method smt --gpu-memory 80 --ranks 8

--model takes a folder with a config.json, a hub name, or a built-in shape, which needs neither files nor network:
"""
_WITHOUT_CONFIG = (
    "Without --config the method's recipe is planned in bf16 with gradient checkpointing, stage 2, micro-batches of\n"
    "1 x 2048 tokens: change it with --training.micro_batch_size=4, --data.max_length=512, --zero.stage=3 and so on.\n"
    "Exit code: 0 it fits, 1 it does not, 2 wrong input."
)


def add_parser(subparsers: "argparse._SubParsersAction[Parser]") -> Parser:
    """Describe the command's arguments."""
    from models.known_shapes import KNOWN_SHAPES

    names = [shape.name for shape in KNOWN_SHAPES]
    lines = [f"  {', '.join(names[start : start + 6])}" for start in range(0, len(names), 6)]
    parser = add_command(
        subparsers,
        "plan",
        "forecast the memory of a run, and find what fits",
        "\n".join([*_EXAMPLES.strip().splitlines(), *lines, "", *_WITHOUT_CONFIG.splitlines()]),
        config=False,
    )
    parser.description = f"{parser.description} {OVERRIDES}"
    parser.set_defaults(takes_overrides=True)
    parser.add_argument("--config", metavar="FILE", help="the YAML file of the run")
    parser.add_argument("--model", metavar="NAME", help="instead of --config: a built-in shape, a folder or a hub name")
    parser.add_argument(
        "--method",
        choices=_METHODS,
        metavar="METHOD",
        help=f"by its paper's recipe, or instead of the config's: {', '.join(_METHODS)}; default for --model: smt",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="GPUs of the job; default: those of the cluster section; 1 for --model"
    )
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each GPU: does the run fit?")
    parser.add_argument(
        "--find",
        choices=_QUESTIONS,
        metavar="WHAT",
        help="gpus: how many; batch, length, budget: the largest that fits; stage: all layouts that fit, fastest first",
    )
    parser.add_argument("--compare", action="store_true", help="beside it the same job by full, LoRA, DoRA and QLoRA")
    parser.add_argument("--fits", action="store_true", help="which built-in models fit; without --config and --model")
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="also run the real code on tensors without data; done for every classifier, which has no forecast",
    )
    parser.add_argument("--lora-rank", type=int, metavar="R", help="of LoRA, DoRA and QLoRA; default: 32")
    parser.add_argument("--json", metavar="FILE", help="also write all numbers to this file")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="also draw what each phase holds, a PNG; with --simulate a step, too (extra: plots)",
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuse arguments that do not hold or go together, before anything heavy is imported."""
    if args.fits:
        for name in ("config", "model", "find", "plot"):
            if getattr(args, name) is not None:
                raise InputError(f"--fits and --{name} are both given: --fits looks at all built-in models; drop one")
        if args.compare or args.simulate:
            raise InputError("--fits with --compare or --simulate, which are about one model: name it with --model")
    elif (args.config is None) == (args.model is None):
        what = "both given" if args.config is not None else "both missing"
        raise InputError(f"--config and --model are {what}: give one of them (--model llama-2-7b; see --help)")
    if args.ranks is not None and args.ranks < 1:
        raise InputError(f"--ranks is {args.ranks}: a job needs at least one")
    if args.gpu_memory is not None and not 0 < args.gpu_memory < math.inf:
        raise InputError(f"--gpu-memory is {args.gpu_memory:g}: it must be a number above 0, in GiB")
    if args.gpu_memory is None and (args.fits or args.find):
        question = "--fits" if args.fits else f"--find {args.find}"
        raise InputError(f"{question} needs --gpu-memory, the GiB of each GPU, as in --gpu-memory 24")
    if args.lora_rank is not None and args.lora_rank < 1:
        raise InputError(f"--lora-rank is {args.lora_rank}: it must be at least 1")
    if args.lora_rank is not None and args.method not in _WITH_ADAPTERS and not args.compare:
        what = f"--method {args.method}" if args.method else "no --method"
        raise InputError(
            f"--lora-rank is {args.lora_rank} with {what}, and nothing has adapters of a rank: choose "
            f"--method {', '.join(_WITH_ADAPTERS[:-1])} or {_WITH_ADAPTERS[-1]}, add --compare, or leave it out"
        )
    if args.simulate and args.find:
        raise InputError(
            f"--simulate with --find {args.find}, which is answered by the forecast: simulate the answer in a second "
            "call"
        )
    for name in ("json", "plot"):
        if getattr(args, name) is not None:
            check_out_file(Path(getattr(args, name)), f"--{name}")
    if args.plot is not None and Path(args.plot).suffix.lower() != ".png":
        raise InputError(f"--plot is {args.plot}: name a .png file")


def _ranks(args: argparse.Namespace, config: "RunConfig") -> int:
    if args.ranks is not None:
        return int(args.ranks)
    per_node = config.cluster.ranks_per_node
    if per_node is not None:
        return config.cluster.num_nodes * per_node
    if args.model is not None or args.find == "gpus":
        return 1
    raise InputError("--ranks is missing, and cluster.ranks_per_node does not say it: give one of them")


def _about_classifier(
    args: argparse.Namespace, config: "RunConfig", gpu: "Gpu | None", timeline: Path | None
) -> "Answer":
    """The answer about a run that classifies texts."""
    from launcher.plan.simulated_answer import about_classifier

    for name in ("method", "find", "compare", "lora_rank"):
        if getattr(args, name):
            raise InputError(
                f"--{name.replace('_', '-')} with a classifier (model.task is 'sequence_classification'), which is "
                "simulated and has no closed form: change settings of the run, and plan it again"
            )
    return about_classifier(config, _ranks(args, config), gpu=gpu, name=Path(args.config).stem, timeline=timeline)


def _planned(args: argparse.Namespace, config: "RunConfig | None") -> "tuple[PlannedRun, str]":
    """The run that is asked about, and what its method is called.

    Args:
        args: of the command.
        config: that they name; None where they name a model.
    """
    import dataclasses

    from launcher.config import apply_override, parse_config
    from launcher.config_checks import check_config
    from launcher.plan.defaults import LORA_RANK, SELECTIONS, default_run, described, peer_changes, selection_for
    from launcher.plan.planned_run import plan_run
    from launcher.yaml_files import read_mapping

    if config is None:
        method = args.method or "smt"
        config = default_run(args.model, method, args.overrides)
        values = described(args.model)
    else:
        method = args.method or "the run"
        values = described(config.model.name_or_path, field="model.name_or_path")
        if method in SELECTIONS:
            mapping = {**read_mapping(args.config), "selection": selection_for(method, values)}
            for override in args.overrides:
                apply_override(mapping, override)
            replaced = parse_config(mapping, source=args.config)
            config = dataclasses.replace(config, selection=replaced.selection)
            check_config(config)
    changes = peer_changes(method, str(values.get("model_type", "llama")), args.lora_rank or LORA_RANK)
    return plan_run(config, _ranks(args, config), **changes), method


def run(args: argparse.Namespace) -> int:
    """Carry the command out; 1 if what is asked for does not fit."""
    _check(args)
    if args.plot is None or not args.simulate:
        return _answer(args, None)
    with tempfile.TemporaryDirectory(prefix="sparse_zero_plan_") as folder:
        return _answer(args, Path(folder) / "timeline.json")


def _answer(args: argparse.Namespace, timeline: Path | None) -> int:
    from launcher.plan import answers as plan_answers  # heavy: torch and transformers
    from launcher.plan.defaults import LORA_RANK
    from launcher.plan.planned_run import Gpu

    gpu = None if args.gpu_memory is None else Gpu(gib=args.gpu_memory)
    config = None if args.config is None else read_run(args)
    for name in ("json", "plot"):
        if config is not None and getattr(args, name) is not None:
            check_keeps_inputs(Path(getattr(args, name)), f"--{name}", inputs_of(args, config))
    if args.fits:
        assert gpu is not None
        answer = plan_answers.fitting_models(
            args.method or "smt", args.ranks or 1, gpu, args.overrides, args.lora_rank or LORA_RANK
        )
    elif config is not None and config.model.classifies:
        answer = _about_classifier(args, config, gpu, timeline)
    else:
        planned, method = _planned(args, config)
        answer = plan_answers.about(
            planned,
            method,
            gpu=gpu,
            name=f"{args.model}, {method}" if args.model else Path(args.config).stem,
            find=args.find,
            compare=args.compare,
            simulate=args.simulate,
            timeline=timeline,
            lora_rank=args.lora_rank or LORA_RANK,
        )
    if args.json is not None:
        atomic_write_json(Path(args.json), answer.found)
    if args.plot is not None:
        answer.draw(Path(args.plot), timeline)
    answer.show()
    return 0 if answer.fits else 1
