"""Do one process of every node meet, and how fast do they exchange?

`sparse-zero doctor` starts this script once on every node and hands it one line of JSON: ``rank``, ``names`` of the
nodes in the order of ranks, ``address`` and ``port`` of rank 0, ``backend``, ``num_bytes``, ``environment``,
``python_path``, ``seconds``. It tells how far it has come, one line each, and in the end what it measured:

    {"stage": "started"}    torch is imported
    {"stage": "connected"}  rank 0's node answers at the port
    {"stage": "met", "missing": [names]}   whoever else has come; with nodes missing it is the last line
    {"stage": "joined"}     the process group has had a barrier
    {"stage": "done", "bus_bytes_per_second": ...}

It ends by itself after its time, and when its input ends.
"""

import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

_ROUNDS = 5


def _say(**values: Any) -> None:
    print("\n" + json.dumps({"probe": True, **values}), flush=True)


def _fail(error: BaseException) -> NoReturn:
    _say(error=" ".join(f"{type(error).__name__}: {error}".split())[:500])
    sys.stdout.flush()
    os._exit(1)  # A collective may hang in a thread.


def _leave_at_end_of_input() -> None:
    while os.read(0, 1 << 12):
        pass
    os._exit(1)


def _first_line() -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def _meet(asked: dict[str, Any], deadline: float) -> Any:
    """The store through which all have said that they are there; None where some have not."""
    import torch.distributed as dist

    rank, names = asked["rank"], asked["names"]
    left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    store = dist.TCPStore(  # type: ignore[attr-defined]
        asked["address"], asked["port"], len(names), rank == 0, left, wait_for_workers=False
    )
    _say(stage="connected")
    store.set(f"here-{rank}", "1")
    missing = names
    while missing and time.monotonic() < deadline:
        missing = [name for number, name in enumerate(names) if not store.check([f"here-{number}"])]
        time.sleep(0.05)
    _say(stage="met", missing=missing)
    if rank == 0 and missing:
        time.sleep(1.0)  # The others ask until now.
    return None if missing else store


def _measure(asked: dict[str, Any], store: Any, seconds: float) -> float:
    """Bytes a second of a bus that all-reduces (2 (n - 1) / n of the payload travel), the best of some rounds."""
    import torch
    import torch.distributed as dist

    names = asked["names"]
    dist.init_process_group(
        asked["backend"],
        store=store,
        rank=asked["rank"],
        world_size=len(names),
        timeout=timedelta(seconds=seconds),
    )
    device = torch.device("cuda", 0) if asked["backend"] == "nccl" else torch.device("cpu")

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    ones = torch.ones(1, device=device)
    dist.all_reduce(ones)
    wait()
    _say(stage="joined", num_ranks=int(ones.item()))
    payload = torch.ones(asked["num_bytes"] // 4, device=device)
    best = float("inf")
    for _ in range(_ROUNDS):
        dist.all_reduce(ones)  # Starts all at once, as a barrier does.
        wait()
        started = time.perf_counter()
        dist.all_reduce(payload)
        wait()
        best = min(best, time.perf_counter() - started)
    return 2 * (len(names) - 1) / len(names) * asked["num_bytes"] / best


def main() -> None:
    """Meet, measure, tell."""
    asked = json.loads(_first_line() or b"null")
    if asked is None:
        return
    threading.Thread(target=_leave_at_end_of_input, daemon=True).start()
    ending = threading.Timer(asked["seconds"], os._exit, [1])
    ending.daemon = True
    ending.start()
    deadline = time.monotonic() + asked["seconds"]
    os.environ.update(asked["environment"])
    sys.path[:] = [*asked["python_path"], *(each for each in sys.path if each != str(Path(__file__).parent))]
    try:
        import torch.distributed  # noqa: F401

        _say(stage="started")
        # Half of what is left to meet, the other half to exchange.
        store = _meet(asked, time.monotonic() + (deadline - time.monotonic()) / 2)
        if store is not None:
            speed = _measure(asked, store, max(1.0, deadline - time.monotonic() - 1.0))
            _say(stage="done", bus_bytes_per_second=speed)
            # Rank 0 holds the store: it stays until all have done with it.
            store.set(f"done-{asked['rank']}", "1")
            if asked["rank"] == 0:
                with_all = [f"done-{number}" for number in range(len(asked["names"]))]
                store.wait(with_all, timedelta(seconds=5))
    except Exception as error:
        _fail(error)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
