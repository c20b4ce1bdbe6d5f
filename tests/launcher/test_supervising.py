"""Is a lost rank noticed, the rest ended, and the run started again as often as it makes sense, and no more?"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launcher.commands.launch import cluster_of_start, overrides_of_start, write_hostfile
from launcher.config import parse_config
from launcher.run_folder import RunFolder
from launcher.starting.cluster_config import ClusterConfig
from launcher.starting.nodes import Limits, Node, Start, choose_nodes, limits_of, master_of, read_nodes, standing_by
from launcher.starting.supervising import Outcome, Supervisor, judge
from sparse_zero.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
A, B, C = Node("a", 2), Node("b", 2), Node("c", 4)


def outcome(code, ranks=(), *, number=0, lost=""):
    lost = lost or ("rank" if "lost" in ranks else "")
    return Outcome(code=code, ranks=dict(enumerate(ranks)), signal=number, lost=lost, step=None)


@pytest.mark.parametrize(
    ("ended", "code", "again"),
    [
        (outcome(0, [0, 0]), 0, False),
        (outcome(0), 0, False),
        # The launcher was killed, and says nothing of it.
        (outcome(0, ["running", "running"]), 75, True),
        (outcome(0, [0, "running"]), 75, True),
        # Wrong input and an error that a rank names would come again, whatever the launcher says (torchrun says 1).
        (outcome(1, [2, 2]), 2, False),
        (outcome(2), 2, False),
        (outcome(143, [2, 143]), 2, False),
        (outcome(1, [1, 1]), 1, False),
        (outcome(0, [1, 1]), 1, False),
        # A stop that all agreed on; one that one rank was sent because another was killed.
        (outcome(1, [143, 143]), 143, False),
        (outcome(138, [138, 138]), 138, False),
        (outcome(143, [143, "lost"]), 75, True),
        (outcome(0, [0, 0], number=signal.SIGINT), 130, False),
        (outcome(None, ["running", "lost"], number=signal.SIGTERM), 143, False),
        # Losses: -9 is 247 to a launcher; the others say that they have lost one, or hang.
        (outcome(247, [75, "lost"]), 75, True),
        (outcome(1, [75, "lost"]), 1, True),
        (outcome(75, [75, 75]), 75, True),
        (outcome(None, ["running", "lost"]), 75, True),
        (outcome(None, [75, "running"], lost="node b was lost"), 75, True),
        (outcome(0, ["lost", 0]), 75, True),
        # The launcher itself failed.
        (outcome(7), 7, True),
        (outcome(-9), 75, True),
    ],
)
def test_what_is_started_again(ended, code, again):
    assert judge(ended) == (code, again)


@pytest.mark.parametrize(
    ("answering", "least", "most", "chosen"),
    [
        ([A, B, C], 4, 4, (A, B)),
        ([A, B, C], 1, 8, (A, B, C)),
        ([A, C], 4, 4, ()),
        ([A, C], 2, 4, (A,)),
        ([C], 4, 4, (C,)),
        ([B], 2, 4, (B,)),
        ([B], 3, 4, ()),
        ([], 1, 4, ()),
    ],
)
def test_nodes_are_taken_in_order_within_the_limits(answering, least, most, chosen):
    assert choose_nodes(answering, Limits(least=least, most=most)) == chosen


def cluster(**settings):
    return ClusterConfig(**{"launcher": "pdsh", "hostfile": "hosts", **settings})


def test_limits_are_those_of_the_first_nodes_unless_given():
    nodes = [A, B, C]
    assert limits_of(cluster(num_nodes=2), nodes) == Limits(least=4, most=4)
    assert limits_of(cluster(num_nodes=2, min_world_size=1), nodes) == Limits(least=1, most=4)
    assert limits_of(cluster(num_nodes=2, max_world_size=8), nodes) == Limits(least=4, most=8)
    with pytest.raises(InputError, match="num_nodes is 4, and hosts has 3 nodes"):
        limits_of(cluster(num_nodes=4), nodes)
    with pytest.raises(InputError, match=r"a: 2 ranks, b: 2 ranks\) has between 3 and 3 ranks"):
        limits_of(cluster(num_nodes=2, min_world_size=3, max_world_size=3), [A, B])


def test_the_rendezvous_moves_with_the_first_node():
    def start(first, **addresses):
        return Start(nodes=(first,), restarts=0, record="/r", addresses=addresses)

    named = cluster(master_address="10.0.0.1")
    both = {"ib0": "10.1.0.2", "eth0": "10.0.0.2"}
    assert master_of(named, A, start(A, a=both)) == "10.0.0.1"
    assert master_of(named, A, start(B, b=both)) == "10.1.0.2"
    assert master_of(cluster(network_interface="eth0"), A, start(A, a=both)) == "10.0.0.2"
    # A node that tells none is called by its name.
    assert master_of(cluster(), A, start(Node("me@b", 1))) == "b"


def test_hostfile(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two\n\na slots=2\n b.example-1   slots=2 max_slots=4\n")
    named = cluster(hostfile=str(hosts))
    assert read_nodes(named) == [A, Node("b.example-1", 2)]
    for content, said in {
        "": "names no node",
        "a slots=2\na slots=2\n": "names a twice: remove line 2",
        "a\n": "line 1 is 'a'",
        "a slots=0\n": "line 1 is",
        "-oProxyCommand=touch slots=2\n": "line 1 is",
        "bob@a:22 slots=2\n": "the port of all nodes as cluster.ssh_port",
        "$(touch x) slots=2\n": "line 1 is",
        "a;touch slots=2\n": "line 1 is",
        "a slots=2`touch x`\n": "line 1 is",
    }.items():
        hosts.write_text(content)
        with pytest.raises(InputError, match=r"cluster\.hostfile") as error:
            read_nodes(named)
        assert said in str(error.value)
    with pytest.raises(InputError, match="is no file"):
        read_nodes(cluster(hostfile=str(tmp_path)))


def test_what_is_said_of_nodes_that_stand_by():
    named = cluster(num_nodes=1)
    assert standing_by(named, [A], [A]) is None
    assert standing_by(named, [A, B], [A]) == (
        "1 of 2 nodes of hosts are used (cluster.num_nodes is 1); standing by: b"
    )
    assert "(cluster.max_world_size is 2)" in (standing_by(cluster(max_world_size=2), [A, B], [A]) or "")


def test_nodes_are_included_and_excluded_by_name():
    lines = ("a slots=2", "b slots=2", "c slots=4  # the large one")

    def names(**changes):
        return [node.name for node in read_nodes(ClusterConfig(launcher="pdsh", hosts=lines, **changes))]

    assert names() == ["a", "b", "c"]
    assert names(include=("c", "a")) == ["a", "c"]
    assert names(exclude=("a",)) == ["b", "c"]
    with pytest.raises(
        InputError, match=r"cluster\.exclude names 'aa', which is no node of the cluster: did you mean a"
    ):
        names(exclude=("aa",))
    with pytest.raises(InputError, match="leave no node"):
        names(include=("a",), exclude=("a",))
    with pytest.raises(InputError, match=r"cluster\.hosts, entry 2 is 'b'"):
        read_nodes(ClusterConfig(launcher="pdsh", hosts=("a slots=1", "b")))


def run_config(folder, **changes):
    return parse_config(
        {
            "model": {"name_or_path": "m"},
            "data": {"train": "d.json"},
            "selection": {"regions": [{"kind": "row", "modules": ["*"], "per_matrix": 1}]},
            "training": {"steps": 1},
            "zero": {},
            "output": {"folder": str(folder)},
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("resume", "restarts", "added"),
    [
        ("auto", 0, []),
        ("auto", 1, []),
        # By now there is what the run itself has written.
        ("never", 0, []),
        ("never", 1, ["--checkpoint.resume=auto"]),
        ("{here}/checkpoints/step-000003", 0, []),
        ("{here}/checkpoints/step-000003", 1, ["--checkpoint.resume=auto"]),
        # Another run's is where this one began, until it has written one.
        ("{here}/../other/checkpoints/step-000003", 1, []),
    ],
)
def test_a_restart_continues_from_the_runs_own_checkpoints(tmp_path, resume, restarts, added):
    config = run_config(tmp_path, checkpoint={"resume": resume.format(here=tmp_path)})
    start = Start(nodes=(A,), restarts=restarts, record="/r")
    assert overrides_of_start(config, start) == added


def test_a_start_on_other_nodes_has_their_hostfile_and_address(tmp_path):
    section = {"launcher": "pdsh", "hostfile": "hosts", "num_nodes": 2, "master_address": "10.0.0.1"}
    config = run_config(tmp_path, cluster={**section, "min_world_size": 2})
    start = Start(nodes=(B, C), restarts=1, record="/r")
    found = cluster_of_start(config, [A, B, C], start)
    assert (found.num_nodes, found.master_address) == (2, "b")
    hosts = tmp_path / "hosts"
    write_hostfile(hosts, start.nodes, ClusterConfig(launcher="pdsh", hosts=("a slots=1",), ssh_user="me"))
    # pdsh has the user with the name; mpirun has ssh told.
    assert hosts.read_text() == "me@b slots=2\nme@c slots=4\n"
    write_hostfile(hosts, start.nodes, ClusterConfig(launcher="openmpi", hosts=("a slots=1",), ssh_user="me"))
    assert hosts.read_text() == "b slots=2\nc slots=4\n"


# --- real processes ------------------------------------------------------------------------------------------

# A launcher that starts ranks in a session of their own, where no signal to its group reaches them, and waits; when
# one fails it ends with its code and leaves the others, as pdsh does.
LAUNCHER = """
import os, subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, sys.argv[1], *sys.argv[2:]], env={**os.environ, "RANK": str(rank)},
    start_new_session=True) for rank in range(2)]
