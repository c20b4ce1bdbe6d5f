"""What does this node have of what a run needs?

`sparse-zero doctor` and `sparse-zero launch` start this script on every node, here or over ssh, and speak with it in
lines of JSON (:mod:`launcher.preflight.asking`); it needs the standard library and psutil alone. Each answer begins on
a line of its own, whatever a login shell has written before, and has the key ``probe``:

    in   the question, see :func:`_sections`       out  the facts, by section
         {"do": "clock"}                           out  {"time": SECONDS}
         {"do": "marks", "names": [...], "seconds": S}  out  {"seen": [...]}
         {"do": "end"}, or the end of the input

All that it writes is one empty file where the run folder is or will be, by which other nodes see whether they have
the same; it is gone when this script has ended. A section that hangs (a name server, a network file system) is told by
name.
"""

import contextlib
import errno
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "numpy")
_OWN_PACKAGES = ("launcher", "models", "sparse_zero")
# Of a file's content, its beginning and its end: a tenth of a second.
_HASHED_BYTES = 64 * 2**20
_DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*")
# As in models.loading, which ranks load it by.
_TOKENIZER_NEEDS_ONE_OF = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# Of a run folder: what is large (launcher.run_folder).
_REPLACED = ("checkpoints", "adapter", "merged")
_POLL_SECONDS = 0.1
# Between two questions.
_PATIENCE_SECONDS = 60.0


