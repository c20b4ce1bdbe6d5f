"""Does freed memory go back to the system?"""

import subprocess
import sys

import pytest

from sparse_zero.memory import allocator

# Every second of 32 blocks is freed, after larger ones were: holes between what is still held.
SCRIPT = f"""
import re, runpy, sys
allocator = runpy.run_path({allocator.__file__!r})
known = sys.argv[1] == "told" and allocator["return_freed_blocks"]()
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def block(size):
    return bytearray(b"x") * size
before = resident()
del_me = block(24 * 2**20); del del_me
blocks = [block(4 * 2**20) for _ in range(32)]
held = blocks[::2]
del blocks
print(int(known), resident() - before)
"""


def _run(mode: str) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    known, growth = done.stdout.split()
    return bool(int(known)), int(growth)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the test reads /proc")
def test_holes_between_blocks_go_back_to_the_system():
    known, growth = _run("told")
    if not known:
        pytest.skip("this C library has no mallopt")
    held, size = 16 * 4 * 2**20, 2**20
    assert held - size < growth < held + 4 * size
    assert _run("left alone")[1] > 1.8 * held, "glibc keeps the holes by itself no more: return_freed_blocks can go"
