"""By which addresses may other nodes reach this one?"""

import os
import socket

import psutil


def reachable_addresses() -> dict[str, str]:
    """The IPv4 address of every interface that other nodes may reach."""
    found: dict[str, str] = {}
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                found.setdefault(name, each.address)
    # First the one that ssh came by: others may be bridges of containers, which every node has.
    reached = os.environ.get("SSH_CONNECTION", "").split()[2:3]
    return dict(sorted(found.items(), key=lambda item: item[1] not in reached))
