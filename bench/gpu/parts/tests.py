"""All tests that a GPU runs, in parallel: every file below tests/ that has any. They judge the kernels.

One call of pytest for the short form, one for the rest; a test that was run is not run again. On a fake device some
tests of the CPU's kernels stand for them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...checks import ROOT
from .. import files, verdicts
from ..device import Device
from ..faults import Faults

LIMIT_S = 240  # a test, with the compilation of its kernels
FAKE = ("test_norms.py", "test_gated.py", "test_lora_linear.py::test_ranks")
MEMORY = 6 << 30  # bytes of a GPU that a process of tests may need
DONE = (0, 1, 5)  # pytest's: passed, failed, none collected


def test_files() -> list[Path]:
    """Files with `gpu` tests; simt_tools and interpreter_tools have what makes some."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [p for p in found if re.search(r"mark\.gpu|simt_tools|interpreter_tools", p.read_text(encoding="utf-8"))]


def workers(device: Device) -> int:
    """Processes beside each other: at most 12, as cores and the GPU's memory allow."""
    count = min(12, len(os.sched_getaffinity(0)))
    if not device.fake:
        import torch

        count = min(count, torch.cuda.mem_get_info()[0] // MEMORY)
    return max(1, count)


def command(device: Device, settings: dict[str, Any], full: bool) -> list[str]:
    planted = Faults.parse(settings.get("faults") or "").tests or [ROOT / "tests" / name for name in FAKE]
    chosen, marker = (planted, "not gpu and not slow") if device.fake else (test_files(), "gpu")
    found = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "bench.gpu.pytest_verdicts",
             "-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short"]  # fmt: skip
    count = workers(device)
    if count > 1 and find_spec("xdist") is not None:
        found += ["-n", str(count), "--dist", "worksteal", "--max-worker-restart=1000"]
    return [*found, *(["--full"] if full else []), *map(str, chosen)]


def run(device: Device, settings: dict[str, Any], limit: float) -> int:
    path = device.out / f"{verdicts.PART}.jsonl"
    marks = files.marks(settings)
    if find_spec("pytest") is None:
        files.append(path, {"title": "pytest", "absent": "pytest is not installed: no kernel is judged", **marks})
        return 0
    files.append(path, {"limit_s": limit + 2 * verdicts.GRACE_S, **marks})
    environment = {**os.environ, verdicts.LIMIT_ENV: str(limit)}  # the folder is in every process's of a run
    for full in (False,) if device.fake else (False, True):
        done = files.rows(path, settings.get("digest"))
        files.replace(device.out / verdicts.DONE, "\n".join(done))
        code = subprocess.run(command(device, settings, full), cwd=ROOT, env=environment).returncode
        if code not in DONE:
            return code if code > 0 else 128 - code  # as a shell says a signal
    return 0
