"""How does a run survive a lost rank or node: who notices, what is ended, where does it start again?

On every node a guard (:mod:`launcher.starting.node_guard`) tells twice a second how the ranks are; the launchers
themselves stay DeepSpeed's and torch's. A rank that ended without a code of its own was lost (killed, or an error
nobody expected), and so was a node whose guard has been silent for ``cluster.node_timeout``. Then all that is left is
ended on all nodes, and the run starts again on the nodes that answer, from its newest checkpoint.

What rank 0 writes is passed on; what the others write is in the run's logs, and of them the first that failed is heard.
A run in which no rank goes on for ``cluster.hang_timeout`` is ended like one that lost a rank, and starts again.

Not started again: a run that ended by a signal, or with a code that says that it would happen again (wrong input, a
loss that is not finite). DeepSpeed has no elastic agent any more (its config says "Elastic training has been removed"),
and torch's starts everything anew whatever the code was, and needs an agent on every node.
"""

import math
import os
import signal
import subprocess
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from launcher.process_ranks import OF_ONE_RANK
from launcher.run_folder import RunFolder
from launcher.saying import say
from launcher.starting.cluster_config import ClusterConfig
from launcher.starting.command_line import ssh_options
from launcher.starting.failures import HangWatch, RankReport, describe_hang, ended_first, hung_stack
from launcher.starting.guards import BEAT_SECONDS, Guard
from launcher.starting.live_view import PlainView, View
from launcher.starting.nodes import Limits, Node, Reach, Start, choose_nodes
from launcher.stopping import EXIT_ERROR, EXIT_INPUT, EXIT_LOST, EXIT_SIGNAL, SECOND_INTERRUPT_SECONDS, SIGNALS
from sparse_zero.errors import InputError

# Time for the workers to write a checkpoint and end, after a signal.
_GRACE_SECONDS = 120.0
# Kills take up to ten seconds.
_END_SECONDS, _LOOK_SECONDS = 15.0, 0.05
# For the stacks of ranks that hang, over ssh from hundreds of nodes.
_STACKS_SECONDS = 6.0
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


