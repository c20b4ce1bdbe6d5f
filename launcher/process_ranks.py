"""Which rank of which world is this process, and where do the ranks meet?

Launchers tell it in environment variables, read in this order (the first that is present counts):

    1. torchrun, DeepSpeed's launcher, or by hand   RANK, WORLD_SIZE, LOCAL_RANK
    2. Open MPI                                     OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK
    3. MPICH, Intel MPI (Hydra)                     PMI_RANK, PMI_SIZE, MPI_LOCALRANKID
    4. Slurm, inside a task that srun started       SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID
    5. none of them                                 a single process

Slurm's PMI-2 plug-in sets PMI_RANK and PMI_SIZE in every task of srun: where they say what Slurm says, Slurm counts,
which needs no MPI for the ranks to meet.

One launcher may start another (srun one torchrun per node). The outer one then describes fewer
processes than the inner one and is not compared. Otherwise two sources must say the same, because a
wrong guess makes ranks wait for each other forever, or train the same thing side by side.
"""

import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Literal

from sparse_zero.errors import InputError

# Set to 1 by `sparse-zero launch` where it has given every rank the same MASTER_ADDR and MASTER_PORT.
TOLD_ALL = "SPARSE_ZERO_TOLD_ALL"
Launcher = Literal["torchrun", "environment", "openmpi", "mpich", "slurm", "none"]

# Slurm numbers the steps that are no tasks of srun (batch script, interactive shell) from here on.
_SLURM_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Ports for Slurm lie below the range that Linux hands out to clients (32768 and above).
_SLURM_FIRST_PORT, _SLURM_NUM_PORTS = 15000, 15000


# Variables by which launchers tell a process its place. What Slurm and MPI tell of a whole job is not among them.
OF_ONE_RANK = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_SIZE|LOCAL_WORLD_SIZE|TORCHELASTIC_RUN_ID|OMPI_COMM_WORLD_.*|(PMI|PMIX)_(RANK|SIZE)"
    r"|MPI_LOCAL(RANKID|NRANKS)|SLURM_(PROCID|LOCALID|NODEID|STEP_?ID|STEP_NUM_TASKS|STEP_TASKS_PER_NODE)"
)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The place of this process in the world."""

    # Index among all ranks; 0 <= rank < world_size.
    rank: int
    # Number of ranks on all nodes.
    world_size: int
    # Index among the ranks of this node; picks the GPU.
    local_rank: int
    # Number of ranks on this node; None when the launcher does not tell.
    local_world_size: int | None
    # Which source told it: the variables' first owner in the order above.
    launcher: Launcher

    def __post_init__(self) -> None:
        names = _NAMES[self.launcher]
        if self.world_size < 1:
            raise InputError(f"{names[1]} is {self.world_size}: a world needs at least one rank")
        if not 0 <= self.rank < self.world_size:
            raise InputError(
                f"{names[0]} is {self.rank} in a world of {self.world_size} ({names[1]}): "
                f"ranks count from 0 to {self.world_size - 1}"
            )
        if not 0 <= self.local_rank < self.world_size:
            raise InputError(f"{names[2]} is {self.local_rank} in a world of {self.world_size}: it is out of range")
        if self.local_world_size is not None and not self.local_rank < self.local_world_size <= self.world_size:
            raise InputError(
                f"{names[3]} is {self.local_world_size} with local rank {self.local_rank} in a world of "
                f"{self.world_size}: it must lie above the local rank and not above the world size"
            )


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the ranks of one world meet."""

    # Name or address of rank 0's node.
    address: str
    # TCP port on that node.
    port: int
    # Who named it, for the log: "the environment", "MPI", "Slurm", "a single process".
    source: str


# Variables of each source: rank, world size, local rank, local world size.
_NAMES: dict[Launcher, tuple[str, str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "environment": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "none": ("rank", "world size", "local rank", "local world size"),
}


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """What one source says; None where it says nothing."""

    launcher: Launcher
    rank: int | None
    world_size: int | None
    local_rank: int | None
    local_world_size: int | None

    @property
    def complete(self) -> bool:
        return self.rank is not None and self.world_size is not None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "").strip()
    if not value:
        return None
    if not re.fullmatch(r"-?\d+", value):
        raise InputError(f"{name} is {value!r} in the environment: it must be a whole number; unset it or correct it")
    return int(value)


def _read(environ: Mapping[str, str], launcher: Launcher) -> _Claim:
    rank, world_size, local_rank, local_world_size = (_number(environ, name) for name in _NAMES[launcher])
    return _Claim(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
    )


