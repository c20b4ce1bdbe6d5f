"""Which nodes are there, and which of them does a start of the run have?"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.starting.cluster_config import ClusterConfig
from sparse_zero.errors import InputError

# From the name of a node, and a command as an argument list, to the argument list that runs it on that node.
Reach = Callable[[str, Sequence[str]], list[str]]


@dataclass(frozen=True)
class Node:
    """A machine and the ranks that it takes."""

    name: str
    slots: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the command of one start is made from."""

    nodes: tuple[Node, ...]
    # Restarts before this one, over the whole run.
    restarts: int
    # For the ranks' config and environment, and their exit codes, on every node.
    record: str
    # Of each node by name: IPv4 addresses by interface.
    addresses: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def read_nodes(cluster: ClusterConfig) -> list[Node]:
    """The nodes that ``cluster`` names, in their order.

    Raises:
        InputError: the hostfile cannot be read, has a line that is not ``name slots=N``, names a node twice, or none;
            or nodes are included or excluded that are not there, or none is left.
    """
    if cluster.hostfile is not None:
        nodes = _read_hostfile(Path(cluster.hostfile))
    else:
        nodes = _parse_nodes(cluster.hosts, "cluster.hosts", "entry")
    names = [node.name for node in nodes]
    for name in ("include", "exclude"):
        for each in getattr(cluster, name):
            if each not in names:
                nearest = difflib.get_close_matches(each, names, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(names)}"
                raise InputError(f"cluster.{name} names {each!r}, which is no node of the cluster: {hint}")
    left = [
        node for node in nodes
        if node.name not in cluster.exclude and (not cluster.include or node.name in cluster.include)
    ]  # fmt: skip
    if not left:
        raise InputError("cluster.include and cluster.exclude leave no node: change one of them")
    return left


def _read_hostfile(path: Path) -> list[Node]:
    if not path.is_file():
        raise InputError(f"cluster.hostfile is {path}, which is no file: it needs a line 'name slots=8' a node")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cluster.hostfile is {path}, which cannot be read ({error}): check the file") from error
    return _parse_nodes(lines, f"cluster.hostfile {path}", "line")


def _parse_nodes(lines: Sequence[str], source: str, unit: str) -> list[Node]:
    nodes: list[Node] = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9_][\w.:@-]*)\s+slots=(\d+)(?:\s.*)?", line, re.ASCII)
        if match is None or not int(match[2]):
            raise InputError(f"{source}, {unit} {number} is {line!r}: write 'name slots=8'")
        # Of several colons it is an address of IPv6.
        if re.fullmatch(r"[^:]+:\d+", match[1]):
            raise InputError(
                f"{source}, {unit} {number} is {line!r}, a name with a port: write the name alone, and the port of all "
                "nodes as cluster.ssh_port"
            )
        if match[1] in [node.name for node in nodes]:
            raise InputError(f"{source} names {match[1]} twice: remove {unit} {number}")
        nodes.append(Node(match[1], int(match[2])))
    if not nodes:
        raise InputError(f"{source} names no node: it needs a line 'name slots=8' for each")
    return nodes


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many ranks a start may have."""

    least: int
    most: int


def _source(cluster: ClusterConfig) -> str:
    """Where the nodes are named."""
    if cluster.launcher == "slurm":
        return "the allocation"
    return cluster.hostfile or ("cluster.hosts" if cluster.hosts else "this machine")


def limits_of(cluster: ClusterConfig, nodes: Sequence[Node]) -> Limits:
    """The limits of a run whose hostfile has these nodes.

    Raises:
        InputError: the hostfile has fewer nodes than ``cluster.num_nodes``, or the limits leave out the first start.
    """
    if cluster.num_nodes > len(nodes):
        raise InputError(
            f"cluster.num_nodes is {cluster.num_nodes}, and {_source(cluster)} has {len(nodes)} "
            "nodes: add nodes or lower it"
        )
    usual = sum(node.slots for node in nodes[: cluster.num_nodes])
    most = usual if cluster.max_world_size is None else cluster.max_world_size
    least = min(usual, most) if cluster.min_world_size is None else cluster.min_world_size
    if not choose_nodes(nodes, Limits(least=least, most=most)):
        raise InputError(
            f"no choice of whole nodes ({', '.join(f'{node.name}: {node.slots} ranks' for node in nodes)}) has between "
            f"{least} and {most} ranks: change cluster.min_world_size or cluster.max_world_size"
        )
    return Limits(least=least, most=most)


def choose_nodes(answering: Sequence[Node], limits: Limits) -> tuple[Node, ...]:
    """The first nodes that together have no more than the most ranks; none where they are fewer than the least."""
    chosen: list[Node] = []
    for node in answering:
        if sum(each.slots for each in [*chosen, node]) <= limits.most:
            chosen.append(node)
    return tuple(chosen) if sum(node.slots for node in chosen) >= limits.least else ()


def standing_by(cluster: ClusterConfig, nodes: Sequence[Node], chosen: Sequence[Node]) -> str | None:
    """What is to be said of nodes that a start does not use; None where it uses all."""
    if len(chosen) == len(nodes):
        return None
    names = ", ".join(node.name for node in nodes if node not in chosen)
    limit = f"cluster.num_nodes is {cluster.num_nodes}"
    if cluster.max_world_size is not None:
        limit = f"cluster.max_world_size is {cluster.max_world_size}"
    return f"{len(chosen)} of {len(nodes)} nodes of {_source(cluster)} are used ({limit}); standing by: {names}"


def master_of(cluster: ClusterConfig, usual: Node, start: Start) -> str:
    """Address of the rendezvous: the config's while its node is the first one, else one of the node that is."""
    if cluster.master_address is not None and start.nodes[0] == usual:
        return cluster.master_address
    found = start.addresses.get(start.nodes[0].name, {})
    if cluster.launcher == "slurm" and cluster.network_interface is None:
        return start.nodes[0].name
    if cluster.network_interface is not None and cluster.network_interface in found:
        return found[cluster.network_interface]
    return next(iter(found.values()), start.nodes[0].name.rpartition("@")[2])