def _gathered(sections: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """The results of all sections, each in a thread; ``{"error": ...}`` where one raised, or hangs."""
    found: dict[str, Any] = {}

    def answer(name: str, section: Callable[[], Any]) -> None:
        try:
            found[name] = section()
        except Exception as error:  # Whatever it is, the other sections are told.
            found[name] = {"error": f"{type(error).__name__}: {error}"}

    threads = [threading.Thread(target=answer, args=each, daemon=True) for each in sections.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    hanging = {"error": f"no answer within {seconds:g} seconds"}
    return {name: found.get(name, hanging) for name in sections}


def _of_launcher(name: str) -> dict[str, Any]:
    """What a file of the guards defines; by its path: imported, it would hide which copy the ranks will find."""
    return runpy.run_path(str(Path(__file__).resolve().parents[1] / "starting" / name))


# --- software ---------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Of Python and of what a run computes with; None where it is not installed. Nothing is imported."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def code() -> dict[str, Any]:
    """Hash of this package's modules, as ranks would import them, and where they are; None where they are not."""
    digest, where = hashlib.sha256(), {}
    for package in _OWN_PACKAGES:
        spec = importlib.util.find_spec(package)
        where[package] = None if spec is None or spec.origin is None else str(Path(spec.origin).parent)
        if where[package] is not None:
            folder = Path(where[package] or "")
            for path in sorted(folder.rglob("*.py")):
                content = path.read_bytes()
                digest.update(f"{package}/{path.relative_to(folder)} {len(content)}\n".encode(errors="replace"))
                digest.update(content)
    return {"digest": digest.hexdigest(), "where": where}


# --- machine ----------------------------------------------------------------------------------------------------


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """The rows of ``nvidia-smi --query-gpu=index,driver_version,memory.total,memory.used,name``, memory in bytes."""
    found = []
    for line in text.splitlines():
        index, driver, total, used, name = [part.strip() for part in [*line.split(",", 4), "", "", "", ""][:5]]
        if index.isdecimal():
            sizes = [None if number is None else number * 2**20 for number in (_number(total), _number(used))]
            found.append(
                {"index": int(index), "driver": driver, "total_bytes": sizes[0], "used_bytes": sizes[1], "name": name}
            )
    return found


def _gpus(seconds: float) -> Any:
    """What nvidia-smi says; an empty list without it."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "--query-gpu=index,driver_version,memory.total,memory.used,name"
    asked = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        return {"error": " ".join((done.stdout + done.stderr).split()) or f"nvidia-smi ends with {done.returncode}"}
    return parse_gpus(done.stdout)


def _memory() -> dict[str, int]:
    memory = psutil.virtual_memory()
    total = min(memory.total, _of_launcher("control_groups.py")["group_limit"]() or memory.total)
    return {"total_bytes": total, "available_bytes": min(total, memory.available)}


def _shared_memory() -> dict[str, int]:
    usage = shutil.disk_usage("/dev/shm")
    return {"total_bytes": usage.total, "free_bytes": usage.free}


def _open_files() -> dict[str, int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    return {"soft": 2**31 if soft == unlimited else soft, "hard": 2**31 if hard == unlimited else hard}


# --- network ----------------------------------------------------------------------------------------------------


def _interfaces() -> dict[str, Any]:
    """IPv4 address of each interface that others may reach, and all addresses."""
    everything = [
        each.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for each in addresses
        if each.family in (socket.AF_INET, socket.AF_INET6)
    ]
    reachable = _of_launcher("addresses.py")["reachable_addresses"]()
    return {"host": socket.gethostname(), "interfaces": reachable, "addresses": everything}


def _resolved(name: str) -> list[str]:
    return sorted({str(each[4][0]) for each in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})


def _names(names: Sequence[str], seconds: float) -> dict[str, Any]:
    """The addresses of each name, or why it has none; asked for at once, since each may take a name server's time."""
    return _gathered({name: lambda name=name: _resolved(name) for name in names}, seconds)  # type: ignore[misc]


def _port(port: int | None) -> dict[str, Any]:
    """Whether one may listen there, as ranks do where they meet, and who does."""
    if port is None:
        return {}
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            probe = socket.socket(family, socket.SOCK_STREAM)
        except OSError:  # No IPv6 here.
            continue
        with probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind(("", port))
                probe.listen(1)
            except OSError as error:
                if family == socket.AF_INET6 and error.errno != errno.EADDRINUSE:
                    continue
                return {"problem": error.strerror, "listener": _listener(port)}
    return {}


def _listener(port: int) -> str:
    """Name and number of the process that listens on a port; empty where that is not to be seen."""
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections(kind="tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return f"{psutil.Process(each.pid).name()}, process {each.pid}"
    return ""


# --- files ------------------------------------------------------------------------------------------------------


def content_digest(path: Path) -> str:
    """Hash of a file's size and content; of large ones, of their beginning and end."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{size}\n".encode())
        half = _HASHED_BYTES // 2
        for start, most in ((0, half), (max(half, size - half), half)):
            file.seek(start)
            digest.update(file.read(most))
    return digest.hexdigest()


def _digest_of(paths: Sequence[Path]) -> str:
    parts = [f"{path.name} {content_digest(path)}" for path in paths]
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()


def _weights(folder: Path, gguf_file: str | None) -> list[Path]:
    """Of a model's folder; OSError names what is missing."""
    if gguf_file is not None:
        return [folder / gguf_file]
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole]
    names = set(json.loads(index.read_bytes()).get("weight_map", {}).values())
    return [folder / Path(name).name for name in sorted(names)]


def _tokenizer_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})


def tokenizer_facts(name: str) -> dict[str, Any]:
    """The content of a tokenizer's files.

    Raises:
        FileNotFoundError: its folder has none.
    """
    folder = Path(name)
    if not folder.exists():
        return {"missing": True}
    if not any((folder / each).is_file() for each in _TOKENIZER_NEEDS_ONE_OF):
        raise FileNotFoundError(errno.ENOENT, "no tokenizer.json or tokenizer.model", name)
    files = _tokenizer_files(folder)
    return {"digest": _digest_of(files), "bytes": sum(path.stat().st_size for path in files)}


def model_facts(name: str, gguf_file: str | None, tokenizer: str | None) -> dict[str, Any]:
    """Outline of a model: its config, names and sizes of its weight files, and the content of its tokenizer's files.

    Args:
        name: its folder.
        gguf_file: the file in it that holds everything.
        tokenizer: another place of the tokenizer, which :func:`tokenizer_facts` is about.

    Raises:
        FileNotFoundError: the folder lacks what ranks would load.
    """
    folder = Path(name)
    if not folder.exists():
        return {"missing": True}
    if gguf_file is None and not (folder / "config.json").is_file():
        raise FileNotFoundError(errno.ENOENT, "no config.json", name)
    if gguf_file is None and tokenizer is None:
        tokenizer_facts(name)
    content = (folder / "config.json").read_bytes() if (folder / "config.json").is_file() else b""
    weights = _weights(folder, gguf_file)
    for path in weights:
        with path.open("rb") as file:  # Readable for this user?
            file.read(1)
    lines = [f"{path.name} {path.stat().st_size}" for path in weights]
    outline = hashlib.sha256(content + "\n".join(lines).encode(errors="surrogateescape"))
    outline.update(_digest_of(_tokenizer_files(folder)).encode() if tokenizer is None else b"")
    return {"digest": outline.hexdigest(), "bytes": sum(path.stat().st_size for path in weights)}