def _read_torch(environ: Mapping[str, str]) -> _Claim:
    if "TORCHELASTIC_RUN_ID" in environ:
        return _read(environ, "torchrun")
    claim = _read(environ, "environment")
    if claim.local_world_size is None:  # DeepSpeed says LOCAL_SIZE, torch says LOCAL_WORLD_SIZE.
        claim = replace(claim, local_world_size=_number(environ, "LOCAL_WORLD_SIZE"))
    return claim


def _slurm_tasks_on_this_node(environ: Mapping[str, str]) -> int | None:
    """The number of tasks on this node from a list such as ``4(x2),3``; None when Slurm does not tell."""
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", "").strip()
    node = _number(environ, "SLURM_NODEID")
    if not tasks or node is None:
        return None
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else None


def _read_slurm(environ: Mapping[str, str]) -> _Claim | None:
    """Slurm's claim inside a task of srun; None elsewhere.

    A batch script, too, has SLURM_PROCID 0 and SLURM_NTASKS of the whole job, but it is one process:
    only the step's number tells them apart.
    """
    step = _number(environ, "SLURM_STEP_ID")
    if step is None or step >= _SLURM_FIRST_SPECIAL_STEP:
        return None
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS")
    return _Claim(
        launcher="slurm",
        rank=_number(environ, "SLURM_PROCID"),
        world_size=_number(environ, "SLURM_NTASKS") if world_size is None else world_size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=_slurm_tasks_on_this_node(environ),
    )


def _describe(claim: _Claim) -> str:
    names = _NAMES[claim.launcher]
    return f"{names[0]}={claim.rank} {names[1]}={claim.world_size}"


def _disagree(inner: _Claim, outer: _Claim) -> bool:
    """Whether two sources that speak of the same processes contradict each other."""
    if inner.launcher == "torchrun":  # Whatever started torchrun's agents counts agents, in its own order.
        return False
    if inner.complete and outer.complete and outer.world_size != inner.world_size:
        assert inner.world_size is not None
        assert outer.world_size is not None
        return outer.world_size > inner.world_size
    return any(
        mine is not None and theirs is not None and mine != theirs
        for mine, theirs in ((inner.rank, outer.rank), (inner.world_size, outer.world_size))
    )


def find_ranks(environ: Mapping[str, str]) -> Ranks:
    """Read rank and world size from the launcher's variables; a pure function of ``environ``.

    The order is that of the module's docstring. A local rank or local world size that the first source
    leaves out is taken from a later one that speaks of the same rank.

    Raises:
        InputError: a value is no number or out of range, half of a pair is missing, two sources
            contradict each other, or the local rank of several ranks is unknown.
    """
    slurm = _read_slurm(environ)
    mpich = _read(environ, "mpich")
    by_plugin = slurm is not None and (slurm.rank, slurm.world_size) == (mpich.rank, mpich.world_size)
    last = [] if slurm is None else [slurm]
    candidates = [_read_torch(environ), _read(environ, "openmpi")]
    candidates += [*last, mpich] if by_plugin else [mpich, *last]
    present = [claim for claim in candidates if claim.rank is not None or claim.world_size is not None]
    chosen = next((claim for claim in present if claim.complete), None)
    for claim in present:
        if chosen is None and not (claim.rank is None and claim.world_size == 1):
            missing = _NAMES[claim.launcher][1 if claim.world_size is None else 0]
            raise InputError(f"{_describe(claim)} in the environment: {missing} is missing; set it or unset the other")
        if chosen is not None and _disagree(chosen, claim):
            raise InputError(
                f"the environment contradicts itself: {_describe(chosen)}, but {_describe(claim)}; "
                "unset those that the launcher did not set"
            )
    if chosen is None:
        return Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")
    assert chosen.rank is not None
    assert chosen.world_size is not None

    local_rank, local_world_size = chosen.local_rank, chosen.local_world_size
    for claim in candidates:
        if (claim.rank, claim.world_size) == (chosen.rank, chosen.world_size):
            local_rank = claim.local_rank if local_rank is None else local_rank
            local_world_size = claim.local_world_size if local_world_size is None else local_world_size
    if chosen.world_size == 1 and local_world_size is None:
        local_world_size = 1
    if local_rank is None and chosen.world_size > 1:
        raise InputError(
            f"{_NAMES[chosen.launcher][2]} is missing in a world of {chosen.world_size}: "
            "set it to the index of this process on its node (0 where every node has one)"
        )
    return Ranks(
        rank=chosen.rank,
        world_size=chosen.world_size,
        local_rank=local_rank or 0,
        local_world_size=local_world_size,
        launcher=chosen.launcher,
    )


def reports_errors(error: InputError, environ: Mapping[str, str]) -> bool:
    """Whether this process prints ``error``: what all ranks of a node met is said once, by local rank 0."""
    if error.speaks_for_all:
        return True
    try:
        return find_ranks(environ).local_rank == 0
    except InputError:
        return True


