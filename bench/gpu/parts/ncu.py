"""Nsight Compute over the main kernels, where `ncu` is installed and may read the counters: its own sections, of which
the values in `KEPT` stay."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from typing import Any

from ...machine import ROOT
from ..device import Device
from ..profiled import CASES

LIMIT_S = 120
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis")
# as the details page of ncu names them
KEPT = (
    "Duration", "Elapsed Cycles", "SM Frequency", "DRAM Frequency", "Memory Throughput", "DRAM Throughput",
    "L2 Cache Throughput", "L1/TEX Cache Throughput", "Compute (SM) Throughput", "Executed Ipc Active",
    "Issue Slots Busy",
    "L2 Hit Rate", "Max Bandwidth", "Mem Busy", "Registers Per Thread", "Dynamic Shared Memory Per Block",
    "Static Shared Memory Per Block", "Waves Per SM", "Theoretical Occupancy", "Achieved Occupancy",
)  # fmt: skip


def titles(device: Device) -> list[str]:
    return list(CASES)


def row(title: str, device: Device) -> dict[str, Any]:
    program = shutil.which("ncu")
    if program is None:
        return {"absent": "ncu is not on the PATH"}
    command = [program, "--csv", "--page", "details", "--profile-from-start", "off"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += [sys.executable, "-m", "bench.gpu.profiled", title]
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
                          timeout=LIMIT_S - 10)  # fmt: skip
    launches = read(done.stdout)
    if not launches:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "ERR" in line or "rror" in line]
        return {"absent": f"ncu profiled no launch, status {done.returncode}: {(said or ['no message'])[-1].strip()}"}
    what, backend, m = CASES[title]
    return {"direction": what, "backend": backend, "m": m, "shape": "4096x14336", "launches": launches}


def read(text: str) -> list[dict[str, Any]]:
    """The launches of a details page in CSV, in order: the kernel's name, its grid and block, the kept values."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(lines[start:]):
        name, value = line.get("Metric Name"), line.get("Metric Value")
        if not name or name not in KEPT or value is None:
            continue
        launch = found.setdefault(line["ID"], {
            "kernel": line["Kernel Name"], "grid": line.get("Grid Size"), "block": line.get("Block Size"), "values": {},
        })  # fmt: skip
        launch["values"][name] = {"value": number(value), "unit": line.get("Metric Unit", "")}
    return list(found.values())


def number(text: str) -> float | str:
    """`1,234.5` as a number; text that is none as it is."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text
