"""All runs on two ranks, made by one start of the ranks."""

from typing import Any

import pytest

from tests.distributed.spawn import run_ranks


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What :func:`tests.integrations.workers.everything` reports."""
    folder = tmp_path_factory.mktemp("integrations")
    report: dict[str, Any] = run_ranks("tests.integrations.workers:everything", 2, timeout=600.0, folder=str(folder))
    return report