def data_facts(name: str, split: str | None) -> dict[str, Any]:
    """Hash of a file, or of those of a folder that a split may be read from."""
    path = Path(name)
    if not path.exists():
        return {"missing": True}
    files = [path]
    if path.is_dir():
        shards = f"{glob.escape(split or '')}-*.parquet"
        files = [path / f"{split}{suffix}" for suffix in _DATA_SUFFIXES]
        files += [found for each in (path, path / "data") for found in each.glob(shards)]
        files = [each for each in files if each.is_file()]
        if not files:
            return {"missing": True, "split": split}
    return {"digest": _digest_of(sorted(files)), "bytes": sum(each.stat().st_size for each in files)}


def folder_facts(name: str) -> dict[str, Any]:
    """Whether files can be made in a folder that must be there; nothing is made."""
    path = Path(name)
    if not path.is_dir():
        return {"problem": "it is a file" if path.exists() else "it is not there"}
    return {} if os.access(path, os.W_OK | os.X_OK) else {"problem": "it is not writable for this user"}


def _held_bytes(folder: Path) -> int:
    """Of what a run replaces as it goes on; what goes away meanwhile does not count."""
    total = 0
    for kind in _REPLACED:
        for where, _, names in os.walk(folder / kind):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(where, name)).st_size
    return total


