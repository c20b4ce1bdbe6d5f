"""How does a run survive a lost rank or node: who notices, what is ended, where does it start again?

On every node a guard (:mod:`launcher.starting.node_guard`) tells twice a second how the ranks are; the launchers
themselves stay DeepSpeed's and torch's. A rank that ended without a code of its own was lost (killed, or an error
nobody expected), and so was a node whose guard has been silent for ``cluster.node_timeout``. Then all that is left is
ended on all nodes, and the run starts again on the nodes that answer, from its newest checkpoint.

Not started again: a run that ended by a signal, or with a code that says that it would happen again (wrong input, a
loss that is not finite). DeepSpeed has no elastic agent any more (its config says "Elastic training has been removed"),
and torch's starts everything anew whatever the code was, and needs an agent on every node.
"""

import difflib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.process_ranks import OF_ONE_RANK
from launcher.starting import node_guard
from launcher.starting.cluster_config import ClusterConfig
from launcher.starting.command_line import ssh_options
from launcher.stopping import EXIT_ERROR, EXIT_INPUT, EXIT_LOST, EXIT_SIGNAL, SECOND_INTERRUPT_SECONDS, SIGNALS
from sparse_zero.errors import InputError

# Time for the workers to write a checkpoint and end, after a signal.
_GRACE_SECONDS = 120.0
# A guard is sent a line a second; kills take up to ten.
_BEAT_SECONDS, _END_SECONDS, _LOOK_SECONDS = 1.0, 15.0, 0.05
# What DeepSpeed's launcher forwards of its own accord begins with these.
_TOLD_BY_DEEPSPEED = ("MLFLOW", "NCCL", "PYTHON", "MV2", "UCX", "CUDA")


def environment_of_start(environ: Mapping[str, str], cluster: ClusterConfig) -> dict[str, str]:
    """What of the environment the launcher gets that starts the ranks.

    DeepSpeed writes variables with some beginnings on the command lines of other nodes, and these into its log. What
    ranks need they get in another way (see :mod:`launcher.starting.start_files`), so that only PYTHONPATH is left.

    Args:
        environ: of this process.
        cluster: the run's section.
    """
    told = _TOLD_BY_DEEPSPEED if cluster.reaches_nodes else ()
    found = {
        name: value
        for name, value in environ.items()
        # What a surrounding launcher has told this process is not for the ranks that it starts.
        if not OF_ONE_RANK.fullmatch(name) and (name == "PYTHONPATH" or not name.startswith(told))
    }
    if cluster.reaches_nodes:  # DeepSpeed's own file of variables, too, goes to command lines.
        found["DS_ENV_FILE"] = os.devnull
    ssh = ssh_options(cluster)
    if cluster.launcher == "mpich" and ssh:
        found["HYDRA_LAUNCHER_EXTRA_ARGS"] = " ".join(ssh)
    return found


# From the name of a node, and a command as an argument list, to the argument list that runs it on that node.
Reach = Callable[[str, Sequence[str]], list[str]]


@dataclass(frozen=True)
class Node:
    """A machine and the ranks that it takes."""

    name: str
    slots: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the command of one start is made from."""

    nodes: tuple[Node, ...]
    # Restarts before this one, over the whole run.
    restarts: int
    # For the ranks' config and environment, and their exit codes, on every node.
    record: str
    # Of each node by name: IPv4 addresses by interface.
    addresses: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def read_nodes(cluster: ClusterConfig) -> list[Node]:
    """The nodes that ``cluster`` names, in their order.

    Raises:
        InputError: the hostfile cannot be read, has a line that is not ``name slots=N``, names a node twice, or none;
            or nodes are included or excluded that are not there, or none is left.
    """
    if cluster.hostfile is not None:
        nodes = _read_hostfile(Path(cluster.hostfile))
    else:
        nodes = _parse_nodes(cluster.hosts, "cluster.hosts", "entry")
    names = [node.name for node in nodes]
    for name in ("include", "exclude"):
        for each in getattr(cluster, name):
            if each not in names:
                nearest = difflib.get_close_matches(each, names, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(names)}"
                raise InputError(f"cluster.{name} names {each!r}, which is no node of the cluster: {hint}")
    left = [
        node for node in nodes
        if node.name not in cluster.exclude and (not cluster.include or node.name in cluster.include)
    ]  # fmt: skip
    if not left:
        raise InputError("cluster.include and cluster.exclude leave no node: change one of them")
    return left


def _read_hostfile(path: Path) -> list[Node]:
    if not path.is_file():
        raise InputError(f"cluster.hostfile is {path}, which is no file: it needs a line 'name slots=8' a node")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cluster.hostfile is {path}, which cannot be read ({error}): check the file") from error
    return _parse_nodes(lines, f"cluster.hostfile {path}", "line")


def _parse_nodes(lines: Sequence[str], source: str, unit: str) -> list[Node]:
    nodes: list[Node] = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9_][\w.:@-]*)\s+slots=(\d+)(?:\s.*)?", line, re.ASCII)
        if match is None or not int(match[2]):
            raise InputError(f"{source}, {unit} {number} is {line!r}: write 'name slots=8'")
        if match[1] in [node.name for node in nodes]:
            raise InputError(f"{source} names {match[1]} twice: remove {unit} {number}")
        nodes.append(Node(match[1], int(match[2])))
    if not nodes:
        raise InputError(f"{source} names no node: it needs a line 'name slots=8' for each")
    return nodes


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many ranks a start may have."""

    least: int
    most: int


