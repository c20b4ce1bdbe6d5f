"""Does the doctor name what is wrong on nodes that only ssh connects, within its time, and leave nothing behind?"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.cluster import Cluster, skip_without_cluster
from tests.launcher.test_nodes import launch, pythons, short_run, variables, write_cluster_config

ROOT = Path(__file__).parents[2]
# Of a node that does not answer; of the whole doctor without the network's part.
TIMEOUT, BOUND = 8.0, 45.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _can_be_made():
    skip_without_cluster("pdsh")


def written(base, folder, num_nodes, **settings):
    section = {"node_timeout": TIMEOUT, **settings.pop("cluster", {})}
    changes = {"output__shared": True, **short_run(2), **settings}
    return write_cluster_config(base, folder, num_nodes, **changes, cluster=section)


def ask(cluster, config, *options, node="node0"):
    """(exit code, what was found, seconds); nothing may be left of it on any node."""
    since = time.monotonic()
    command = [sys.executable, "-m", "launcher", "doctor", "--config", str(config), "--json", *options]
    done = subprocess.run(
        cluster.command(node, command, cwd=config.parent),
        env=cluster.environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    seconds = time.monotonic() - since
    deadline = time.monotonic() + 5
    while (left := [name for name in cluster.names if pythons(cluster, name)]) and time.monotonic() < deadline:
        time.sleep(0.05)  # sshd ends them a moment after ssh is gone.
    assert not left, done.stderr
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), seconds


def failed(told):
    return {(each["node"], each["check"]) for each in told["findings"] if each["status"] == "fail"}


def texts(told, node, check):
    return [
        f"{each['what']} -> {each['remedy']}"
        for each in told["findings"]
        if (each["node"], each["check"]) == (node, check)
    ]


def listing(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_three_nodes_in_order(base, tmp_path):
    config = written(base, tmp_path, 3)
    before = listing(tmp_path)
    with Cluster(3, environment=variables()) as cluster:
        code, told, _ = ask(cluster, config)
    assert code == 0, told
    assert told["ok"]
    assert not failed(told)
    assert told["nodes"] == ["node0", "node1", "node2"]
    for node in told["nodes"]:
        (network,) = texts(told, node, "network")
        assert "GB/s between 3 nodes" in network
        assert texts(told, node, "reachable") == [f"it answers as {node} -> "]
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("way", "what"),
    [
        ("kill", "there is no way to it (no route to host)"),
        ("cut", "there is no way to it (no route to host)"),
        ("key", "its host key is not known to ssh"),
        ("user", "ssh is refused (permission denied)"),
        ("name", "its name is not known here"),
        ("port", "nothing listens on its ssh port (connection refused)"),
        ("changed", "it has another host key than the one that ssh knows"),
    ],
)
def test_a_node_that_cannot_be_reached(way, what, base, tmp_path):
    config = written(base, tmp_path, 2)
    if way == "name":
        (tmp_path / "hosts").write_text("node0 slots=1\nnode1x slots=1\n")
    name = "node1x" if way == "name" else "node1"
    with Cluster(2, environment=variables()) as cluster:
        # Of what ssh reads on the asking node alone.
        keys = tmp_path / "known_hosts"
        if way in ("kill", "cut"):
            getattr(cluster, way)("node1")
        elif way in ("key", "changed"):
            present = cluster.run("node0", ["cat", "/etc/ssh/host.pub"])
            other = tmp_path / "other"
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
            wrong = f"node1 {(tmp_path / 'other.pub').read_text()}" if way == "changed" else ""
            keys.write_text(f"node0 {present}{wrong}")
            cluster.run("node0", ["mount", "--bind", str(keys), "/etc/ssh/known_hosts"])
        elif way == "user":
            cluster.run("node1", ["mount", "--bind", "/dev/null", "/etc/ssh/user.pub"])
        elif way == "port":
            settings = tmp_path / "ssh_config"
            settings.write_text("Host node1\n  Port 2222\n" + cluster.run("node0", ["cat", "/etc/ssh/ssh_config"]))
            cluster.run("node0", ["mount", "--bind", str(settings), "/etc/ssh/ssh_config"])
        code, told, seconds = ask(cluster, config)
    assert code == 2
    assert seconds < BOUND
    assert failed(told) == {(name, "reachable")}
    (text,) = texts(told, name, "reachable")
    assert text.startswith(what)
    assert text.partition(" -> ")[2]
    # The others are told of all the same.
    assert texts(told, "node0", "code")


def test_a_node_that_hangs(base, tmp_path):
    """It takes the connection, and then nothing more comes of it."""
    config = written(base, tmp_path, 2)
    with Cluster(2, environment=variables()) as cluster:
        slow = tmp_path / "slow"
        slow.write_text("#!/bin/sh\nexec cat > /dev/null\n")
        slow.chmod(0o755)
        cluster.run("node1", ["mount", "--bind", str(slow), str(Path(sys.executable).resolve())])
        code, told, seconds = ask(cluster, config)
        cluster.kill("node1")
    assert code == 2
    assert seconds < BOUND
    assert failed(told) == {("node1", "reachable")}
    assert texts(told, "node1", "reachable")[0].startswith(f"no answer within {TIMEOUT:.0f} seconds")


def test_what_differs_between_nodes_is_named(base, tmp_path):
    """Another version of the code, other data, no model, another hosts file, a full disk, a taken port, a stale lock."""
    own = {name: tmp_path / name for name in ("code", "files", "disk", "cache")}
    for folder in own.values():
        folder.mkdir()
    settings = {
        "data__train": str(own["files"] / "train.json"),
        "model__name_or_path": str(own["files"] / "model"),
        "output__folder": str(own["disk"] / "run"),
        "output__shared": False,
    }
    config = written(base, tmp_path, 3, **settings, cluster={"master_port": 29517})
    environment = {**variables(), "PYTHONPATH": str(own["code"]), "TORCH_EXTENSIONS_DIR": str(own["cache"])}
    with Cluster(3, environment=environment, private=list(own.values())) as cluster:
        inside = {name: {each: cluster.inside(name, own[each]) for each in own} for name in cluster.names}
        for name in cluster.names:
            for package in ("launcher", "models", "sparse_zero"):
                shutil.copytree(ROOT / package, inside[name]["code"] / package)
            shutil.copytree(base / "model", inside[name]["files"] / "model")
            shutil.copy(base / "data" / "train.json", inside[name]["files"])
        with (inside["node1"]["code"] / "models" / "loss.py").open("a") as file:
            file.write("# another version\n")
        records = json.loads((inside["node2"]["files"] / "train.json").read_text())
        (inside["node2"]["files"] / "train.json").write_text(json.dumps(records[1:]))
        shutil.rmtree(inside["node1"]["files"] / "model")
        hosts = tmp_path / "other_hosts"
        hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.1 node1\n10.77.0.3 node2\n")
        cluster.run("node2", ["mount", "--bind", str(hosts), "/etc/hosts"])
        cluster.run("node1", ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(own["disk"])])
        (inside["node0"]["cache"] / "deepspeed_shm_comm").mkdir()
        lock = inside["node0"]["cache"] / "deepspeed_shm_comm" / "lock"
        lock.touch()
        os.utime(lock, (time.time() - 700.0,) * 2)  # Longer ago than any build takes.
        listens = (
            "import socket, time; s = socket.create_server(('', 29517)); print('listening', flush=True); time.sleep(99)"
        )
        listener = subprocess.Popen(
            cluster.command("node0", ["/usr/bin/env", sys.executable, "-c", listens]),
            env=cluster.environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        before = {name: listing(folder) for name in cluster.names for folder in inside[name].values()}
        process = subprocess.run(
            cluster.command("node0", [sys.executable, "-m", "launcher", "doctor", "--config", str(config), "--json", "--no-build"], cwd=tmp_path),
            env=cluster.environment(),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )  # fmt: skip
        assert {name: listing(folder) for name in cluster.names for folder in inside[name].values()} == before
        listener.kill()
        listener.communicate()
    assert process.stdout, process.stderr
    told = json.loads(process.stdout)
    assert process.returncode == 2
    # Where somebody else listens, nobody tries to meet.
    assert failed(told) == {
        ("node1", "code"), ("node2", "data"), ("node1", "model"), ("node2", "names"), ("node1", "disk"),
        ("node0", "port"), ("node0", "build cache"),
    }  # fmt: skip
    assert not texts(told, "node0", "network")
    assert "are not those of node0, node2" in texts(told, "node1", "code")[0]
    assert "train.json is not the same as on node0, node1" in texts(told, "node2", "data")[0]
    assert "is not there" in texts(told, "node1", "model")[0]
    assert "by node1 (10.77.0.1) it means node0" in texts(told, "node2", "names")[0]
    assert "python" in texts(told, "node0", "port")[0]
    assert f"rm {own['cache']}/deepspeed_shm_comm/lock" in texts(told, "node0", "build cache")[0]


def test_nodes_that_meet_but_cannot_exchange(base, tmp_path):
    """Their own addresses, as told to the others, are of an interface that leads nowhere."""
    config = written(base, tmp_path, 2, cluster={"network_interface": "lo"})
    with Cluster(2, environment=variables()) as cluster:
        code, told, seconds = ask(cluster, config)
    assert code == 2
    assert seconds < 100.0
    assert failed(told) == {(node, check) for node in ("node0", "node1") for check in ("names", "network")}
    for node in ("node0", "node1"):
        (text,) = texts(told, node, "network")
        assert text.startswith("it met the others, but could not exchange with them")
        assert "cluster.network_interface" in text


def test_a_folder_that_is_not_shared(base, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    config = written(base, tmp_path, 2, output__folder=str(own / "run"))
    with Cluster(2, environment=variables(), private=[own]) as cluster:
        code, told, _ = ask(cluster, config, "--no-network")
        assert (code, failed(told)) == (2, {("node1", "output")})
        code, told, _ = ask(cluster, config, "--no-network", "--output.shared=auto")
        assert (code, failed(told)) == (0, set())
        assert "each node will keep a copy of the checkpoints" in texts(told, "node1", "output")[0]
        code, told, _ = ask(cluster, config, "--no-network", "--output.shared=false")
        assert "as output.shared: false says" in texts(told, "node1", "output")[0]
        # A launch says the same, before any rank starts.
        process = launch(cluster, "node0", config, tmp_path)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 2
        assert "FAIL node1: output: its output.folder" in output
        assert "error: before the start, output failed on node1 (its output.folder" in output
        assert not [path for name in cluster.names for path in cluster.inside(name, own).iterdir()]


def test_a_launch_begins_without_a_node_that_is_down(base, tmp_path):
    config = written(base, tmp_path, 2, cluster={"min_world_size": 1})
    with Cluster(2, environment=variables()) as cluster:
        cluster.kill("node1")
        process = launch(cluster, "node0", config, tmp_path)
        output = process.communicate(timeout=200)[0]
        assert not pythons(cluster, "node0")
    assert process.returncode == 0, output[-4000:]
    assert "warn node1: reachable: there is no way to it (no route to host)" in output
    assert "nodes that do not answer are left out (node1: " in output
