"""Provenance: what was run, on which machine, with which driver and compilers, and which backends serve a call."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Any

from .. import files
from ..device import Device

LIMIT_S = 90
SMI = ("name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,"
       "mig.mode.current")  # fmt: skip


def titles(device: Device) -> list[str]:
    return ["machine", "gpu before", "compilers", "backends"]


def row(title: str, device: Device) -> dict[str, Any]:
    found = {"machine": machine, "gpu before": smi, "compilers": compilers, "backends": backends}[title](device)
    return dict(found)


def machine(device: Device) -> dict[str, Any]:
    from ... import machine

    given = files.settings(device.out).get("commit")
    found = {"commit": given or machine.commit(), "platform": platform.platform(), "cpu": machine.cpu_name(),
             "cores": os.cpu_count(), "python": platform.python_version(), **machine.versions()}  # fmt: skip
    if not device.fake:
        import torch

        of = torch.cuda.get_device_properties(0)
        found |= {"gpu": of.name, "capability": f"{of.major}.{of.minor}", "multiprocessors": of.multi_processor_count,
                  "memory_gib": round(of.total_memory / 2**30, 1), "cuda_of_torch": torch.version.cuda}  # fmt: skip
    return found


def smi(device: Device) -> dict[str, Any]:
    """Driver, clocks, power and temperature at this moment."""
    program = shutil.which("nvidia-smi")
    if device.fake or program is None:
        return {"absent": "a fake device has none" if device.fake else "nvidia-smi is not on the PATH"}
    command = [program, f"--query-gpu={SMI}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        return {"absent": f"nvidia-smi: {(done.stderr or done.stdout).strip()}"}
    return dict(zip(SMI.split(","), (v.strip() for v in done.stdout.splitlines()[0].split(",")), strict=True))


def compilers(device: Device) -> dict[str, Any]:
    """The last line of what each says of its version; the ptxas is the one that Triton takes for this architecture."""
    found = {name: version(shutil.which(name)) for name in ("nvcc", "c++", "cmake", "ninja")}
    try:
        from triton.backends.nvidia.compiler import get_ptxas
    except ImportError as e:
        return {**found, "ptxas": f"no Triton that says which: {e}"}
    try:
        ptxas = get_ptxas(device.arch)
        return {**found, "ptxas": f"{ptxas.version} ({ptxas.path})"}
    except Exception as e:
        return {**found, "ptxas": f"{type(e).__name__}: {e}"}


def version(program: str | None) -> str:
    if program is None:
        return "not on the PATH"
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30)
    lines = [line for line in done.stdout.splitlines() if line.strip()] or ["it says nothing"]
    return f"{lines[-1] if 'nvcc' in program else lines[0]} ({program})"


def backends(device: Device) -> dict[str, Any]:
    """For each backend why it does not serve a small 4-bit call with an adapter on this device; "chosen" for one."""
    import torch

    import peft_kernels as pk

    q = pk.quantize_4bit(torch.randn(64, 64)).to(device.kind)
    x, a = (torch.zeros(m, 64, device=device.kind, dtype=torch.bfloat16) for m in (1, 8))
    return pk.explain("lora_linear", x, *q.flatten(), 64, a, a.t().contiguous(), 1.0, None, 0.0, None)
