"""By which groups does the kernel count and limit a process's memory, and which has it ended for want of it?"""

import contextlib
import re
from pathlib import Path

# Without a limit, version 2 says "max", version 1 a number near 2**63.
_NO_LIMIT = 2**60


def memory_groups(
    pid: int | str = "self", proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")
) -> tuple[Path, Path]:
    """Folders of the control groups by which the kernel counts the memory of ``pid``: versions 1 and 2."""
    names: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in (proc / str(pid) / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            names.update({each: path.lstrip("/") for each in controllers.split(",")})
    return groups / "memory" / names.get("memory", ""), groups / names.get("", "")


def group_limit(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the control groups of this process may take, by the tightest of them; 0 where none has a limit.

    A batch system limits a group somewhere above the one in which the process is.

    Args:
        proc: where the kernel shows processes.
        groups: where it shows control groups.
    """
    old, new = memory_groups("self", proc, groups)
    limits = []
    for group, name, root in ((old, "memory.limit_in_bytes", groups / "memory"), (new, "memory.max", groups)):
        # In a container the path may be that on its host, and the root is the container's own group.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                with contextlib.suppress(OSError, ValueError):
                    limits.append(int((folder / name).read_text()))
    return min((limit for limit in limits if limit < _NO_LIMIT), default=0)


def oom_counter(pid: int | str = "self", proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Path:
    """The file that counts how many processes the kernel has ended for want of memory in the control group of ``pid``.

    Where groups do not tell, that of the whole machine.
    """
    old, new = memory_groups(pid, proc, groups)
    # Either version, and either where a container sees its own group as the root.
    candidates = (old / "memory.oom_control", new / "memory.events", groups / "memory" / "memory.oom_control")
    return next((path for path in candidates if _counted(path) is not None), proc / "vmstat")


def _counted(counter: Path) -> int | None:
    with contextlib.suppress(OSError):
        match = re.search(r"^oom_kill (\d+)$", counter.read_text(encoding="utf-8"), re.MULTILINE)
        return int(match[1]) if match else None
    return None


def oom_kills(counter: Path) -> int:
    """How many processes the kernel has ended for want of memory, by a file of :func:`oom_counter`."""
    return _counted(counter) or 0