def _output(folder: str, mark: str) -> dict[str, Any]:
    """Where files of the run would be made, whether they can be (by making the mark), and the room there."""
    path = Path(folder)
    existing = next(parent for parent in [path, *path.parents] if os.path.lexists(parent))
    found: dict[str, Any] = {"existing": str(existing)}
    if not existing.is_dir():
        return {**found, "problem": "it is a file"}
    usage = shutil.disk_usage(existing)
    found.update(free_bytes=usage.free, total_bytes=usage.total, held_bytes=_held_bytes(path))
    _MADE.append(existing / mark)
    try:
        os.close(os.open(existing / mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        found["problem"] = error.strerror
    return found


# What is to be removed in the end.
_MADE: list[Path] = []


def _seen(folder: str, names: Sequence[str], seconds: float) -> list[str]:
    """Those of the names that are in a folder; until all are there, or the time is over.

    Each is asked for by its name: a network file system may answer from an old listing of the folder.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = [name for name in names if (Path(folder) / name).exists()]
        if len(found) == len(names) or time.monotonic() > deadline:
            return found
        time.sleep(_POLL_SECONDS)


# --- operators that are compiled on the node --------------------------------------------------------------------


def _cache_folder(environment: Mapping[str, str]) -> Path:
    """Where the ranks' torch keeps what it compiles: by its version and Python's, or where it is told."""
    named = environment.get("TORCH_EXTENSIONS_DIR") or os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    kind = "cpu"
    spec = importlib.util.find_spec("torch")  # Does not import it.
    if spec is not None and spec.origin is not None:
        with contextlib.suppress(OSError):
            version = runpy.run_path(str(Path(spec.origin).parent / "version.py"))
            hip, cuda = version.get("hip"), version.get("cuda")
            kind = f"rocm{hip}" if hip is not None else "cpu" if cuda is None else f"cu{cuda}"
    return usual / f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}_{kind.replace('.', '')}"


def _holder(path: Path) -> str:
    """The process that has a file open, which torch's builds have as long as they run; empty if none is seen."""
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            for each in os.scandir(f"/proc/{process.pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.path.samefile(each.path, path):
                        return f"{process.name()}, process {process.pid}"
    return ""


def _locks(folder: Path, operators: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Of the operators that are wanted: others, and those of other projects, keep no rank waiting."""
    for operator in operators:
        path = folder / operator / "lock"
        with contextlib.suppress(OSError):
            status = path.stat()
            yield {
                "operator": operator,
                "path": str(path),
                "age_seconds": max(0.0, time.time() - status.st_mtime),
                # Of one file that several nodes see, one of them knows who holds it.
                "identity": f"{status.st_ino} {status.st_mtime_ns}",
                "holder": _holder(path),
                # Into processes of others nobody but root can look.
                "is_sure": os.geteuid() in (0, status.st_uid),
            }


def _is_built(name: str, folder: Path) -> bool:
    if (folder / name / f"{name}.so").is_file():
        return True
    spec = importlib.util.find_spec("deepspeed")  # Does not import it.
    installed = Path(spec.origin).parent / "ops" if spec is not None and spec.origin else None
    return installed is not None and any(installed.rglob(f"{name}_op*.so"))


def _build_cache(operators: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    folder = _cache_folder(environment)
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    beside = str(Path(sys.executable).parent)  # Of a virtual environment that is not activated.
    tools = {"a C++ compiler": os.environ.get("CXX") or "c++", "ninja": "ninja"}
    search = os.pathsep.join([os.environ.get("PATH", ""), beside])
    return {
        "folder": str(folder),
        "is_writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "locks": list(_locks(folder, operators)),
        "missing": [name for name in operators if not _is_built(name, folder)],
        "no_tools": [what for what, tool in tools.items() if shutil.which(tool.split()[0], path=search) is None],
    }


# --- the conversation -------------------------------------------------------------------------------------------


def _sections(question: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is asked, by name; see :class:`launcher.preflight.wanted.Wanted` for the question."""
    seconds = question["seconds"]
    model = question["model"]
    sections: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "code": code,
        "gpus": lambda: _gpus(seconds),
        "memory": _memory,
        "shared_memory": _shared_memory,
        "open_files": _open_files,
        "network": _interfaces,
        "names": lambda: _names(question["names"], 0.8 * seconds),
        "port": lambda: _port(question["port"]),
        "model": lambda: model_facts(model["name"], model["gguf_file"], model["tokenizer"]),
        "tokenizer": lambda: {} if model["tokenizer"] is None else tokenizer_facts(model["tokenizer"]),
        "output": lambda: _output(question["output"], question["mark"]),
        "build_cache": lambda: _build_cache(question["operators"], question["environment"]),
    }
    for field, folder in question["folders"].items():
        sections[field] = lambda folder=folder: folder_facts(folder)  # type: ignore[misc]
    for field, each in question["files"].items():
        sections[field] = lambda each=each: data_facts(each["path"], each["split"])  # type: ignore[misc]
    return sections


def _lines() -> Iterator[Any]:
    """What is asked, until the other side has gone, or has been silent for too long: it may be cut off."""
    unread = b""
    while select.select([0], [], [], _PATIENCE_SECONDS)[0]:
        data = os.read(0, 1 << 16)
        if not data:
            return
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _say(value: Mapping[str, Any]) -> None:
    print("\n" + json.dumps({"probe": True, **value}), flush=True)


def _leave(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def _answer(question: Mapping[str, Any], more: Iterator[Any]) -> None:
    # As ranks have it: the folder of this script is not among them.
    sys.path[:] = [*question["python_path"], *(each for each in sys.path if each != str(Path(__file__).parent))]
    facts = _gathered(_sections(question), question["seconds"])
    _say(facts)
    for asked in more:
        if asked["do"] == "clock":
            _say({"time": time.time()})
        elif asked["do"] == "marks":
            _say({"seen": _seen(facts["output"]["existing"], asked["names"], asked["seconds"])})
        else:
            return


def main() -> int:
    """Answer until told to end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        lines = _lines()
        question = next(lines, None)
        if question is not None:
            with contextlib.suppress(BrokenPipeError):
                _answer(question, lines)
    finally:
        for path in _MADE:
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(0)  # A section may still hang in a thread.


if __name__ == "__main__":
    sys.exit(main())
