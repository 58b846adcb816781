"""Memory that a step frees is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# In a process of its own: what it sets holds for the rest of the process.
PROGRAM = """
import resource, sys, torch
from fastpeft.apps.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 20) for _ in range(16)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory() is True
for _ in range(3):  # what is allocated in between can keep a few tensors from their old places at first
    found = faults()
print(found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_was_freed_is_not_asked_for_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    pages = 16 * (4 << 20) // 4096
    assert int(done.stdout) < pages / 16
