#!/usr/bin/env python3
"""Is the memory forecast right? The closed form against the simulation, and the simulation against real ranks.

--forecast holds the closed form against the simulated run on over a hundred jobs (12 small ones with --quick): largest
and median error of the peak and of each phase's peak, which kinds of bytes differ, and what a simulation costs.
--measured holds the simulation against real DeepSpeed engines on 1 to 4 real ranks of this machine (3 runs with
--quick): the tensors that a recorder sees on them, and the growth of their resident size.

Each finished simulation is a line of a file in --out, and a rerun continues; forecasts are made anew each time.
--fresh forgets what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launcher.config import resolved_yaml
from launcher.yaml_files import parse_yaml
from scripts.benchmarking import exit_code
from scripts.memory.in_processes import PRELOADED, in_fork, run_all
from scripts.memory.memory_cases import QUICK, TINY_CONFIGS, Case, covering_cases
from scripts.memory.memory_errors import Compared, compare, print_comparison
from scripts.memory.ranks_in_forks import on_forked_ranks
from scripts.memory.simulated_jobs import simulate_mapping
from sparse_zero.errors import InputError
from sparse_zero.files import atomic_write_json
from tests.distributed.spawn import preloaded_context

NUM_CASES = 130
# One simulation is ended after so many seconds.
TIMEOUT_SECONDS = 600.0


def written_shape(model: str, parent: Path) -> str:
    """A new folder in ``parent`` with the config.json of a model that is built in, or one of the quick cases'."""
    from models.known_shapes import known_shape

    known = known_shape(model)
    config = TINY_CONFIGS[model] if known is None else known.config
    (parent / model).mkdir(exist_ok=True)
    (parent / model / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    return str(parent / model)


def arguments_of(case: Case, folder: str) -> dict[str, Any]:
    """Of :func:`scripts.memory.simulated_jobs.simulate_mapping`."""
    mapping = parse_yaml(resolved_yaml(case.config(folder)), "the case")
    return {"mapping": mapping, "world_size": case.world_size, "changes": case.changes()}


class Forecaster:
    """Forecasts of cases; the shapes of a model are made once."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[str, str, str, str], Any] = {}

    def forecast(self, case: Case, folder: str) -> Any:
        """What :func:`launcher.plan.forecasting.forecast_run` gives for a case."""
        from launcher.plan.forecasting import forecast_run, shapes_of

        config = case.config(folder)
        key = (folder, case.precision, case.attention, config.model.quantization)
        if key not in self._shapes:
            self._shapes[key] = shapes_of(config)
        return forecast_run(config, case.world_size, shapes=self._shapes[key], **case.changes())


def matching(cases: Sequence[Case], text: str) -> list[Case]:
    """Those with a text in their name.

    Raises:
        InputError: none.
    """
    found = [case for case in cases if text in case.name]
    if not found:
        raise InputError(f"--only is {text!r}: no case has it in its name, such as {cases[0].name!r}")
    return found


def tell_of(total: int) -> Callable[[str, dict[str, Any]], None]:
    """What says on stderr that one more case is done."""
    number = itertools.count(1)

    def tell(name: str, found: dict[str, Any]) -> None:
        how = "failed" if "failed" in found else f"{found['seconds']:.0f} s"
        print(f"[{next(number)} of {total}] {name}: {how}", file=sys.stderr, flush=True)

    return tell


def verify_forecast(options: argparse.Namespace, shapes: Path) -> bool:
    """Simulate, forecast, compare and show. Returns whether the bounds are met."""
    cases = {case.name: case for case in matching(QUICK if options.quick else covering_cases(NUM_CASES), options.only)}
    results = options.out / "forecast.jsonl"
    if options.fresh:
        results.unlink(missing_ok=True)
    folders = {case.model: written_shape(case.model, shapes) for case in cases.values()}
    context = preloaded_context(PRELOADED)

    def simulate(name: str) -> dict[str, Any]:
        arguments = arguments_of(cases[name], folders[cases[name].model])
        return in_fork(context, simulate_mapping, arguments, TIMEOUT_SECONDS)

    rows = run_all(list(cases), simulate, results, workers=options.workers, on_result=tell_of(len(cases)))
    forecaster = Forecaster()
    compared: list[Compared] = []
    for name, case in cases.items():
        try:
            forecast = forecaster.forecast(case, folders[case.model])
        except Exception as error:  # Whatever it is, the other cases are worth knowing.
            rows[name] = {"failed": f"forecast: {type(error).__name__}: {error}"}
            forecast = None
        compared.append(compare(name, forecast, rows[name]))
    passed = print_comparison(compared, details=options.details or options.quick)
    if options.json is not None:
        atomic_write_json(options.json, [dataclasses.asdict(each) for each in compared])
    return passed


def verify_measured(options: argparse.Namespace) -> bool:
    """Simulate, run on real ranks, compare and show. Returns whether the bounds are met."""
    from scripts.memory.measured_cases import QUICK as QUICK_RUNS
    from scripts.memory.measured_cases import judge, measured_cases, print_measured, write_models

    cases = {case.name: case for case in matching(QUICK_RUNS if options.quick else measured_cases(), options.only)}
    results = options.out / "measured.jsonl"
    if options.fresh:
        results.unlink(missing_ok=True)
    folders = write_models(options.out / "models", sorted({case.model for case in cases.values()}))
    context = preloaded_context((*PRELOADED, "scripts.memory.memory_on_ranks"))

    def measure(name: str) -> dict[str, Any]:
        from scripts.memory.memory_on_ranks import measure_case

        case, start = cases[name], time.perf_counter()
        simulated = in_fork(context, simulate_mapping, arguments_of(case, folders[case.model]), TIMEOUT_SECONDS)
        if "failed" in simulated:
            return simulated
        found = on_forked_ranks(
            context,
            measure_case,
            {"case": dataclasses.asdict(case), "folder": folders[case.model]},
            world_size=case.world_size,
            timeout=TIMEOUT_SECONDS,
        )
        return {**found, "simulated": simulated["simulated"], "seconds": time.perf_counter() - start}

    # One world at a time: it has as many ranks as the machine has cores, or more.
    rows = run_all(list(cases), measure, results, workers=1, on_result=tell_of(len(cases)))
    measured = [judge(name, rows[name]) for name in cases]
    passed = print_measured(measured)
    if options.json is not None:
        atomic_write_json(options.json, [dataclasses.asdict(each) for each in measured])
    return passed


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--forecast", action="store_true", help="closed form against simulation")
    parser.add_argument("--measured", action="store_true", help="simulation against real ranks")
    parser.add_argument("--quick", action="store_true", help="a few small cases only, with details")
    parser.add_argument("--only", default="", help="cases that have this text in their name")
    parser.add_argument("--details", action="store_true", help="forecast: of each case, phases by kind")
    parser.add_argument("--fresh", action="store_true", help="forget what was simulated before")
    parser.add_argument("--workers", type=int, default=2, help="forecast: simulations at once (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/verify-memory"), help="default: runs/verify-memory")
    parser.add_argument("--json", type=Path, default=None, help="also write all numbers to this file")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> bool:
    """Do what the command line asks for. Returns whether the bounds are met."""
    if options.forecast == options.measured:
        raise InputError("say what to verify: --forecast or --measured")
    if options.measured:
        return verify_measured(options)
    with tempfile.TemporaryDirectory(prefix="sparse_zero_shapes_") as folder:
        return verify_forecast(options, Path(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a bound is missed, 2 for wrong input."""
    passed = True

    def everything() -> None:
        nonlocal passed
        passed = run(parse(arguments))

    return exit_code(everything) or (0 if passed else 1)


if __name__ == "__main__":
    sys.exit(main())
