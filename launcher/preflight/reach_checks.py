"""Can every node be reached, do all mean the same machines by their names, and do their clocks agree?"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any

from launcher.preflight.asking import Answers, Silence
from launcher.preflight.findings import Finding
from launcher.preflight.wanted import Wanted, host_of

# What OpenSSH says, what it means, and what mends it; the first that fits. {node}, {host} and {ssh} are filled in.
_SSH_SAYS = (
    (
        r"could not resolve hostname",
        "its name is not known here",
        "correct the name in the hostfile, or add it to DNS or to /etc/hosts on this machine",
    ),
    (
        r"remote host identification has changed",
        "it has another host key than the one that ssh knows: the machine was made anew, or another answers for it",
        "if it was made anew: ssh-keygen -R {host}, then connect once by hand and compare the fingerprint",
    ),
    (
        r"no \S+ host key is known|host key verification failed",
        "its host key is not known to ssh",
        "connect once by hand ({ssh}) and compare the fingerprint, or add the key to known_hosts",
    ),
    (
        r"permission denied",
        "ssh is refused (permission denied)",
        "put your public key on it (ssh-copy-id {node}), load the key into the agent, or correct cluster.ssh_user",
    ),
    (
        r"connection refused",
        "nothing listens on its ssh port (connection refused)",
        "start sshd there, or set the right cluster.ssh_port",
    ),
    (
        r"timed out|no route to host|network is unreachable|host is down",
        "there is no way to it ({said})",
        "see whether it runs and is in this network, and whether a firewall drops ssh",
    ),
)
_PYTHON_MISSING = r"(?:not found|no such file or directory|cannot execute)"
# From here on dates in logs and files of nodes cannot be compared by eye; from there on certificates, tokens and leases
# of file systems are refused.
WARN_CLOCK_SECONDS, FAIL_CLOCK_SECONDS = 1.0, 30.0


def explain_silence(node: str, silence: Silence, *, python: str) -> Finding:
    """Why a node has told nothing, and what mends it, by what ssh and the node said.

    Args:
        node: its name.
        silence: what was seen.
        python: the interpreter that was to be started there.
    """
    lines = [line.strip() for line in silence.said.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    what, remedy = "", ""
    if silence.code in (255, None):
        for pattern, meaning, mends in _SSH_SAYS:
            said = next((line for line in lines if re.search(pattern, line, re.IGNORECASE)), None)
            if said is not None:
                reason = said.rpartition(": ")[2].rstrip(".").lower()
                what = meaning.format(said=reason)
                remedy = mends.format(node=node, host=host_of(node), ssh=f"ssh {node}")
                break
    elif re.search(r"node_probe\.py", silence.said) and re.search(_PYTHON_MISSING, silence.said, re.IGNORECASE):
        what = "this package is not at the same place there"
        remedy = f"install it there as it is here ({last})"
    elif silence.code in (126, 127):
        what = f"the interpreter {python} cannot be started there"
        remedy = "install the same environment at the same path on every node"
    elif "No module named 'psutil'" in silence.said:
        what = "psutil is missing there"
        remedy = "install the same environment at the same path on every node"
    if not what and silence.code is None:
        what = f"no answer within {silence.seconds:.0f} seconds"
        remedy = (
            f"see whether it runs and is not overloaded (ssh {node}), and whether its home and the package's folder "
            "can be read; cluster.node_timeout is the time that it has"
        )
    if not what:
        what = f"it could not be asked (code {silence.code}): {last or 'nothing was said'}"
        remedy = f"try it by hand: ssh {node} {python} --version"
    return Finding(node=node, check="reachable", status="fail", what=what, remedy=remedy)


def check_reachable(wanted: Wanted, answers: Answers, *, python: str) -> list[Finding]:
    """A row for every node."""
    found = []
    for node in wanted.nodes:
        if node.name in answers.silent:
            found.append(explain_silence(node.name, answers.silent[node.name], python=python))
        else:
            host = answers.facts[node.name]["network"].get("host", "")
            found.append(Finding(node=node.name, check="reachable", what=f"it answers as {host}" if host else "yes"))
    return found


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def check_names(wanted: Wanted, answers: Answers) -> list[Finding]:
    """Whether each node resolves the others' names, and where ranks meet, to addresses that these have.

    Ranks go by the address of the node on which rank 0 is. A name that a node does not know is therefore a failure
    only for what ``cluster.master_address`` says; a name by which it means another node always is.
    """
    if not wanted.several:
        return []
    own: dict[str, set[str]] = {}
    for name, facts in answers.facts.items():
        own[name] = set(facts["network"].get("addresses", ()))
    hosts = {host_of(node.name): node.name for node in wanted.nodes}
    if wanted.master_address is not None and wanted.master is not None:
        hosts[wanted.master_address] = wanted.master
    found = []
    for node, facts in answers.facts.items():
        if isinstance(facts["names"].get("error"), str):
            found.append(
                Finding(
                    node=node,
                    check="names",
                    status="warn",
                    what=f"names could not be asked for: {facts['names']['error']}",
                    remedy="see whether its name servers answer",
                )
            )
            continue
        problems = [
            problem
            for name, resolved in facts["names"].items()
            if (problem := _name_problem(wanted, node, name, resolved, hosts.get(name), own)) is not None
        ]
        problems += _interface_problems(wanted, node, facts["network"])
        found += problems or [Finding(node=node, check="names", what="every name means the same machine")]
    return found


def _name_problem(
    wanted: Wanted, node: str, name: str, resolved: Any, target: str | None, own: Mapping[str, set[str]]
) -> Finding | None:
    is_master = name == wanted.master_address
    if isinstance(resolved, dict):
        return Finding(
            node=node,
            check="names",
            status="fail" if is_master else "warn",
            what=f"{name} has no address there ({resolved['error']})",
            remedy=f"add it to DNS, or the same line for it to /etc/hosts on all nodes{_or_address(is_master)}",
            lets_launch=True,  # In a job that is just starting it may get one: torch asks again and again.
        )
    if target is None or target not in own or set(resolved) & own[target]:
        loops = target not in (None, node) and resolved and all(map(_is_loopback, resolved))
        if not loops:
            return None
    shown = ", ".join(resolved)
    other = next((each for each, addresses in own.items() if each != target and set(resolved) & addresses), None)
    if target != node and all(map(_is_loopback, resolved)):
        other = node
    if target == node and resolved and all(map(_is_loopback, resolved)):  # As Debian's installer writes it.
        return Finding(
            node=node,
            check="names",
            status="warn",
            what=f"by its own name {name} it means {shown}, which others cannot reach",
            remedy=f"make it its address in the nodes' network, in /etc/hosts{_or_address(is_master)}",
        )
    remedy = f"make it one address of {target} in /etc/hosts or DNS, on all nodes alike{_or_address(is_master)}"
    if other is not None:
        means = "itself" if other == node else other
        return Finding(
            node=node, check="names", status="fail", what=f"by {name} ({shown}) it means {means}", remedy=remedy
        )
    return Finding(
        node=node,
        check="names",
        status="fail" if is_master else "warn",
        what=f"by {name} it means {shown}, which {target} does not have",
        remedy=remedy,
    )


def _or_address(is_master: bool) -> str:
    return "; or give cluster.master_address as an address" if is_master else ""


def _interface_problems(wanted: Wanted, node: str, network: Mapping[str, Any]) -> list[Finding]:
    interface, present = wanted.config.cluster.network_interface, network.get("interfaces")
    if interface is None or present is None or interface in present:
        return []
    return [
        Finding(
            node=node,
            check="names",
            status="fail",
            what=f"it has no interface {interface} with an address (it has {', '.join(present) or 'none'})",
            remedy="set cluster.network_interface to one that all nodes have, or leave it out",
        )
    ]


def check_clocks(wanted: Wanted, answers: Answers) -> list[Finding]:
    """Whether the nodes' clocks are near this machine's; only what is sure counts, half a round trip left out."""
    found = []
    for node, clock in answers.clocks.items():
        off = max(0.0, abs(clock.ahead_seconds) - clock.within_seconds)
        side = "ahead of" if clock.ahead_seconds > 0 else "behind"
        what = f"{abs(clock.ahead_seconds):.3g} s {side} this machine"
        if off < WARN_CLOCK_SECONDS:
            found.append(Finding(node=node, check="clock", what=f"within {max(0.001, off):.2g} s of this machine"))
            continue
        found.append(
            Finding(
                node=node,
                check="clock",
                status="fail" if off >= FAIL_CLOCK_SECONDS else "warn",
                what=f"its clock is {what}",
                remedy="have chrony or systemd-timesyncd set it (chronyc makestep; timedatectl set-ntp true)",
            )
        )
    return found
