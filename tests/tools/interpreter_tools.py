"""Triton's interpreter is chosen when Triton is imported: tests on CPU tensors run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from peft_kernels import tuning

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"  # in this process
DEVICE = "cpu" if INTERPRETER else "cuda"
# A test that runs kernels: in the interpreter's process on CPU tensors, elsewhere where there is a GPU. NumPy, which
# the interpreter computes with, warns of values that a GPU takes without a word.
on_device = pytest.mark.filterwarnings("ignore") if INTERPRETER else pytest.mark.gpu
not_interpreted = pytest.mark.skipif(INTERPRETER, reason="this is the interpreter's process")

SMALL: dict[str, dict[str, int]] = {
    "project": {"BM": 16, "BK": 32, "BR": 16, "programs": 6},
    "outer": {"BM": 16, "BN": 32, "BR": 16, "programs": 6},
    "forward": {"BM": 16, "BN": 32, "BK": 32, "BR": 16, "GROUP": 2, "programs": 20},
    "turned": {"BM": 16, "BN": 32, "BK": 32, "GROUP": 2, "programs": 20},
    "backward": {"BM": 16, "BN": 32, "BK": 32, "BR": 16, "GROUP": 2, "programs": 20},
}


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles so small that small shapes have several of everything: rows, columns, steps, ranks, parts of a sum."""
    with ExitStack() as stack:
        for kernel, values in SMALL.items():
            stack.enter_context(tuning.override(kernel, **values))
        yield


def run_in_the_interpreter(file: str, selection: str) -> None:
    """The tests of `file` that pytest's -k `selection` names, with Triton interpreting; each must run and pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file, "-k", selection]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTEST_XDIST_WORKER", None)
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, cwd=root)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout[-2000:]