def _source(cluster: ClusterConfig) -> str:
    """Where the nodes are named."""
    if cluster.launcher == "slurm":
        return "the allocation"
    return cluster.hostfile or ("cluster.hosts" if cluster.hosts else "this machine")


def limits_of(cluster: ClusterConfig, nodes: Sequence[Node]) -> Limits:
    """The limits of a run whose hostfile has these nodes.

    Raises:
        InputError: the hostfile has fewer nodes than ``cluster.num_nodes``, or the limits leave out the first start.
    """
    if cluster.num_nodes > len(nodes):
        raise InputError(
            f"cluster.num_nodes is {cluster.num_nodes}, and {_source(cluster)} has {len(nodes)} "
            "nodes: add nodes or lower it"
        )
    usual = sum(node.slots for node in nodes[: cluster.num_nodes])
    most = usual if cluster.max_world_size is None else cluster.max_world_size
    least = min(usual, most) if cluster.min_world_size is None else cluster.min_world_size
    if not choose_nodes(nodes, Limits(least=least, most=most)):
        raise InputError(
            f"no choice of whole nodes ({', '.join(f'{node.name}: {node.slots} ranks' for node in nodes)}) has between "
            f"{least} and {most} ranks: change cluster.min_world_size or cluster.max_world_size"
        )
    return Limits(least=least, most=most)


def choose_nodes(answering: Sequence[Node], limits: Limits) -> tuple[Node, ...]:
    """The first nodes that together have no more than the most ranks; none where they are fewer than the least."""
    chosen: list[Node] = []
    for node in answering:
        if sum(each.slots for each in [*chosen, node]) <= limits.most:
            chosen.append(node)
    return tuple(chosen) if sum(node.slots for node in chosen) >= limits.least else ()


