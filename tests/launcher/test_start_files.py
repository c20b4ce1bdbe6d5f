"""Do config and environment reach the ranks as they are, whatever stands in them, and nobody else?"""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.config import load_config, parse_config
from launcher.starting import node_guard
from launcher.starting.cluster_config import ClusterConfig
from launcher.starting.start_files import CONFIG_NAME, ENVIRONMENT_NAME, exported_variables, files_of_run
from sparse_zero.errors import InputError

HOSTILE = "a b'c\"d$(touch hacked)`touch hacked`;touch hacked\nnext %h \\ ż --x=1"
HOSTS = ("a slots=1",)


def cluster(**settings: Any) -> ClusterConfig:
    return ClusterConfig(**{"launcher": "pdsh", "hosts": HOSTS, **settings})


def test_what_libraries_read_is_passed_on_and_what_is_named() -> None:
    environ = {
        "NCCL_DEBUG": "INFO", "HF_HOME": HOSTILE, "OMP_NUM_THREADS": "2", "TORCH_EXTENSIONS_DIR": "/t",
        "CUDA_VISIBLE_DEVICES": "3", "CUDA_HOME": "/c", "PATH": "/bin", "OWN": HOSTILE, "RANK": "1",
    }  # fmt: skip
    found = exported_variables(cluster(export=("OWN", "MORE=x=y", "HF_HOME=other")), environ)
    kept = {name: environ[name] for name in ("NCCL_DEBUG", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "CUDA_HOME")}
    assert found == {**kept, "HF_HOME": "other", "OWN": HOSTILE, "MORE": "x=y"}
    # Where the ranks are children of this process, they have the rest.
    assert exported_variables(ClusterConfig(export=("MORE=1",)), environ) == {"MORE": "1"}
    found = exported_variables(cluster(network_interface="ib0"), {})
    assert found == {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0"}


def test_a_file_of_variables(tmp_path: Path) -> None:
    file = tmp_path / "variables"
    file.write_text("# what the cluster needs\n\nNCCL_IB_HCA=mlx5\nOWN\n")
    found = exported_variables(cluster(export_file=str(file), export=("NCCL_IB_HCA=other",)), {"OWN": "1"})
    assert found == {"NCCL_IB_HCA": "other", "OWN": "1"}
    for content, said in {
        "A B=1\n": "line 1 has 'A B' with a value",
        "\nGONE\n": "line 2 names GONE, which is not set",
    }.items():
        file.write_text(content)
        with pytest.raises(InputError, match=r"cluster\.export_file") as error:
            exported_variables(cluster(export_file=str(file)), {})
        assert said in str(error.value)
    with pytest.raises(InputError, match=r"cluster\.export has '\$\(x\)' with a value"):
        exported_variables(cluster(export=("$(x)=1",)), {})
    with pytest.raises(InputError, match=r"cluster\.export has RANK, which launchers set"):
        exported_variables(cluster(export=("RANK=0",)), {})
    with pytest.raises(InputError, match=r"cluster\.export_file"):
        exported_variables(cluster(export_file=str(tmp_path / "gone")), {})


def test_a_guard_writes_them_for_the_ranks_and_removes_them(tmp_path: Path) -> None:
    mapping = {
        "model": {"name_or_path": f"m {HOSTILE}".replace("\n", " ")},
        "data": {"train": "d.json"},
        "selection": {"regions": [{"kind": "row", "modules": [HOSTILE], "per_matrix": 1}]},
        "training": {"steps": 1},
        "zero": {"nvme_path": HOSTILE},
        "output": {"folder": "o"},
    }
    config = parse_config(mapping)
    record = tmp_path / "record"
    setup: dict[str, Any] = {
        "record": str(record), "before": [], "checkpoints": str(tmp_path), "silence": None,
        "files": files_of_run(config, {"OWN": HOSTILE}), "logs": str(tmp_path / "logs"),
    }  # fmt: skip
    guard = subprocess.Popen(
        [sys.executable, str(node_guard.__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert guard.stdin is not None
    assert guard.stdout is not None
    guard.stdin.write(json.dumps(setup) + "\n")
    guard.stdin.flush()
    assert guard.stdout.readline() == "\n"  # Ends what a login shell may have begun.
    first = json.loads(guard.stdout.readline())
    assert all(not address.startswith("127.") for address in first["addresses"].values())
    assert stat.S_IMODE(record.stat().st_mode) == 0o700
    folder = node_guard.node_folder(record)
    # Other nodes may have the same folder, whose guards end before this one.
    assert list(record.iterdir()) == [folder]
    assert {path.name for path in folder.iterdir()} == {CONFIG_NAME, ENVIRONMENT_NAME}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert load_config(folder / CONFIG_NAME) == config
    assert json.loads((folder / ENVIRONMENT_NAME).read_text()) == {"OWN": HOSTILE}
    # What a rank does with them.
    worker = Path(node_guard.__file__).with_name("start_rank.py")
    code = (
        f"import runpy, sys; sys.argv = [{str(worker)!r}]; m = runpy.run_path({str(worker)!r}); "
        "import os, json; "
        "os.execv = lambda program, argv: print(json.dumps([argv, os.environ['OWN'], os.environ['MASTER_ADDR']])); "
        f"m['main']([{str(record)!r}, '--meet=10.0.0.1:7', '--checkpoint.resume=auto'])"
    )
    # A shell would write where it is.
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}, cwd=tmp_path
    )
    argv, own, address = json.loads(done.stdout.splitlines()[-1])
    given = ["--config", str(folder / CONFIG_NAME), "--exit_record", str(record)]
    train = str(worker.parents[1] / "train.py")
    assert argv == [sys.executable, "-u", train, *given, "--checkpoint.resume=auto"]
    assert (own, address) == (HOSTILE, "10.0.0.1")
    # One that is named twice by two names does not disturb the first.
    twice = subprocess.run(
        [sys.executable, str(node_guard.__file__)], input=json.dumps(setup) + "\n", capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert twice.returncode == 1
    assert "has a guard of this start already" in twice.stderr
    assert (folder / ENVIRONMENT_NAME).is_file()
    # What is told to end before it is killed leaves nothing that may be secret.
    guard.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 20
    while (folder / ENVIRONMENT_NAME).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(folder.iterdir())
    guard.communicate("end\n", timeout=30)
    assert guard.returncode == 0
    assert not record.exists()
    assert not list(tmp_path.rglob("hacked"))
