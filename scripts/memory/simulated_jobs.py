"""What does one simulation, in a process that does nothing else, find, and what does it take?"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from typing import Any, Literal

from launcher.config import parse_config


def simulate_mapping(
    mapping: Mapping[str, Any], world_size: int, changes: Mapping[str, Any], part: Literal["run", "calibration"] = "run"
) -> dict[str, Any]:
    """What :func:`launcher.plan.simulation.simulate_run` gives, as "simulated", with the seconds and bytes it took.

    In this process, which must have been made for it: a spawned one would import everything first.

    Args:
        mapping: the run's config.
        world_size: ranks.
        changes: fields of :class:`sparse_zero.memory.closed_form.job.MemoryJob` that differ from the run's.
        part: the run without calibration, or calibration alone, which gives its phases only: each is a world of its
            own, and a process can make one.
    """
    from launcher.plan.forecasting import job_of
    from launcher.plan.simulating import simulate_calibration_here, simulate_here
    from launcher.plan.simulation import described

    start = time.perf_counter()
    config = parse_config(mapping)
    job = job_of(config, world_size, **changes)
    run = described(config, job, calibrates=part == "calibration")
    found = simulate_here(run, job) if part == "run" else simulate_calibration_here(run, job)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"simulated": found, "seconds": time.perf_counter() - start, "process_bytes": most}
