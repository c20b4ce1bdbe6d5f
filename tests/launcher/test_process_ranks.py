"""Is every launcher understood, and every contradiction refused?"""

import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace

import pytest

from launcher.process_ranks import Ranks, Rendezvous, export_ranks, find_ranks, first_host
from sparse_zero.errors import InputError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "6", "SLURM_NTASKS": "7", "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}  # fmt: skip
# What a batch script, not started by srun, sees on its first node.
SLURM_BATCH = {
    "SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[1-2]",
}  # fmt: skip


def _ranks(rank: int, world_size: int, local_rank: int, local_world_size: int | None, launcher: str) -> Ranks:
    return Ranks(
        rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size,
        launcher=launcher,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, _ranks(0, 1, 0, 1, "none")),
        (TORCHRUN, _ranks(5, 16, 5, 8, "torchrun")),
        (DEEPSPEED, _ranks(3, 4, 1, 2, "environment")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, _ranks(0, 1, 0, 1, "environment")),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, _ranks(1, 2, 1, None, "environment")),
        (OPENMPI, _ranks(2, 4, 0, 2, "openmpi")),
        (MPICH, _ranks(1, 2, 1, 2, "mpich")),
        (SLURM, _ranks(6, 7, 2, 3, "slurm")),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),1"}, _ranks(6, 7, 2, 3, "slurm")),
        (SLURM_BATCH, _ranks(0, 1, 0, 1, "none")),
        (SLURM_BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, _ranks(0, 1, 0, 1, "none")),
        # A cluster that exports a world size of one to everything, or empty strings.
        ({"WORLD_SIZE": "1"}, _ranks(0, 1, 0, 1, "none")),
        ({"RANK": "", "WORLD_SIZE": " "}, _ranks(0, 1, 0, 1, "none")),
    ],
)
def test_each_launcher_is_read(environ: Mapping[str, str], expected: Ranks) -> None:
    before = dict(environ)
    assert find_ranks(environ) == expected
    assert environ == before


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        # The same world, told twice: the first source in the order counts.
        (DEEPSPEED | {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, "environment"),
        # srun started mpirun's daemons, one a node; mpirun started the ranks.
        (OPENMPI | SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "openmpi"),
        # srun started one torchrun a node, whose rendezvous numbered the nodes its own way.
        (TORCHRUN | SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "torchrun"),
        (
            TORCHRUN | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"} | SLURM | {"SLURM_STEP_NUM_TASKS": "16"},
            "torchrun",
        ),
        # An interactive shell that srun opened.
        (DEEPSPEED | SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "environment"),
        # DeepSpeed's MPICH runner exports the world size, and leaves the rank to MPI.
        (MPICH | {"WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, "mpich"),
        (DEEPSPEED | SLURM_BATCH, "environment"),
    ],
)
def test_launchers_that_start_launchers_agree(environ: Mapping[str, str], expected: str) -> None:
    assert find_ranks(environ).launcher == expected


def test_a_missing_local_rank_comes_from_a_source_of_the_same_rank() -> None:
    # Set by hand in a task of srun, without a local rank.
    environ = {"RANK": "6", "WORLD_SIZE": "7"} | SLURM
    assert find_ranks(environ) == _ranks(6, 7, 2, 3, "environment")


def test_tasks_of_srun_need_no_mpi_where_slurm_sets_the_variables_of_pmi() -> None:
    environ = {"PMI_RANK": "6", "PMI_SIZE": "7"} | SLURM
    ranks = find_ranks(environ)
    assert ranks == _ranks(6, 7, 2, 3, "slurm")
    assert export_ranks(ranks, environ).source == "Slurm"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "0"}, r"WORLD_SIZE is 0: a world needs at least one rank"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, r"WORLD_SIZE is -1"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, r"RANK is 2 in a world of 2 \(WORLD_SIZE\)"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, r"RANK is -1"),
        (OPENMPI | {"OMPI_COMM_WORLD_RANK": "4"}, r"OMPI_COMM_WORLD_RANK is 4 in a world of 4"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, r"LOCAL_RANK is 2 in a world of 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, r"LOCAL_WORLD_SIZE is 4 with local rank 5"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, r"RANK is 'one' in the environment: it must be a whole number"),
        ({"RANK": "1"}, r"WORLD_SIZE is missing"),
        ({"WORLD_SIZE": "2"}, r"RANK is missing"),
        ({"PMI_RANK": "1"}, r"PMI_SIZE is missing"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, r"LOCAL_RANK is missing in a world of 2"),
        # A rank left over from another launch.
        (OPENMPI | {"RANK": "1"}, r"contradicts itself: OMPI_COMM_WORLD_RANK=2 .*RANK=1 WORLD_SIZE=None"),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"} | OPENMPI | {"OMPI_COMM_WORLD_RANK": "0"},
            r"RANK=1 WORLD_SIZE=4, but OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4; unset",
        ),
        # Four processes that would each believe to be alone.
        ({"RANK": "0", "WORLD_SIZE": "1"} | OPENMPI, r"RANK=0 WORLD_SIZE=1, but OMPI_COMM_WORLD_RANK=2"),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"} | SLURM, r"PMI_RANK=0 PMI_SIZE=1, but SLURM_PROCID=6"),
    ],
)
def test_bad_environments_are_refused_in_one_line(environ: Mapping[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        find_ranks(environ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"), ("a,b", "a"), ("gpu[007-009,12],big1", "gpu007"), ("n[3]", "n3"), ("r[1-2]-ib,x", "r1-ib"),
        ("a.b-c[10,11]", "a.b-c10"),
    ],
)  # fmt: skip
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "[1-2]", "a[", "a b"])
def test_unreadable_node_lists_are_refused(nodes: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        first_host(nodes)


def test_a_launcher_that_named_the_place_is_kept() -> None:
    environ = dict(TORCHRUN)
    meeting = export_ranks(find_ranks(environ), environ)
    assert meeting == Rendezvous(address="node1", port=29500, source="the environment")
    assert environ == TORCHRUN


def test_a_single_process_meets_itself() -> None:
    environ: dict[str, str] = {}
    meeting = export_ranks(find_ranks(environ), environ)
    assert (meeting.address, meeting.source) == ("127.0.0.1", "a single process")
    assert 1024 <= meeting.port <= 65535
    assert environ == {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(meeting.port),
    }  # fmt: skip


def test_slurm_tasks_agree_without_talking() -> None:
    meetings = []
    for rank in (0, 6):
        environ = SLURM | {
            "SLURM_PROCID": str(rank),
            "SLURM_NODEID": str(rank // 4),
            "SLURM_LOCALID": str(rank % 4),
        }
        meetings.append(export_ranks(find_ranks(environ), environ))
        assert environ["RANK"] == str(rank)
    assert meetings[0] == meetings[1]
    assert (meetings[0].address, meetings[0].source) == ("gpu007", "Slurm")
    assert 15000 <= meetings[0].port < 30000
    other = SLURM | {"SLURM_STEP_ID": "1"}
    assert export_ranks(find_ranks(other), other).port != meetings[0].port, "two steps of a job do not collide"


@pytest.mark.parametrize(("port", "missing"), [(None, "MASTER_ADDR"), ("29500", "MASTER_ADDR")])
def test_a_world_without_a_place_is_refused(port: str | None, missing: str) -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | ({"MASTER_PORT": port} if port else {})
    before = dict(environ)
    with pytest.raises(InputError, match=f"{missing} is missing in the environment of a world of 2"):
        export_ranks(find_ranks(environ), environ)
    assert environ == before


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_bad_port_is_refused(port: str) -> None:
    environ = TORCHRUN | {"MASTER_PORT": port}
    with pytest.raises(InputError, match="MASTER_PORT is"):
        export_ranks(find_ranks(environ), environ)


def _pretend_mpi(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, told: tuple[str, int, str] | None) -> None:
    """Put an mpi4py in place whose broadcast answers ``told``, or what rank 0 sends."""
    world = SimpleNamespace(
        Get_rank=lambda: rank,
        Get_size=lambda: size,
        bcast=lambda value, root: value if rank == root else told,
    )
    module = ModuleType("mpi4py")
    module.MPI = SimpleNamespace(COMM_WORLD=world)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", module)


def test_mpi_ranks_take_the_place_that_rank_0_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_mpi(monkeypatch, 2, 4, ("head", 4242, "MPI"))
    environ = OPENMPI | {"MASTER_ADDR": "left-over"}
    assert export_ranks(find_ranks(environ), environ) == Rendezvous(address="head", port=4242, source="MPI")
    assert environ["MASTER_ADDR"] == "head"
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("2", "4", "0")


@pytest.mark.parametrize(("local_size", "address"), [("4", "127.0.0.1"), ("2", "head")])
def test_mpi_rank_0_chooses(monkeypatch: pytest.MonkeyPatch, local_size: str, address: str) -> None:
    _pretend_mpi(monkeypatch, 0, 4, None)
    monkeypatch.setattr("socket.gethostname", lambda: "head")
    environ = OPENMPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": local_size}
    meeting = export_ranks(find_ranks(environ), environ)
    assert (meeting.address, meeting.source) == (address, "MPI")
    named = OPENMPI | {"OMPI_COMM_WORLD_RANK": "0", "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "1234"}
    meeting = export_ranks(find_ranks(named), named)
    assert (meeting.address, meeting.port) == ("10.1.1.1", 1234)
    assert meeting.source == "rank 0's environment, told through MPI"


def test_an_mpi4py_of_another_mpi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_mpi(monkeypatch, 0, 1, None)
    with pytest.raises(InputError, match="mpi4py sees rank 0 of 1, the launcher's variables say rank 2 of 4"):
        export_ranks(find_ranks(OPENMPI), dict(OPENMPI))


def test_mpi4py_is_imported_for_mpi_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for source in (TORCHRUN, DEEPSPEED, SLURM, {}):
        environ = dict(source)
        export_ranks(find_ranks(environ), environ)
    with pytest.raises(ImportError):
        export_ranks(find_ranks(OPENMPI), dict(OPENMPI))
