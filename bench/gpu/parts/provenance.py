"""Provenance: what was run, on which machine, with which driver and compilers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from typing import Any

from ..device import Device

LIMIT_S = 60
SMI = ("name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,"
       "mig.mode.current")  # fmt: skip


def titles(device: Device) -> list[str]:
    return ["machine", "gpu before", "backends"]


def row(title: str, device: Device) -> dict[str, Any]:
    if title == "machine":
        from ... import machine

        return {"platform": platform.platform(), "cpu": machine.cpu_name(), **machine.versions()}
    if title == "gpu before":
        return smi(device)
    from peft_kernels import native

    return {"cuda": native.available("cuda"), "cpu": native.available()}


def smi(device: Device) -> dict[str, Any]:
    program = shutil.which("nvidia-smi")
    if device.fake or program is None:
        return {"absent": "a fake device has none" if device.fake else "nvidia-smi is not on the PATH"}
    command = [program, f"--query-gpu={SMI}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        return {"absent": f"nvidia-smi: {(done.stderr or done.stdout).strip()}"}
    return dict(zip(SMI.split(","), (v.strip() for v in done.stdout.splitlines()[0].split(",")), strict=True))
