"""Can DeepSpeed's operators be built on this node?

`sparse-zero doctor` starts this script and hands it one line of JSON: ``operators`` (names of classes of
``deepspeed.ops.op_builder``), ``environment``, ``python_path``, ``seconds``. It answers one line for each:
``{"operator": NAME, "seconds": S}`` or with ``"error": TEXT``.

When its time is over or its input ends, the build is given up in the way that takes its lock away: a killed one would
have every later start wait for ever.
"""

import json
import os
import signal
import sys
import threading
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil


class _GivenUp(BaseException):
    """Raised where the build waits: no handler in torch or DeepSpeed takes it for a failed build."""


def _give_up(number: int, frame: Any) -> NoReturn:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # Once: the lock is taken away while it passes.
    for child in psutil.Process().children(recursive=True):  # Compilers.
        with suppress(psutil.Error):
            child.kill()
    raise _GivenUp


def _first_line() -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def _give_up_at_end_of_input() -> None:
    while os.read(0, 1 << 12):
        pass
    os.kill(os.getpid(), signal.SIGALRM)


def _build(name: str) -> None:
    from deepspeed.ops import op_builder

    getattr(op_builder, name)().load(verbose=False)


def main() -> int:
    """Build one after the other; each is cached by torch where ranks will look."""
    asked = json.loads(_first_line() or b"null")
    if asked is None:
        return 1
    os.environ.update(asked["environment"])
    # Its own ninja is found also where the environment is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    sys.path[:] = [*asked["python_path"], *(each for each in sys.path if each != str(Path(__file__).parent))]
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _give_up)
    signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
    threading.Thread(target=_give_up_at_end_of_input, daemon=True).start()
    answers = sys.stdout
    try:
        for name in asked["operators"]:
            since, error = time.monotonic(), ""
            try:
                with redirect_stdout(sys.stderr):
                    _build(name)
            except Exception as problem:  # Of a compiler, of a missing library.
                error = " ".join(f"{type(problem).__name__}: {problem}".split())[:500]
            told = {
                "probe": True,
                "operator": name,
                "seconds": time.monotonic() - since,
                **({"error": error} if error else {}),
            }
            print("\n" + json.dumps(told), file=answers, flush=True)
    except _GivenUp:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