class Supervisor:
    """Starts a run, watches it, and starts it again.

    Args:
        nodes: all that may take part, the usual ones first.
        limits: of the number of ranks.
        cluster: the run's section.
        command: of one start, as an argument list; its ranks get the record folder as ``--exit_record``.
        folder: of the run; its checkpoints tell of progress, and its logs take what the ranks write.
        remote: see :class:`Guard`; None where the only node is this machine.
        files: name and content of what every node's ranks get in their record folder.
        view: shows how far the ranks are, and what rank 0 writes.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        limits: Limits,
        cluster: ClusterConfig,
        command: Callable[[Start], Sequence[str]],
        folder: RunFolder,
        remote: Reach | None = None,
        files: Mapping[str, str] | None = None,
        view: View | None = None,
    ) -> None:
        self._nodes, self._limits, self._cluster = tuple(nodes), limits, cluster
        self._command, self._folder, self._remote = command, folder, remote
        self._files = dict(files or {})
        self._view: View = PlainView() if view is None else view
        # What is known of all ranks, from reports that were heard at these times.
        self._reports: list[RankReport] = []
        self._heard: list[float] = []
        # When each rank of this start was seen to have ended.
        self._ended: dict[int, float] = {}
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
        with self._handling_signals(), self._view:
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
                    say(f"starting again with {sum(node.slots for node in nodes)} ranks{place}, {since}")
                try:
                    outcome = self._attempt(guards, restarts)
                finally:
                    self._end(guards)
                reports = self._show(guards)
                outcome = self._with_last_reports(outcome, guards)
                code, may_do_better = judge(outcome)
                if code and not outcome.signal:
                    self._tell_first_failure(reports, guards)
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
                    say(f"{what}; not started again ({why})")
                    return code
                restarts, in_a_row = restarts + 1, in_a_row + 1
                say(f"{what}; restart {in_a_row} of {self._cluster.max_restarts}")

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
                    say(f"nodes that do not answer are left out ({told})")
                return [guard for guard in guards if guard.node in chosen]
            if first:
                raise InputError(
                    f"nodes of cluster.hostfile do not answer ({told}): start them, take them out of it, or set "
                    "cluster.min_world_size to begin with fewer"
                )
            if self._signal or time.monotonic() > deadline:
                ranks = sum(guard.node.slots for guard in guards)
                say(
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
            "checkpoints": str(self._folder.checkpoints.absolute()),
            # Here, nothing can be cut off but the pipe, and a stopped job is no reason to end it.
            "silence": self._cluster.node_timeout if self._remote else None,
            "files": self._files,
            "logs": str(self._folder.logs.absolute()),
        }
        guards = [Guard(node, self._remote, setup) for node in self._nodes]
        deadline = time.monotonic() + self._cluster.node_timeout
        while (
            time.monotonic() < deadline
            and not self._signal
            and any(not guard.report and not guard.is_gone for guard in guards)
        ):
            time.sleep(_LOOK_SECONDS)
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
            guard.send_line("end")
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
        process = self._started(self._command(start), environment)
        patience = self._cluster.node_timeout
        lost, deadline, told, hastened = "", math.inf, False, False
        hangs = HangWatch(self._cluster.hang_timeout, time.monotonic())
        self._ended.clear()
        self._reports, self._heard = [], []
        try:
            while True:
                time.sleep(_LOOK_SECONDS)
                now, code = time.monotonic(), process.poll()
                reports = self._show(guards)
                if self._hurry:
                    break
                if not (lost or told or hastened) and hangs.look(reports, now):
                    lost = self._why_it_hangs(guards)
                    break
                if self._signal and not told:
                    if process.poll() is None and not any(guard.states for guard in guards):
                        break  # Nothing to save. DeepSpeed's launcher, told to end, would end other runs as well.
                    deadline, told = now + _GRACE_SECONDS, True
                    for guard in guards:
                        guard.send_line(f"stop {self._signal}")
                # Here nothing can be cut off, and after a pause of this process the reports are yet to be read.
                gone = [
                    guard
                    for guard in guards
                    if guard.is_gone or (self._remote and guard.silent_for() > patience + 2 * BEAT_SECONDS)
                ]
                if gone:
                    lost = lost or (f"node {gone[0].node.name} was lost" if self._remote else "the guard was killed")
                    break
                if not lost:
                    lost = self._lost_rank(guards)
                # The others say what they saw, and end by themselves, as long as that does not take too long.
                states = [report.state for report in reports]
                has_failed = any(isinstance(state, int) and state for state in states)
                if not hastened and (lost or (has_failed and not told)):
                    deadline, hastened = min(deadline, now + patience), True
                if code is not None:
                    if "running" not in states:
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
            ranks = [rank for rank, state in guard.states.items() if state == "lost"]
            if ranks:
                place = f" on {guard.node.name}" if self._remote else ""
                what = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(sorted(ranks, key=int))}"
                if (guard.report or {}).get("oom_kills"):
                    return f"{what}{place} ended, and the kernel has ended a process there for want of memory"
                return f"{what}{place} ended unexpectedly"
        return ""

    def _started(self, command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[str]":
        """The launcher, in a session of its own."""
        if not self._view.is_picture:
            return subprocess.Popen(command, env=environment, start_new_session=True, text=True)
        # What it writes into a picture would spoil it.
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                self._view.say("out", line)

        threading.Thread(target=read, daemon=True).start()
        return process

    def _show(self, guards: Sequence[Guard]) -> list[RankReport]:
        """Have what is new seen; what is known of all ranks."""
        for guard in guards:
            while not guard.said.empty():
                self._view.say(*guard.said.get())
        heard = [guard.heard for guard in guards]
        if heard != self._heard:  # Reports come twice a second, and there may be thousands of ranks.
            self._heard, self._reports = heard, _reports(guards)
            for report in self._reports:
                if report.state != "running":
                    self._ended.setdefault(report.rank, time.monotonic())
            self._view.update(self._reports)
        return self._reports

    def _why_it_hangs(self, guards: Sequence[Guard]) -> str:
        """Ask all ranks for their stacks; in words, why the run hangs."""
        for guard in guards:
            guard.send_line("stacks")
        deadline = time.monotonic() + _STACKS_SECONDS
        while time.monotonic() < deadline and any(guard.stacks is None and not guard.is_gone for guard in guards):
            time.sleep(_LOOK_SECONDS)
        reports = self._show(guards)
        assert self._cluster.hang_timeout is not None
        why = describe_hang(reports, self._cluster.hang_timeout)
        found = hung_stack(reports)
        if found is not None:
            place = f", and all stacks are in {self._folder.logs}" if _keeps_logs(guards) else ""
            say(f"{why}; {found[0]} was here{place}:\n{textwrap.indent(found[1], '  ')}")
        return why

    def _tell_first_failure(self, reports: Sequence[RankReport], guards: Sequence[Guard]) -> None:
        """Show the error that explains those of the others, unless it was rank 0's, which has been seen."""
        first = ended_first(reports, self._ended)
        if first is None or first.rank == 0:
            return
        failed = [report for report in reports if report.has_failed]
        what = "failed first" if self._ended[first.rank] == min(self._ended[each.rank] for each in failed) else "failed"
        more = f", of {len(failed)} that did" if len(failed) > 1 else ""
        kept = f" (all that ranks wrote is in {self._folder.logs})" if _keeps_logs(guards) else ""
        say(f"{first} {what}{more}{kept}; it said:\n{textwrap.indent(first.words, '  ')}")

    def _with_last_reports(self, outcome: Outcome, guards: Sequence[Guard]) -> Outcome:
        """The outcome with what the guards said last, after everything was ended."""
        ranks: dict[int, int | str] = {}
        for guard in guards:
            ranks.update({int(rank): state for rank, state in guard.states.items()})
            for name in (guard.report or {}).get("left", ()):
                say(f"process {name} on {guard.node.name} could not be ended")
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


def _reports(guards: Sequence[Guard]) -> list[RankReport]:
    """What is known of all ranks."""
    found = []
    for guard in guards:
        report = guard.report or {}
        for rank, state in guard.states.items():
            found.append(
                RankReport(
                    rank=int(rank),
                    node=guard.node.name,
                    state=state,
                    frozen=report.get("frozen", {}).get(rank, ""),
                    status=report.get("status", {}).get(rank, {}),
                    words=guard.words.get(int(rank), ""),
                    stacks=(guard.stacks or {}).get(int(rank), ""),
                )
            )
    return found


def _keeps_logs(guards: Sequence[Guard]) -> bool:
    """Whether the run folder has logs of this start."""
    return any((guard.report or {}).get("keeps") for guard in guards)
