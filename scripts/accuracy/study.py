"""How does a study go from its config to its results: data, tuning, extension, final runs, numbers?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.run_folder import check_can_write_in
from launcher.stopping import EXIT_ERROR, EXIT_SIGNAL, StopRequest, stop_requests
from launcher.sweep.progress import SweepProgress
from launcher.sweep.running import lock_of
from launcher.sweep.sweep_folder import SweepFolder
from launcher.yaml_files import merge
from scripts.accuracy.heads import Sizes, model_sizes
from scripts.accuracy.study_config import StudyConfig
from scripts.accuracy.study_data import TaskData, prepare_data
from scripts.accuracy.study_points import (
    Setup,
    StudyPoint,
    check_same_protocol,
    final_points,
    setups_of,
    tuning_point,
)
from scripts.accuracy.study_results import Key, results_of, rows_by_name, tuned_of, versions
from scripts.accuracy.study_running import Machine, check_finished, list_points, run_points
from scripts.accuracy.study_tuning import Tuned, is_known, next_candidate
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json, read_json

# How much ran at a time when the study was run last, and on what.
_JOBS, _MADE = "jobs.json", ("machine", "versions")


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

    def __post_init__(self) -> None:
        for setup in self.setups:
            self.tuning[setup.key] = [self._tuning_point(setup, rate) for rate in setup.method.rates]
        # All that can be wrong is said before the first run: the final ones are checked with some rate.
        finals = [point for setup in self.setups for point in self._finals(setup, self._any_rate(setup))]
        check_same_protocol([*self.tuning_points, *finals])

    @property
    def tuning_points(self) -> list[StudyPoint]:
        """All of them so far, in the order of the table."""
        return [point for points in self.tuning.values() for point in points]

    def _tuning_point(self, setup: Setup, rate: float) -> StudyPoint:
        return tuning_point(self.config, setup, rate, self.data[setup.task.name], self.sizes[setup.task.name])

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
                points.append(self._tuning_point(setup, rate))
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
    from scripts.benchmarking import machine as this_machine

    folder, config = study.folder, study.config
    folder.path.mkdir(parents=True, exist_ok=True)
    with lock_of(folder) as lock:
        lock.take()
        # What times depend on; a collection later on, maybe elsewhere, asks for it.
        ran_on = {"machine": this_machine(), "versions": versions()}
        atomic_write_json(folder.path / _JOBS, {**asdict(machine), **ran_on})
        num_finals = len(study.setups) * len(config.study.seeds)
        left = [point for point in study.tuning_points if folder.state(point.name) != "finished"]
        progress = SweepProgress(len(left) + num_finals, at_once=machine.jobs)
        with stop_requests() as request, progress:
            code = _run(study, study.tuning_points, machine, progress, request)
            for _ in range(config.tuning.extend):
                if code >= EXIT_SIGNAL or not study.extend():
                    break
                added = [point for point in study.tuning_points if folder.state(point.name) != "finished"]
                progress.add(len(added))
                code = max(code, _run(study, study.tuning_points, machine, progress, request))
            if code >= EXIT_SIGNAL:
                return code
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
    return run_points(study.folder, points, machine, progress, request, keep_adapters=study.config.study.keep_adapters)


def study_results(study: Study, command: str) -> tuple[dict[str, Any], list[str]]:
    """What the study has reached so far, see :func:`scripts.accuracy.study_results.results_of`; and remarks.

    Raises:
        InputError: nothing has finished yet.
    """
    from scripts.benchmarking import machine

    # Of what an earlier start has extended.
    for _ in range(study.config.tuning.extend):
        if not study.extend():
            break
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
        {**made, "jobs": {key: ran[key] for key in ("jobs", "threads")} if ran else None},
        command,
    )
