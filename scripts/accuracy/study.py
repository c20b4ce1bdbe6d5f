"""How does a study go from its config to its results: data, tuning, extension, final runs, numbers?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.run_folder import check_can_write_in
from launcher.stopping import EXIT_ERROR, EXIT_SIGNAL, StopRequest, stop_requests
from launcher.sweep.progress import SweepProgress
from launcher.sweep.running import lock_of
from launcher.sweep.sweep_folder import SweepFolder
from launcher.yaml_files import merge
from scripts.accuracy.checkout import commit
from scripts.accuracy.heads import Sizes, model_sizes
from scripts.accuracy.study_config import StudyConfig
from scripts.accuracy.study_data import TaskData, check_calibration, data_config, digests_of, prepare_data
from scripts.accuracy.study_points import (
    Setup,
    StudyPoint,
    check_same_protocol,
    final_points,
    setups_of,
    tuning_points,
)
from scripts.accuracy.study_results import Key, results_of, rows_by_name, tuned_of, versions
from scripts.accuracy.study_running import Machine, check_finished, list_points, run_points
from scripts.accuracy.study_tuning import Tuned, is_known, next_candidate
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json

# How much ran at a time when the study was run last, and on what.
_JOBS, _MADE = "jobs.json", ("machine", "versions", "commit")
_INPUTS = "inputs.json"


@dataclass
class Study:
    """A study that is under way: its points, as far as they are known."""

    config: StudyConfig
    folder: SweepFolder
    data: Mapping[str, TaskData]
    # Of tasks with a head; None of the others.
    sizes: Mapping[str, Sizes | None]
    setups: Sequence[Setup]
    tuning: dict[Key, list[StudyPoint]] = field(default_factory=dict)
    # Hashes of files that runs read besides their splits, by path; of earlier starts, too.
    inputs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for setup in self.setups:
            self.tuning[setup.key] = [each for rate in setup.method.rates for each in self._candidate(setup, rate)]
        # All that can be wrong is said before the first run: the final ones are checked with some rate.
        finals = [point for setup in self.setups for point in self._finals(setup, self._any_rate(setup))]
        check_same_protocol([*self.tuning_points, *finals])
        self._check_calibration(finals)
        self._check_inputs(finals)

    @property
    def tuning_points(self) -> list[StudyPoint]:
        """All of them so far, in the order of the table."""
        return [point for points in self.tuning.values() for point in points]

    def _check_calibration(self, points: Sequence[StudyPoint]) -> None:
        """Raise where what is held out chooses what is trained."""
        seen = set()
        for point in points:
            chooses, task = point.config.data, point.setup.task
            source = (task.name, chooses.calibration, chooses.calibration_split)
            if chooses.calibration is None or source in seen:
                continue
            seen.add(source)
            held_out, place = self.data[task.name].tested_on, f"methods.{point.setup.method.name}"
            check_calibration(data_config(self.config, task), held_out, chooses, place)

    def _check_inputs(self, points: Sequence[StudyPoint]) -> None:
        """Raise where a file that runs read besides their splits is another one than at earlier starts."""
        read = (path for point in points for path in (point.config.data.calibration, point.config.data.forgetting))
        now = digests_of(path for path in read if path is not None)
        file = self.folder.path / _INPUTS
        before = read_json(file) if file.is_file() else {}
        for path, digest in now.items():
            if before.get(path, digest) != digest:
                raise InputError(
                    f"{path} has changed since runs of this study read it: put the old one back, or give the study "
                    "another folder (study.folder)"
                )
        self.inputs = {**before, **now}

    def _candidate(self, setup: Setup, rate: float) -> list[StudyPoint]:
        """The tuning runs of one rate."""
        return tuning_points(self.config, setup, rate, self.data[setup.task.name], self.sizes[setup.task.name])

    def _any_rate(self, setup: Setup) -> float | None:
        return setup.method.rates[0] if setup.method.rates else None

    def _finals(self, setup: Setup, rate: float | None) -> list[StudyPoint]:
        return final_points(self.config, setup, rate, self.data[setup.task.name], self.sizes[setup.task.name])

    def found(self) -> dict[Key, Tuned | None]:
        """What tuning has found so far, of every setup that is tuned."""
        rows, _ = rows_by_name(self.folder, self.tuning_points)
        return {
            setup.key: tuned_of(self.tuning[setup.key], rows, self._metric(setup))
            for setup in self.setups
            if self.tuning[setup.key]
        }

    def _metric(self, setup: Setup) -> str:
        """What tuning goes by: of plain text there is the loss only."""
        return self.config.tuning.metric if self.data[setup.task.name].has_problems else "loss"

    @property
    def num_open(self) -> int:
        """Tuning runs of other processes, or stopped ones: while there are any, no rate is chosen."""
        return sum(self.folder.state(point.name) not in ("finished", "failed") for point in self.tuning_points)

    def extend_as_before(self) -> None:
        """Take in the candidates that earlier starts have added."""
        for _ in range(self.config.tuning.extend):
            if not self.extend():
                break

    def extend(self) -> bool:
        """Give every setup one more candidate where one lies at an edge; whether there are new points."""
        found = self.found()
        if not any(tuned is not None and tuned.at_edge for tuned in found.values()):
            return False
        added = False
        for setup in self.setups:
            tuned, points = found.get(setup.key), self.tuning[setup.key]
            if tuned is None:
                continue
            rate = next_candidate(tuned, self._metric(setup))
            # Of all candidates, those among them that have not been run.
            if not is_known(rate, [each.rate for each in points if each.rate is not None]):
                points += self._candidate(setup, rate)
                added = True
        return added

    def finals(self) -> dict[Key, list[StudyPoint]]:
        """The final points of every setup whose rate is known."""
        found, points = self.found(), {}
        for setup in self.setups:
            if not self.tuning[setup.key]:
                points[setup.key] = self._finals(setup, None)
            elif (tuned := found[setup.key]) is not None:
                points[setup.key] = self._finals(setup, tuned.rate)
        return points

    def check_finished(self) -> None:
        """Raise where a finished run was another one than the config says now.

        Raises:
            InputError: names what differs.
        """
        finals = [point for points in self.finals().values() for point in points]
        check_finished(self.folder, [*self.tuning_points, *finals])


def open_study(config: StudyConfig) -> Study:
    """Read the data and check every point; files of data are written to the study's folder.

    Raises:
        InputError: something cannot be used.
    """
    folder = SweepFolder(config.study.path)
    check_can_write_in(folder.path, f"study.folder is {folder.path}")
    data, sizes = {}, {}
    for task in config.all_tasks():
        data[task.name] = prepare_data(config, task, folder.path / "data")
        model = merge(config.run, task.sections).get("model", {})
        sizes[task.name] = model_sizes(model, task.head) if task.head else None
    return Study(config=config, folder=folder, data=data, sizes=sizes, setups=setups_of(config))


def run_study(study: Study, machine: Machine) -> int:
    """Run what is not finished; returns the exit code: of a signal, 1 where a point did not finish, or 0."""
    folder, config = study.folder, study.config
    folder.path.mkdir(parents=True, exist_ok=True)
    with lock_of(folder) as lock:
        lock.take()
        num_finals = len(study.setups) * len(config.study.seeds)
        left = [point for point in study.tuning_points if folder.state(point.name) != "finished"]
        progress = SweepProgress(len(left) + num_finals, at_once=machine.jobs)
        with stop_requests() as request, progress:
            code = _run(study, study.tuning_points, machine, progress, request)
            for _ in range(config.tuning.extend):
                known = {point.name for point in study.tuning_points}
                if code >= EXIT_SIGNAL or study.num_open or not study.extend():
                    break
                added = [point for point in study.tuning_points if point.name not in known]
                progress.add(sum(folder.state(point.name) != "finished" for point in added))
                code = max(code, _run(study, added, machine, progress, request))
            if code >= EXIT_SIGNAL:
                return code
            if study.num_open:
                progress.say(
                    f"{study.num_open} tuning runs are under way in other processes, or were stopped, and no rate is "
                    "chosen without them: start again when those have ended"
                )
                return EXIT_ERROR
            finals = [point for points in study.finals().values() for point in points]
            waiting = [point for point in finals if folder.state(point.name) != "finished"]
            progress.add(len(waiting) - num_finals)
            code = max(code, _run(study, finals, machine, progress, request))
            missing = len(study.setups) - len(study.finals())
            if missing:
                progress.say(f"{missing} methods have no final runs: all of their tuning runs failed")
                code = max(code, EXIT_ERROR)
    return code


def _run(
    study: Study, points: Sequence[StudyPoint], machine: Machine, progress: SweepProgress, request: StopRequest
) -> int:
    list_points(study.folder, [*study.tuning_points, *(each for each in points if each.stage != "tune")])
    if any(study.folder.state(point.name) != "finished" for point in points):
        _keep_machine(study.folder.path / _JOBS, machine)
        if study.inputs:
            atomic_write_json(study.folder.path / _INPUTS, study.inputs)
    return run_points(study.folder, points, machine, progress, request, keep_adapters=study.config.study.keep_adapters)


def _keep_machine(path: Path, machine: Machine) -> None:
    """Write what times depend on; a collection later on, maybe elsewhere, asks for it.

    Of a study that goes on under other conditions the first ones stay, and ``varied`` names what is different since.
    """
    from scripts.benchmarking import machine as this_machine

    now = {**asdict(machine), "machine": this_machine(), "versions": versions(), "commit": commit()}
    first = read_json(path) if path.is_file() else now
    different = {key for key, value in now.items() if first.get(key, value) != value}
    atomic_write_json(path, {**now, **first, "varied": sorted(different | set(first.get("varied", ())))})


def study_results(study: Study, command: str) -> tuple[dict[str, Any], list[str]]:
    """What the study has reached so far, see :func:`scripts.accuracy.study_results.results_of`; and remarks.

    Raises:
        InputError: nothing has finished yet.
    """
    from scripts.benchmarking import machine

    study.extend_as_before()
    study.check_finished()
    finals = study.finals()
    if not any(study.folder.state(point.name) == "finished" for points in finals.values() for point in points):
        raise InputError(f"no final run has finished in {study.folder.path}: run the study first")
    jobs = study.folder.path / _JOBS
    ran = read_json(jobs) if jobs.is_file() else {}
    made = {"machine": machine(), "versions": versions(), **{key: ran[key] for key in _MADE if key in ran}}
    return results_of(
        study.config,
        study.folder,
        study.found(),
        finals,
        study.setups,
        study.data,
        study.sizes,
        {**made, "jobs": {key: ran[key] for key in ("jobs", "threads", "varied") if key in ran} if ran else None},
        command,
    )