def master_of(cluster: ClusterConfig, usual: Node, start: Start) -> str:
    """Address of the rendezvous: the config's while its node is the first one, else one of the node that is."""
    if cluster.master_address is not None and start.nodes[0] == usual:
        return cluster.master_address
    found = start.addresses.get(start.nodes[0].name, {})
    if cluster.launcher == "slurm" and cluster.network_interface is None:
        return start.nodes[0].name
    if cluster.network_interface is not None and cluster.network_interface in found:
        return found[cluster.network_interface]
    return next(iter(found.values()), start.nodes[0].name.rpartition("@")[2])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a start ended."""

    # Exit code of the launcher that was started; None if it had to be killed.
    code: int | None
    # Of each rank seen: its exit code, "lost" without one, or "running" where it was ended with the others.
    ranks: Mapping[int, int | str]
    # The first signal that this process received; 0 if none.
    signal: int
    # What was lost, in words; empty if nothing was seen.
    lost: str
    # The newest checkpoint that any node has after it.
    step: int | None


def judge(outcome: Outcome) -> tuple[int, bool]:
    """(exit code of the whole, whether another start may do better)."""
    codes = [state for state in outcome.ranks.values() if isinstance(state, int)]
    if outcome.signal:
        return EXIT_SIGNAL + outcome.signal, False
    if outcome.code == 0 and not outcome.lost and not any(codes) and "running" not in outcome.ranks.values():
        return 0, False
    if EXIT_INPUT in codes or (outcome.code == EXIT_INPUT and not outcome.ranks):
        return EXIT_INPUT, False
    # Where one was lost, the others say an error as well, or were stopped for its sake.
    if not outcome.lost and codes:
        if EXIT_ERROR in codes:
            return EXIT_ERROR, False
        if min(codes) > EXIT_SIGNAL:  # All agreed on it, as when a batch system signals every process.
            return min(codes), False
    # Nobody knows what happened: the launcher's code, unless it only says how a process was killed.
    return (outcome.code if outcome.code and 0 < outcome.code < EXIT_SIGNAL else EXIT_LOST), True


class Guard:
    """The connection to the guard of one node.

    Args:
        node: where it runs.
        remote: from a node's name and a command to one that runs it there, such as ssh; None for this machine.
        setup: its first line.
    """

    def __init__(self, node: Node, remote: Reach | None, setup: Mapping[str, Any]) -> None:
        self.node = node
        command = [sys.executable, str(Path(node_guard.__file__))]
        if remote is not None:
            command = remote(node.name, command)
        # Its own session: a Ctrl-C in the terminal is for this process, which tells the others.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self.heard = self._beaten = time.monotonic()
        self.report: dict[str, Any] | None = None
        # Of the newest checkpoint that its node sees, as told first and last.
        self.step: int | None = None
        # IPv4 addresses of its node, by interface.
        self.addresses: dict[str, str] = {}
        self.errors = ""
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()
        self.send(json.dumps(setup))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # What a login script prints.
                report = json.loads(line)
                if isinstance(report, dict) and "ranks" in report:
                    self.step = report.get("step", self.step)
                    self.addresses = report.get("addresses", self.addresses)
                    self.report, self.heard = report, time.monotonic()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.errors = line.decode(errors="replace").strip() or self.errors

    def send(self, word: str) -> None:
        """One line to the guard; nothing where it is gone."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(word.encode() + b"\n")
            self._process.stdin.flush()

    def beat(self) -> None:
        """A sign of life, if the last one was long enough ago."""
        if time.monotonic() - self._beaten >= _BEAT_SECONDS:
            self._beaten = time.monotonic()
            self.send("beat")

    @property
    def is_gone(self) -> bool:
        """Whether the connection has ended."""
        return self._process.poll() is not None

    def silent_for(self) -> float:
        """Seconds since the last report."""
        return time.monotonic() - self.heard

    def close(self, deadline: float) -> None:
        """Wait for its last report until a time of the monotonic clock, and end the connection."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join(1.0)
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        # A child of ssh may hold the others open: closing one would wait for the thread that reads it.
        for thread, pipe in zip(self._threads, (self._process.stdout, self._process.stderr), strict=True):
            assert pipe is not None
            if not thread.is_alive():
                with suppress(OSError):
                    pipe.close()


def _say(text: str) -> None:
    with suppress(OSError):  # The terminal may be gone.
        print(f"sparse-zero: {text}", file=sys.stderr, flush=True)


class Supervisor:
    """Starts a run, watches it, and starts it again.

    Args:
        nodes: all that may take part, the usual ones first.
        limits: of the number of ranks.
        cluster: the run's section.
        command: of one start, as an argument list; its ranks get the record folder as ``--exit_record``.
        checkpoints: the run's folder of them, for counting restarts.
        remote: see :class:`Guard`; None where the only node is this machine.
        files: name and content of what every node's ranks get in their record folder.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        limits: Limits,
        cluster: ClusterConfig,
        command: Callable[[Start], Sequence[str]],
        checkpoints: Path,
        remote: Reach | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        self._nodes, self._limits, self._cluster = tuple(nodes), limits, cluster
        self._command, self._checkpoints, self._remote = command, checkpoints, remote
        self._files = dict(files or {})
        # Of all starts, the last one's last: their folders on every node.
        self._records: list[str] = []
        # The first signal, 0 while none has come; when it came; whether a user cannot wait.
        self._signal, self._since, self._hurry = 0, 0.0, False

    def run(self) -> int:
        """Start until the run is done, or it makes no sense to start again; the exit code.

        Raises:
            InputError: too few nodes answer at the first start.
        """
        restarts = in_a_row = 0
        code = EXIT_ERROR
        with self._handling_signals():
            while True:
                guards = self._guards(first=not restarts)
                if self._signal:
                    self._end(guards)
                    return EXIT_SIGNAL + self._signal
                if not guards:
                    return code
                nodes = tuple(guard.node for guard in guards)
                step = _newest_step(guards)
                if restarts:
                    place = f" on {', '.join(node.name for node in nodes)}" if self._remote else ""
                    since = "from the beginning" if step is None else f"from the checkpoint of step {step}"
                    _say(f"starting again with {sum(node.slots for node in nodes)} ranks{place}, {since}")
                try:
                    outcome = self._attempt(guards, restarts)
                finally:
                    self._end(guards)
                outcome = self._with_last_reports(outcome, guards)
                code, may_do_better = judge(outcome)
                if not may_do_better:
                    return code
                in_a_row = 0 if outcome.step is not None and outcome.step > (step or 0) else in_a_row
                what = outcome.lost or f"the launcher ended with code {outcome.code}"
                if in_a_row >= self._cluster.max_restarts:
                    why = (
                        "cluster.max_restarts is 0"
                        if not in_a_row
                        else f"after {in_a_row} restarts without a new checkpoint"
                    )
                    _say(f"{what}; not started again ({why})")
                    return code
                restarts, in_a_row = restarts + 1, in_a_row + 1
                _say(f"{what}; restart {in_a_row} of {self._cluster.max_restarts}")

    # --- nodes -----------------------------------------------------------------------------------------------

    def _guards(self, *, first: bool) -> list[Guard]:
        """Guards on the nodes that a start is made on; none where too few answer at a restart.

        A guard that reports is the answer, and what was started on its node before is gone by then.
        """
        deadline = time.monotonic() + (0.0 if first else self._cluster.node_timeout)
        while True:
            guards, silent = self._ask()
            if self._signal:
                self._end(guards)
                return []
            chosen = choose_nodes([guard.node for guard in guards], self._limits)
            self._end([guard for guard in guards if guard.node not in chosen])
            told = "; ".join(f"{name}: {why}" for name, why in silent.items())
            if chosen:
                if silent:
                    _say(f"nodes that do not answer are left out ({told})")
                return [guard for guard in guards if guard.node in chosen]
            if first:
                raise InputError(
                    f"nodes of cluster.hostfile do not answer ({told}): start them, take them out of it, or set "
                    "cluster.min_world_size to begin with fewer"
                )
            if self._signal or time.monotonic() > deadline:
                ranks = sum(guard.node.slots for guard in guards)
                _say(
                    f"not started again: nodes with {ranks} ranks answer, {self._limits.least} are needed at least "
                    f"(cluster.min_world_size); no answer from {told}"
                )
                return []
            time.sleep(1.0)

    def _ask(self) -> tuple[list[Guard], dict[str, str]]:
        """Start guards on all nodes in parallel: those that report in time, and why others do not."""
        # Other nodes need not have this one's TMPDIR.
        temporary = "/tmp" if self._remote else tempfile.gettempdir()
        self._records.append(f"{temporary}/sparse-zero-{uuid.uuid4().hex}")
        setup = {
            "record": self._records[-1],
            "before": self._records[:-1],
            "checkpoints": str(self._checkpoints.absolute()),
            # Here, nothing can be cut off but the pipe, and a stopped job is no reason to end it.
            "silence": self._cluster.node_timeout if self._remote else None,
            "files": self._files,
        }
        guards = [Guard(node, self._remote, setup) for node in self._nodes]
        deadline = time.monotonic() + self._cluster.node_timeout
        while (
            time.monotonic() < deadline
            and not self._signal
            and any(not guard.report and not guard.is_gone for guard in guards)
        ):
            time.sleep(_LOOK_SECONDS)
            for guard in guards:
                guard.beat()
        answering = [guard for guard in guards if guard.report and not guard.is_gone]
        others = [guard for guard in guards if guard not in answering]
        silent = {}
        for guard in others:
            usual = f"no answer within {self._cluster.node_timeout:g} seconds"
            guard.close(time.monotonic())
            silent[guard.node.name] = guard.errors or usual
        return answering, silent

    def _end(self, guards: Sequence[Guard]) -> None:
        """End everything on these nodes, and their guards."""
        for guard in guards:
            guard.send("end")
        deadline = time.monotonic() + _END_SECONDS
        for guard in guards:
            guard.close(deadline)

    # --- one start -------------------------------------------------------------------------------------------

    def _attempt(self, guards: Sequence[Guard], restarts: int) -> Outcome:
        """Start, and watch until the launcher has ended and no rank is left, or until everything is to be ended."""
        start = Start(
            nodes=tuple(guard.node for guard in guards),
            restarts=restarts,
            record=self._records[-1],
            addresses={guard.node.name: guard.addresses for guard in guards},
        )
        environment = environment_of_start(os.environ, self._cluster)
        process = subprocess.Popen(self._command(start), env=environment, start_new_session=True)
        patience = self._cluster.node_timeout
        lost, deadline, told, hastened = "", math.inf, False, False
        try:
            while True:
                time.sleep(_LOOK_SECONDS)
                now, code = time.monotonic(), process.poll()
                for guard in guards:
                    guard.beat()
                if self._hurry:
                    break
                if self._signal and not told:
                    if process.poll() is None and not any(_states(guard) for guard in guards):
                        break  # Nothing to save. DeepSpeed's launcher, told to end, would end other runs as well.
                    deadline, told = now + _GRACE_SECONDS, True
                    for guard in guards:
                        guard.send(f"stop {self._signal}")
                # Here nothing can be cut off, and after a pause of this process the reports are yet to be read.
                gone = [
                    guard
                    for guard in guards
                    if guard.is_gone or (self._remote and guard.silent_for() > patience + 2 * _BEAT_SECONDS)
                ]
                if gone:
                    lost = lost or (f"node {gone[0].node.name} was lost" if self._remote else "the guard was killed")
                    break
                if not lost:
                    lost = self._lost_rank(guards)
                # The others say what they saw, and end by themselves, as long as that does not take too long.
                states = [state for guard in guards for state in _states(guard).values()]
                has_failed = any(isinstance(state, int) and state for state in states)
                if not hastened and (lost or (has_failed and not told)):
                    deadline, hastened = min(deadline, now + patience), True
                if code is not None:
                    if not any(state == "running" for guard in guards for state in _states(guard).values()):
                        break
                    deadline = min(deadline, now + (_GRACE_SECONDS if told else patience))
                if now > deadline:
                    break
        finally:
            code = process.poll()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Outcome(code=code, ranks={}, signal=self._signal, lost=lost, step=None)

    def _lost_rank(self, guards: Sequence[Guard]) -> str:
        for guard in guards:
            ranks = [rank for rank, state in _states(guard).items() if state == "lost"]
            if ranks:
                place = f" on {guard.node.name}" if self._remote else ""
                what = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(sorted(ranks, key=int))}"
                if (guard.report or {}).get("oom_kills"):
                    return f"{what}{place} ended, and the kernel has ended a process there for want of memory"
                return f"{what}{place} ended unexpectedly"
        return ""

    def _with_last_reports(self, outcome: Outcome, guards: Sequence[Guard]) -> Outcome:
        """The outcome with what the guards said last, after everything was ended."""
        ranks: dict[int, int | str] = {}
        for guard in guards:
            ranks.update({int(rank): state for rank, state in _states(guard).items()})
            for name in (guard.report or {}).get("left", ()):
                _say(f"process {name} on {guard.node.name} could not be ended")
        lost = outcome.lost or self._lost_rank(guards)
        return Outcome(code=outcome.code, ranks=ranks, signal=outcome.signal, lost=lost, step=_newest_step(guards))

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """Note signals while the block runs; one that is ignored (nohup) stays so."""

        def note(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if not self._signal:
                self._signal, self._since = number, now
            elif number == signal.SIGINT and now - self._since >= SECOND_INTERRUPT_SECONDS:
                self._hurry = True

        before = {number: signal.getsignal(number) for number in SIGNALS}
        handled = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
        for number in handled:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in handled.items():
                signal.signal(number, handler)


def _newest_step(guards: Sequence[Guard]) -> int | None:
    return max((guard.step for guard in guards if guard.step is not None), default=None)


def _states(guard: Guard) -> dict[str, int | str]:
    """The states of a node's ranks, as its guard has told them last."""
    states: dict[str, int | str] = (guard.report or {}).get("ranks", {})
    return states
