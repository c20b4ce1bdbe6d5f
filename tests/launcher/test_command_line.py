"""Does each launcher get a command that it understands, and the worker its arguments unchanged?"""

import shlex
from pathlib import Path
from typing import Any

import pytest

from launcher.command_line import worker_command
from launcher.config import RunConfig, parse_config
from sparse_zero.errors import InputError

OVERRIDES = ["--training.steps=3", "--selection.regions.0.modules=['*.{q,k}_proj']"]


def make(**cluster: Any) -> RunConfig:
    return parse_config(
        {
            "model": {"name_or_path": "m"},
            "data": {"train": "d.json"},
            "selection": {"regions": [{"kind": "row", "modules": ["*"], "per_matrix": 1}]},
            "training": {"steps": 1},
            "zero": {},
            "output": {"folder": "o"},
            "cluster": cluster,
        }
    )


def command(
    num_gpus: int | None, devices: list[str] | None = None, master_port: int = 29500, **cluster: Any
) -> list[str]:
    return worker_command(
        make(**cluster),
        "/c/run.yaml",
        OVERRIDES,
        python="py",
        num_gpus=num_gpus,
        master_port=master_port,
        devices=devices,
        script="/s/train.py",
    )


WORKER = ["/s/train.py", "--config", "/c/run.yaml", *OVERRIDES]
DEEPSPEED = ["py", "-m", "deepspeed.launcher.runner", "--no_local_rank"]


def test_local() -> None:
    local = [*DEEPSPEED, "--hostfile", "/dev/null", "--master_port", "29500"]
    assert command(2) == [*local, "--num_gpus", "2", *WORKER]
    assert command(None) == [*local, *WORKER]
    # A GPU set aside by the environment stays so when ranks are counted.
    assert command(2, devices=["4", "6", "7"]) == [*local, "--include", "localhost:4,6", *WORKER]
    assert "1234" in command(2, master_port=1234)


def test_pdsh() -> None:
    start = [*DEEPSPEED, "--launcher", "pdsh", "--force_multi", "--hostfile", "hosts", "--num_nodes", "2"]
    built = command(8, launcher="pdsh", num_nodes=2, hostfile="hosts", master_address="10.0.0.1")
    count = ["--num_gpus", "8", "--master_port", "29500", "--master_addr", "10.0.0.1"]
    assert built[: len(start) + len(count)] == [*start, *count]
    # The remote shell takes the worker's arguments apart again.
    assert shlex.split(" ".join(built[len(start) + len(count) :])) == WORKER


def test_deepspeed_understands_the_commands() -> None:
    from deepspeed.launcher.runner import parse_args

    for built in (command(2), command(8, launcher="pdsh", num_nodes=2, hostfile="hosts")):
        parsed = parse_args(built[3:])
        assert parsed.user_script == "/s/train.py"
        assert shlex.split(" ".join(parsed.user_args))[:2] == ["--config", "/c/run.yaml"]
        assert parsed.no_local_rank
    assert (parsed.num_nodes, parsed.num_gpus, parsed.launcher) == (2, 8, "pdsh")


def test_pdsh_refuses_what_it_would_change() -> None:
    def pdsh(override: str) -> list[str]:
        config = make(launcher="pdsh", hostfile="hosts")
        return worker_command(
            config, "/c/run.yaml", [override], python="py", num_gpus=2, master_port=7, script="/s/train.py"
        )

    assert pdsh("--data.train=my data.json")[-1] == "--data.train=my data.json"  # quoted by DeepSpeed
    for unsafe in ("--data.train=my $HOME", "--data.train=a `b`", "--data.train=%h"):
        with pytest.raises(InputError, match="put the setting into the config file"):
            pdsh(unsafe)


def test_torchrun() -> None:
    torchrun = ["py", "-m", "torch.distributed.run"]
    one = [
        *torchrun,
        "--nnodes",
        "1",
        "--nproc_per_node",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        "29500",
    ]
    assert command(2, launcher="torchrun") == [*one, *WORKER]
    assert "gpu" in command(None, launcher="torchrun")
    two = command(8, launcher="torchrun", num_nodes=2, master_address="node0", master_port=7)
    assert two == [
        *(*torchrun, "--nnodes", "2", "--nproc_per_node", "8"),
        *("--rdzv_backend", "c10d", "--rdzv_endpoint", "node0:7", "--rdzv_id", "sparse-zero"),
        *WORKER,
    ]


def test_torchrun_understands_the_commands() -> None:
    from torch.distributed.run import parse_args

    for built in (
        command(2, launcher="torchrun"),
        command(8, launcher="torchrun", num_nodes=2, master_address="h"),
    ):
        parsed = parse_args(built[3:])
        assert parsed.training_script == "/s/train.py"
        assert parsed.training_script_args == WORKER[1:]


def test_config_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    built = worker_command(make(), "run.yaml", [], python="py", num_gpus=1, master_port=7, script="/s/train.py")
    assert built[-1] == str(tmp_path / "run.yaml")
