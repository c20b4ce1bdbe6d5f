"""Will what the run holds fit into the memory of each node, and what it writes onto a disk?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.config import RunConfig
from launcher.preflight.asking import Answers
from launcher.preflight.findings import Finding, Status
from launcher.preflight.machine_checks import gpus_of, has_gpus
from launcher.preflight.wanted import Wanted
from launcher.summary import format_bytes
from sparse_zero.errors import InputError

# Of a rank on a CPU that is no tensor: the interpreter with torch, DeepSpeed and transformers.
_PROCESS_BYTES = 512 * 2**20
# Of a trained value in a checkpoint: its master and two moments in fp32; in an adapter, the value.
_CHECKPOINT_BYTES, _ADAPTER_BYTES = 12, 4


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a run takes, by a forecast from shapes."""

    # Of its GPU, everything counted, for each rank.
    gpu_bytes: int = 0
    # What a rank holds on its device, without what a GPU needs besides; and of what is offloaded, on the host.
    tensor_bytes: int = 0
    host_bytes: int = 0
    # All that is written: checkpoints and the adapter.
    output_bytes: int | None = None
    # Why it is not known.
    problem: str = ""


def forecast_need(config: RunConfig, world_size: int) -> Need:
    """By the closed form, which reads a model's config and no weights."""
    from launcher.plan.planned_run import plan_run  # heavy: transformers

    try:
        run = plan_run(config, world_size)
        # The newest ones, the one that is being written, and the best.
        checkpoints = config.checkpoint.keep + 1 + (config.checkpoint.keep_best != "none")
        return Need(
            gpu_bytes=run.needed_bytes,
            tensor_bytes=run.peak_bytes,
            host_bytes=run.host_bytes,
            output_bytes=run.num_trained * (checkpoints * _CHECKPOINT_BYTES + config.output.adapter * _ADAPTER_BYTES),
        )
    except InputError as error:
        return Need(problem=" ".join(str(error).split()))


def check_memory(wanted: Wanted, answers: Answers, need: Need) -> list[Finding]:
    """Whether each node's ranks have room, on their GPUs or in its memory."""
    slots = {node.name: node.slots for node in wanted.nodes}
    found = []
    on_gpus = has_gpus(wanted, answers)
    for node, facts in answers.facts.items():
        if need.problem:
            remedy = "sparse-zero plan --config tells more"
            what = f"no forecast of what a rank takes: {need.problem}"
            found.append(Finding(node=node, check="memory", status="warn", what=what, remedy=remedy))
            continue
        rows = [_on_gpus([gpu["total_bytes"] for gpu in gpus_of(facts, wanted.devices)], need)] if on_gpus else []
        if "error" not in facts["memory"]:
            per_rank = need.host_bytes + (0 if on_gpus else need.tensor_bytes + _PROCESS_BYTES)
            memory = facts["memory"]
            rows.append(_on_host(per_rank, slots[node], memory["total_bytes"], memory["available_bytes"]))
        for status, what in rows:
            remedy = "sparse-zero plan --config finds a batch, stage or budget that fits" if status != "ok" else ""
            found.append(Finding(node=node, check="memory", status=status, what=what, remedy=remedy))
    return found


def _on_gpus(totals: Sequence[int | None], need: Need) -> tuple[Status, str]:
    from launcher.plan.planned_run import Gpu

    known = [total for total in totals if total is not None]
    what = f"a rank takes about {format_bytes(need.gpu_bytes)}"
    if not known:
        return "ok", f"{what}; its GPUs do not tell what they have"
    smallest = min(known)
    if need.gpu_bytes > Gpu(gib=smallest / 2**30).usable_bytes:
        return "fail", f"{what}, more than the {format_bytes(smallest)} of a GPU"
    return "ok", f"{what} of {format_bytes(smallest)} of a GPU"


def _on_host(per_rank: int, ranks: int, total: int, available: int) -> tuple[Status, str]:
    needed = per_rank * ranks
    what = f"{ranks} rank{'s take' if ranks > 1 else ' takes'} about {format_bytes(needed)} of its memory"
    if needed > total:
        return "fail", f"{what}, which has {format_bytes(total)} in all"
    if needed > available:
        return "warn", f"{what}, of which {format_bytes(available)} of {format_bytes(total)} are free now"
    return "ok", f"{what}, of which {format_bytes(available)} are free"
