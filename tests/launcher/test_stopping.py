"""Do signals become requests or ends where they should, also behind a closed terminal and inside of a deaf library?"""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from launcher.stopping import SIGNALS, Stopped, stop_requests, stoppable
from tests.launcher.test_train import ROOT


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_while_somebody_looks_and_an_end_where_nobody_does(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped) as stopped, stoppable():
        signal.raise_signal(number)
    assert stopped.value.signal == number
    assert str(stopped.value) == f"stopped by signal {int(number)}"
    with stoppable() as outer:
        with stop_requests() as request:
            assert request is outer
            signal.raise_signal(number)
            assert request.signal == number
        # Nobody has looked at it: it can be asked for later, and what follows of it does not disturb.
        assert outer.signal == number
        signal.raise_signal(signal.SIGTERM)
        assert outer.signal == number
    with stop_requests() as request:  # On its own, too.
        signal.raise_signal(number)
        assert request.signal == number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_only_a_second_interrupt_of_a_person_ends_what_is_being_saved(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with pytest.raises(Stopped) as stopped, stop_requests() as request:
        signal.raise_signal(signal.SIGINT)
        clock[0] += 0.5  # The launcher passes on what the terminal has sent already.
        signal.raise_signal(signal.SIGINT)
        clock[0] += 10.0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert request.signal == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert stopped.value.signal == signal.SIGINT


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable() as request:
            signal.raise_signal(signal.SIGHUP)
            assert not request.signal
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def start(code, **settings):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True, **settings)


def test_what_is_printed_to_a_terminal_that_is_gone_does_not_keep_a_run_from_its_end(tmp_path):
    done = tmp_path / "done"
    code = f"""
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from launcher.stopping import stop_requests
with stop_requests() as request:
    print("ready", flush=True)
    while not request.signal:
        time.sleep(0.01)
    for stream in (sys.stdout, sys.stderr):
        print("saving", file=stream, flush=True)
open({str(done)!r}, "w").write(str(request.signal))
"""
    terminal, ours = pty.openpty()
    process = start(code, stdin=ours, stdout=ours, stderr=ours)
    os.close(ours)
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    assert process.wait(20) == 0
    assert done.read_text() == str(int(signal.SIGHUP))


def test_a_signal_ends_a_process_that_waits_in_a_library(tmp_path):
    code = """
import ctypes, launcher.stopping as stopping
stopping._DEAF_SECONDS = 0.2
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
library.pthread_mutex_init(mutex, None)
library.pthread_mutex_lock(mutex)
with stopping.stoppable():
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)
"""
    process = start(code, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 128 + signal.SIGUSR1
    process.stdout.close()