def first_host(node_list: str) -> str:
    """The first name of Slurm's compressed list: ``node[007-009,12],big1`` gives ``node007``.

    Raises:
        InputError: the text is no such list.
    """
    match = re.fullmatch(r"([^\[\],\s]+)(?:\[(\d+)[^\]]*\]([^\[\],\s]*))?(?:,.*)?", node_list.strip())
    if match is None:
        raise InputError(f"the Slurm node list {node_list!r} cannot be read: set MASTER_ADDR and MASTER_PORT")
    return match[1] + (match[2] or "") + (match[3] or "")


def free_port() -> int:
    """A TCP port of this node that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _port(environ: Mapping[str, str]) -> int | None:
    port = _number(environ, "MASTER_PORT")
    if port is not None and not 1 <= port <= 65535:
        raise InputError(f"MASTER_PORT is {port} in the environment: it must lie in 1 to 65535")
    return port


def _meet_through_mpi(ranks: Ranks, environ: Mapping[str, str]) -> Rendezvous:
    """Rank 0 chooses (its own environment first) and tells the others: a collective call of all ranks.

    mpirun passes most variables to processes on its own node only, so a rank cannot know from its own
    environment whether the others see the same address.
    """
    from mpi4py import MPI

    if (MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()) != (ranks.rank, ranks.world_size):
        raise InputError(
            f"mpi4py sees rank {MPI.COMM_WORLD.Get_rank()} of {MPI.COMM_WORLD.Get_size()}, "
            f"the launcher's variables say rank {ranks.rank} of {ranks.world_size}: "
            "install the mpi4py that was built for this mpirun"
        )
    chosen: tuple[str, int, str] | None = None
    if ranks.rank == 0:
        one_node = ranks.local_world_size == ranks.world_size
        address, port = environ.get("MASTER_ADDR", ""), _port(environ)
        source = "MPI" if not address or port is None else "rank 0's environment, told through MPI"
        chosen = (
            address or ("127.0.0.1" if one_node else socket.gethostname()),
            port or free_port(),
            source,
        )
    told = MPI.COMM_WORLD.bcast(chosen, root=0)
    return Rendezvous(address=told[0], port=told[1], source=told[2])


def slurm_port(job: int, step: int) -> int:
    """The same port for all ranks of a job's step, and most likely another one for those of other jobs."""
    return _SLURM_FIRST_PORT + (31 * job + step) % _SLURM_NUM_PORTS


def _meet_through_slurm(environ: Mapping[str, str]) -> Rendezvous:
    """Rank 0 runs on the step's first node; job and step number give all tasks the same port."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise InputError("SLURM_STEP_NODELIST is missing in the environment: set MASTER_ADDR and MASTER_PORT")
    job, step = _number(environ, "SLURM_JOB_ID") or 0, _number(environ, "SLURM_STEP_ID") or 0
    port = slurm_port(job, step)
    return Rendezvous(
        address=environ.get("MASTER_ADDR") or first_host(nodes), port=_port(environ) or port, source="Slurm"
    )


def export_ranks(ranks: Ranks, environ: MutableMapping[str, str]) -> Rendezvous:
    """Set what ``torch.distributed`` reads: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Under MPI this is a collective call: rank 0's address travels through ``mpi4py``, which is imported
    only then, unless `sparse-zero launch` has told it to all of them. Under torchrun and DeepSpeed's
    launcher the address is already there and is kept.

    Returns:
        Where the ranks meet, and who named the place.

    Raises:
        InputError: several ranks, and nobody names the address or the port.
    """
    address, port = environ.get("MASTER_ADDR"), _port(environ)
    is_mpi, told_all = ranks.launcher in ("openmpi", "mpich"), environ.get(TOLD_ALL) == "1"
    if is_mpi and not (told_all and address and port is not None):
        meeting = _meet_through_mpi(ranks, environ)
    elif address and port is not None:
        meeting = Rendezvous(address=address, port=port, source="the environment")
    elif ranks.launcher == "slurm":
        meeting = _meet_through_slurm(environ)
    elif ranks.world_size == 1:
        meeting = Rendezvous(address=address or "127.0.0.1", port=port or free_port(), source="a single process")
    else:
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise InputError(
            f"{missing} is missing in the environment of a world of {ranks.world_size}: "
            "set it, or start the ranks with deepspeed, torchrun, mpirun or srun"
        )
    environ["RANK"], environ["WORLD_SIZE"] = str(ranks.rank), str(ranks.world_size)
    environ["LOCAL_RANK"] = str(ranks.local_rank)
    if ranks.local_world_size is not None:
        environ["LOCAL_WORLD_SIZE"] = str(ranks.local_world_size)
    environ["MASTER_ADDR"], environ["MASTER_PORT"] = meeting.address, str(meeting.port)
    return meeting