while True:
    codes = [rank.poll() for rank in ranks]
    failed = [code for code in codes if code]
    if failed or None not in codes:
        sys.exit(failed[0] % 256 if failed else 0)
    time.sleep(0.02)
"""
# A rank that writes checkpoints and does what its start is told to: starts are counted in a file.
RANK = """
import os, signal, sys, time
from pathlib import Path
from launcher.starting.node_guard import write_exit_record
record, folder = sys.argv[1].partition("=")[2], Path(sys.argv[2])
rank = os.environ["RANK"]
(folder / f"pid-{rank}").write_text(str(os.getpid()))
starts = len(list(folder.glob(f"start-*-{rank}"))) + 1
(folder / f"start-{starts}-{rank}").touch()
plan = (folder / "plan").read_text().split()
what = plan[min(starts, len(plan)) - 1]
def stop(number, frame):
    write_exit_record(record, 128 + number)
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
if what.startswith("checkpoint"):
    checkpoint = folder / "checkpoints" / f"step-{starts:06d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "manifest.json").touch()
    what = what.removeprefix("checkpoint-")
time.sleep(0.8)  # A guard looks twice a second.
if what == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if what in ("kill", "wait"):
    time.sleep(600)
write_exit_record(record, int(what))
sys.exit(int(what))
"""


@pytest.fixture
def programs(tmp_path):
    """The programs above, in a folder; what they started is gone afterwards."""
    (tmp_path / "starter.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK)
    yield tmp_path
    for process in left_over(tmp_path):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def left_over(folder):
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if str(folder / "rank.py") in (process.info["cmdline"] or [])]


def starts(folder):
    return len(list(folder.glob("start-*-0")))


def supervisor(folder, plan, **settings):
    (folder / "plan").write_text(plan)

    def command(start):
        record = f"--exit_record={start.record}"
        return [sys.executable, str(folder / "starter.py"), str(folder / "rank.py"), record, str(folder)]

    section = ClusterConfig(node_timeout=1.0, **settings)
    return Supervisor([Node("here", 2)], Limits(least=2, most=2), section, command, RunFolder(folder))


@pytest.fixture(autouse=True)
def _finds_the_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_a_lost_rank_ends_the_others_and_restarts_are_counted_since_the_last_checkpoint(programs, capfd):
    (programs / "checkpoints" / "step-000000").mkdir(parents=True)  # No whole one.
    assert supervisor(programs, "checkpoint-kill kill 0", max_restarts=1).run() == 75
    output = capfd.readouterr().err
    assert starts(programs) == 2
    assert not left_over(programs)
    said = [line for line in output.splitlines() if line.startswith("sparse-zero: ")]
    assert said == [
        "sparse-zero: rank 1 ended unexpectedly; restart 1 of 1",
        "sparse-zero: starting again with 2 ranks, from the checkpoint of step 1",
        "sparse-zero: rank 1 ended unexpectedly; not started again (after 1 restarts without a new checkpoint)",
    ]


@pytest.mark.slow
def test_a_run_that_writes_new_checkpoints_is_started_again_and_again(programs, capfd):
    plan = "kill checkpoint-kill checkpoint-kill checkpoint-kill 0"
    assert supervisor(programs, plan, max_restarts=1).run() == 0
    assert starts(programs) == 5
    output = capfd.readouterr().err
    assert output.count("restart 1 of 1") == 4
    assert "from the beginning" in output
    assert "from the checkpoint of step 4" in output


def test_what_would_happen_again_is_not_started_again(programs):
    assert supervisor(programs, "2", max_restarts=3).run() == 2
    assert starts(programs) == 1


def wait_for_ranks(folder):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not all((folder / f"pid-{rank}").exists() for rank in range(2)):
        time.sleep(0.02)
    time.sleep(1.2)  # A guard looks twice a second.


def test_a_signal_lets_the_ranks_end_by_themselves_and_is_no_reason_to_start_again(programs):
    def interrupt():
        wait_for_ranks(programs)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert supervisor(programs, "wait", max_restarts=3).run() == 128 + signal.SIGUSR1
    thread.join()
    assert starts(programs) == 1
    assert not left_over(programs)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_nothing_outlives_a_launcher_that_is_killed(programs):
    pid = os.fork()
    if not pid:  # pragma: no cover
        supervisor(programs, "wait").run()
        os._exit(0)
    wait_for_ranks(programs)
    assert len(left_over(programs)) == 3
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 15
    while left_over(programs) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left_over(programs)
