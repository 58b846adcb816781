"""compute-sanitizer over the CUDA library: the cases of the host build (csrc/simt), launched on the GPU.

A tool a row, over the `gpu` tests of tests/test_*_simt.py. What is found in torch's own kernels is counted by itself.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...checks import ROOT
from ..device import Device

LIMIT_S = 280
STOP_S = 260  # what a tool has found by then is the row
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
MOST = 20  # findings that a row keeps in words
WORKERS = 4
KERNEL = r"__global__\s+void\s+(?:__launch_bounds__\([^()]*\)\s*)?(\w+)\("


def titles(device: Device) -> list[str]:
    return list(TOOLS)


def program() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    named = [str(Path(home, "bin", "compute-sanitizer")) for home in homes if home]
    return next((found for name in ("compute-sanitizer", *named, *PLACES) if (found := shutil.which(name))), None)


def kernels() -> set[str]:
    """The names of our CUDA kernels, as their sources have them."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "csrc" / "cuda").glob("*.cu*")]
    return {name for text in texts for name in re.findall(KERNEL, text)}


def row(title: str, device: Device) -> dict[str, Any]:
    tool = program()
    if tool is None:
        return {"absent": "compute-sanitizer is not on the PATH, nor under CUDA_HOME or /usr/local/cuda"}
    if device.fake:
        return {"absent": "a fake device launches nothing that it could look into"}
    logs = device.out / "logs" / title
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    tests = sorted(map(str, (ROOT / "tests").glob("test_*_simt.py")))
    command = [tool, "--tool", title, "--target-processes", "all", "--log-file", str(logs / "%p.log"),
               sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=line"]  # fmt: skip
    if find_spec("xdist") is not None:
        command += ["-n", str(WORKERS), "--max-worker-restart=1000"]
    # with torch's allocator every tensor lies in one large allocation, past whose end nothing is seen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with (logs / "pytest.txt").open("w") as said:
        try:
            code: int | None = subprocess.run([*command, *tests], cwd=ROOT, env=environment, stdout=said,
                                              stderr=subprocess.STDOUT, timeout=STOP_S).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    found = findings(path.read_text(errors="replace") for path in sorted(logs.glob("*.log")))
    text = (logs / "pytest.txt").read_text(errors="replace")
    last = (text.strip().splitlines() or ["nothing"])[-1]
    if not any(logs.glob("*.log")):
        return {"absent": f"{title} wrote no report: {last[:300]}"}
    return {**summary(found, kernels()), "status": code, "finished": code is not None, "tests": last[:300]}


def findings(reports: Iterable[str]) -> list[tuple[str, str]]:
    """(what was found, in which kernel) for each finding: its first line, and the first place below it."""
    found: list[tuple[str, str]] = []
    for text in reports:
        lines = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
        for i, line in enumerate(lines):
            # a finding's first line stands after an empty one; "at" or, of a race, "by ... at" names the kernel
            if i + 1 < len(lines) and re.match(
                r"(Invalid|Uninitialized|Error: |Warning: |Barrier error|Misaligned|Leaked|Program hit)", line
            ):
                where = next((place for place in lines[i : i + 6] if re.search(r"\bat\b", place)), "")
                found.append((line, where))
    return found


def summary(found: list[tuple[str, str]], ours: set[str]) -> dict[str, Any]:
    """Findings in our kernels, counted and in words, and how many there were elsewhere."""
    mine = Counter(
        f"{what}; {where}"
        for what, where in found
        if any(re.search(rf"\b{name}\s*[<(]", f"{what} {where}") for name in ours)
    )
    return {"findings": sum(mine.values()), "in_others": len(found) - sum(mine.values()),
            "words": [f"{count} x {text}" for text, count in mine.most_common(MOST)]}  # fmt: skip
