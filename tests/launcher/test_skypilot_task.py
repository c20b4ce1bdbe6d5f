"""Does SkyPilot read the task that is emitted?

SkyPilot is no requirement of the tests: it has fifty of its own, some older than ours. In an environment of its own:
`pip install skypilot pytest pytest-timeout`, then `python -m pytest --noconftest tests/launcher/test_skypilot_task.py`.
Version 0.14.1 read it.
"""

from pathlib import Path

import pytest
import yaml


@pytest.mark.filterwarnings("default")
def test_skypilot_reads_the_task(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky", reason="pip install skypilot, in an environment of its own")
    common_utils = pytest.importorskip("sky.utils.common_utils")
    schemas = pytest.importorskip("sky.utils.schemas")
    task = yaml.safe_load((Path(__file__).parent / "golden" / "skypilot.yaml").read_text(encoding="utf-8"))
    common_utils.validate_schema(task, schemas.get_task_schema(), "")
    common_utils.validate_schema(task["resources"], schemas.get_resources_schema(), "")
    for mount in task["file_mounts"].values():
        if isinstance(mount, dict):
            common_utils.validate_schema(mount, schemas.get_storage_schema(), "")
    (resources,) = sky.Resources.from_yaml_config(task["resources"])
    assert resources.accelerators == {"A100-80GB": 8}
    assert resources.use_spot
