"""Does each launcher get a command that it understands, and no text of a user's in it?"""

import shlex
from pathlib import Path
from typing import Any

import pytest

from launcher.starting.cluster_config import ClusterConfig
from launcher.starting.command_line import check_remote_shell, script_file, worker_by_hand, worker_command
from launcher.starting.slurm import nodes_of_allocation
from sparse_zero.errors import InputError

WORKER = ["/s/start_rank.py", "/tmp/record", "--checkpoint.resume=auto"]
DEEPSPEED = ["py", "-m", "deepspeed.launcher.runner", "--no_local_rank"]
HOSTS = ("node0 slots=8", "node1 slots=8")


def command(
    num_gpus: int | None, devices: list[str] | None = None, master_port: int = 29500, **cluster: Any
) -> list[str]:
    return worker_command(
        ClusterConfig(**cluster),
        WORKER[1],
        WORKER[2:],
        python="py",
        num_gpus=num_gpus,
        master_port=master_port,
        hostfile="/t/hosts",
        nodes=["node0", "node1"],
        devices=devices,
        script=WORKER[0],
    )


def across(launcher: str, **cluster: Any) -> list[str]:
    return command(None, launcher=launcher, num_nodes=2, hosts=HOSTS, master_address="10.0.0.1", **cluster)


def test_local() -> None:
    local = [*DEEPSPEED, "--hostfile", "/dev/null", "--master_port", "29500"]
    assert command(2) == [*local, "--num_gpus", "2", *WORKER]
    assert command(None) == [*local, *WORKER]
    # A GPU set aside by the environment stays so when ranks are counted.
    assert command(2, devices=["4", "6", "7"]) == [*local, "--include", "localhost:4,6", *WORKER]
    assert "1234" in command(2, master_port=1234)
    assert "--bind_cores_to_rank" in command(2, bind_to_core=True)


def start_of(launcher: str) -> list[str]:
    start = [*DEEPSPEED, "--launcher", launcher, "--force_multi", "--hostfile", "/t/hosts"]
    return [*start, "--master_port", "29500", "--no_ssh_check", "--master_addr", "10.0.0.1"]


def test_pdsh() -> None:
    assert across("pdsh") == [*start_of("pdsh"), *WORKER]
    more = across("pdsh", ssh_port=2222, launcher_arguments=("-f", "8"))
    assert more == [*start_of("pdsh"), "--ssh_port", "2222", "--launcher_args=-f 8", *WORKER]


def launcher_arguments(built: list[str]) -> list[str]:
    (found,) = (each for each in built if each.startswith("--launcher_args="))
    return shlex.split(found.removeprefix("--launcher_args="))


def test_openmpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    built = across("openmpi")
    assert built[: len(start_of("openmpi"))] == start_of("openmpi")
    assert built[-4:] == [WORKER[0], WORKER[1], "--meet=10.0.0.1:29500", WORKER[2]]
    found = launcher_arguments(built)
    # DeepSpeed would name eth0.
    assert found[:3] == ["--mca", "btl_tcp_if_include", "0.0.0.0/0"]
    assert "--allow-run-as-root" not in found
    monkeypatch.setattr("os.geteuid", lambda: 0)
    settings: dict[str, Any] = {"network_interface": "ib0", "ssh_port": 2222, "ssh_user": "me", "bind_to_core": True}
    found = launcher_arguments(across("openmpi", **settings, launcher_arguments=("--report-bindings", "a b")))
    assert found[found.index("btl_tcp_if_include") + 1] == "ib0"
    assert found[found.index("plm_rsh_args") + 1] == "-p 2222 -l me"
    assert found[found.index("--bind-to") + 1] == "core"
    assert found[-3:] == ["--allow-run-as-root", "--report-bindings", "a b"]


def test_mpich() -> None:
    built = across("mpich", network_interface="ib0")
    assert built[-4:] == [WORKER[0], WORKER[1], "--meet=10.0.0.1:29500", WORKER[2]]
    assert launcher_arguments(built) == ["-launcher", "ssh", "-bind-to", "none", "-iface", "ib0"]


def test_slurm() -> None:
    built = command(None, launcher="slurm", num_nodes=2, ranks_per_node=4, master_address="10.0.0.1")
    assert built[-4:] == [WORKER[0], WORKER[1], "--meet=10.0.0.1:29500", WORKER[2]]
    found = launcher_arguments(built)
    assert found == ["--overlap", "--nodes=2", "--ntasks-per-node=4", "--cpu-bind=none", "--nodelist=node0,node1"]


def test_the_nodes_of_an_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ClusterConfig(launcher="slurm")
    with pytest.raises(InputError, match="this is no Slurm job"):
        nodes_of_allocation(cluster, {})
    job = {"SLURM_JOB_NODELIST": "gpu[07-08]"}
    with pytest.raises(InputError, match=r"cluster\.ranks_per_node is missing, and the job"):
        nodes_of_allocation(cluster, job)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="scontrol does not tell the nodes"):
        nodes_of_allocation(cluster, {**job, "SLURM_NTASKS_PER_NODE": "4"})
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho gpu07; echo gpu08\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for told, ranks in (
        # One task is the launcher itself: the GPUs count.
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "8"}, 4),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "1"}, 1),
    ):
        found = nodes_of_allocation(cluster, {**job, **told})
        assert [(node.name, node.slots) for node in found] == [("gpu07", ranks), ("gpu08", ranks)]
    named = ClusterConfig(launcher="slurm", ranks_per_node=2)
    found = nodes_of_allocation(named, {**job, "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8"})
    assert [node.slots for node in found] == [2, 2]
    with pytest.raises(InputError, match=r"cluster\.exclude is set, .* give it to sbatch"):
        ClusterConfig(launcher="slurm", exclude=("a",))


def test_deepspeed_understands_the_commands() -> None:
    from deepspeed.launcher.runner import parse_args

    for built in (command(2), across("pdsh", ssh_port=22), across("openmpi"), across("mpich")):
        parsed = parse_args(built[3:])
        assert parsed.user_script == WORKER[0]
        assert parsed.user_args[0] == WORKER[1]
        assert parsed.no_local_rank
    assert (parsed.launcher, parsed.num_nodes, parsed.num_gpus) == ("mpich", -1, -1)
    assert shlex.split(parsed.launcher_args)[:2] == ["-launcher", "ssh"]


def test_torchrun() -> None:
    torchrun = ["py", "-m", "torch.distributed.run"]
    one = ["--nnodes", "1", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", "29500"]
    assert command(2, launcher="torchrun") == [*torchrun, *one, *WORKER]
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
        assert parsed.training_script == WORKER[0]
        assert parsed.training_script_args == WORKER[1:]


def test_by_hand_the_config_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = worker_by_hand("run.yaml", ["--training.steps=3"], python="py")
    assert found == ["py", script_file("launcher.train"), "--config", f"{tmp_path}/run.yaml", "--training.steps=3"]
    assert Path(found[1]).is_file()


@pytest.mark.parametrize("path", ["/a b", "/$HOME", "/a`b`", "/%h", "/a;b", '/a"b', "/a\nb"])
def test_paths_that_deepspeed_would_change_are_refused(path: str) -> None:
    fine = {"python": "/venv-3.11/bin/python", "folder": "/runs/my_own", "python_path": "/a:/b", "package": "/p/s.py"}
    check_remote_shell(**fine)
    for field in fine:
        with pytest.raises(InputError, match="which DeepSpeed's launcher cannot pass"):
            check_remote_shell(**{**fine, field: path})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"launcher": "openmpi"}, r"cluster\.hostfile is missing: the openmpi launcher"),
        ({"launcher": "mpich", "hosts": HOSTS, "hostfile": "h"}, r"cluster\.hostfile is h and cluster\.hosts"),
        ({"hosts": HOSTS}, r"cluster\.hosts is set, and cluster\.launcher local"),
        ({"hostfile": "hosts"}, r"cluster\.hostfile is set, and cluster\.launcher local .*use pdsh"),
        ({"launcher": "torchrun", "hostfile": "hosts"}, r"cluster\.hostfile is set, and cluster\.launcher torchrun"),
        ({"launcher": "slurm", "hostfile": "hosts"}, r"cluster\.hostfile is set, .* give it to sbatch or salloc"),
        ({"master_address": "node0"}, r"cluster\.master_address is node0 with cluster\.launcher local"),
        ({"launcher": "torchrun", "ssh_port": 22}, r"cluster\.ssh_port is set"),
        ({"launcher": "pdsh", "hosts": HOSTS, "bind_to_core": True}, r"cluster\.bind_to_core is true"),
        ({"launcher": "pdsh", "hosts": HOSTS, "ssh_port": 0}, r"cluster\.ssh_port is 0"),
        ({"launcher": "pdsh", "hosts": HOSTS, "ssh_user": "-oProxyCommand=x"}, r"cluster\.ssh_user is"),
        ({"launcher": "openmpi", "hosts": HOSTS, "ssh_user": "a b"}, r"cluster\.ssh_user is 'a b'"),
        ({"network_interface": "$(touch x)"}, r"cluster\.network_interface is"),
        ({"launcher": "pdsh", "hosts": HOSTS, "master_address": "$(touch x)"}, r"cluster\.master_address is"),
    ],
)
def test_what_a_launcher_cannot_do_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ClusterConfig(**settings)
