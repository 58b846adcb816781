"""The machine that numbers were measured on, in one line, and its bounds: float32 FMA peak and memory bandwidth."""

from __future__ import annotations

import atexit
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from peft_kernels import native

from .bnb import use_kernel

ROOT = Path(__file__).resolve().parent.parent

# (family, models) of AMD's cores, as the kernel's arch/x86/kernel/cpu/amd.c tells them apart
_ZEN = {
    (0x17, (*range(0x30), *range(0x50, 0x60))): "zen",
    (0x17, (*range(0x30, 0x50), *range(0x60, 0x80), *range(0x90, 0xB0))): "zen2",
    (0x19, (*range(0x10), *range(0x20, 0x60))): "zen3",
    (0x19, (*range(0x10, 0x20), *range(0x60, 0xB0))): "zen4",
    (0x1A, (*range(0x30), *range(0x40, 0x50), *range(0x60, 0x80))): "zen5",
}


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_family() -> tuple[str, int, int] | None:
    """(vendor, family, model) of the CPU as Linux on x86 tells them."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
        return found["vendor_id"], int(found["cpu family"]), int(found["model"])
    except (OSError, KeyError, ValueError):
        return None


def core() -> str:
    """The CPU's core in a file's name: `zen4`, `zen5`, ...; the name that the CPU gives itself where it is another's.

    An EPYC in a virtual machine calls itself no more than that, so AMD's are told by family and model."""
    known = cpu_family()
    if known is not None and known[0] == "AuthenticAMD":
        for (family, models), zen in _ZEN.items():
            if known[1] == family and known[2] in models:
                return zen
    return re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")


def name(threads: int) -> str:
    """The machine in the name of a file of results: `zen5-2threads`."""
    return f"{core()}-{threads}threads"


@cache
def last_cache_bytes(device: str = "cpu") -> int:
    """Size of the largest CPU cache (32 MiB where the system does not say), or of a GPU's L2 cache."""
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        found.append(int(text.rstrip("KM")) * unit)
    return max(found, default=32 << 20)


def commit(root: Path = ROOT) -> str:
    """The commit of a tree, with "+" when files of the project differ from it; "unknown" outside a clone."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    found = {}
    for name in ("torch", "triton", "bitsandbytes", "transformers", "peft"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def level() -> str:
    """The instruction set level of the native library, or why there is none."""
    why = native.available()
    return native.level() if why is None else f"no native library ({why})"


def describe(threads: int) -> dict[str, Any]:
    return {
        "cpu": cpu_name(), "cores": os.cpu_count() or 1, "threads": threads, "level": level(),
        "last_cache_mib": last_cache_bytes() >> 20, "python": platform.python_version(), **versions(),
        "bnb": use_kernel(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def bounds_line(found: dict[str, Any]) -> str:
    units = {"gflops": "GFLOP/s float32", "gflops_bf16": "GFLOP/s bfloat16", "gbs": "GB/s"}
    return f"bounds ({found['how']}): " + ", ".join(f"{found[k]:.0f} {unit}" for k, unit in units.items() if k in found)


def line(info: dict[str, Any]) -> str:
    packages = ", ".join(f"{k} {info[k]}" for k in ("torch", "transformers", "peft") if k in info)
    packages += f", bitsandbytes {info['bnb']}" if info.get("bnb") else ""
    gpu = f", {info['gpu']}" if info.get("gpu") else ", no GPU"
    return (
        f"{info['cpu']}, {info['cores']} cores, {info['threads']} threads, level {info['level']}, "
        f"{info['last_cache_mib']} MiB last cache{gpu}; Python {info['python']}, {packages}"
    )


class Peak:
    """The most that the machine can do, measured in this process at each call. library: of `peak_library`, or None.

    Without the library torch stands in: its best matmul (below the true peak, so percentages of it flatter) and its
    fastest sum.
    """

    def __init__(self, library: Path | None) -> None:
        self.how = "bench/peak.cpp" if library else "torch.mm and torch.sum: no C++ compiler found"
        self._built = None if library is None else ctypes.CDLL(str(library))

    def products(self, threads: int, bf16: bool) -> float:
        """GFLOP/s of products in registers: bfloat16's dot products, or float32's FMA. 0: the CPU has none."""
        if self._built is None:
            a = torch.randn(1536, 1536)
            return 0.0 if bf16 else max(2 * len(a) ** 3 / _once(lambda: a @ a) for _ in range(8)) / 1e9
        return self._call("bf16" if bf16 else "f32", threads)

    def best_products(self, threads: int, bf16: bool) -> float:
        """The same; float32's where the CPU, or torch in the library's place, has no bfloat16."""
        return (self.products(threads, True) if bf16 else 0.0) or self.products(threads, False)

    def bandwidth(self, threads: int) -> float:
        """GB/s of reading 256 MiB in order."""
        if self._built is None:
            data = torch.ones(64 << 20)
            return max(4 * data.numel() / _once(data.sum) for _ in range(5)) / 1e9
        return self._call("bytes", threads)

    def _call(self, name: str, threads: int) -> float:
        function = getattr(self._built, f"pk_peak_{name}")
        function.restype = ctypes.c_double
        return float(function(ctypes.c_int(threads)))


@cache
def peak_library() -> Path | None:
    """bench/peak.cpp built for this machine, for as long as this process lives; None without a C++ compiler."""
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, True)
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-pthread", "-shared", "-fPIC"]
    source, built = Path(__file__).parent / "peak.cpp", folder / "peak.so"
    # the library by name: CXX may be gcc, which does not link it by itself
    libraries = ["-lstdc++"] if sys.platform == "linux" else []
    done = subprocess.run([compiler, *flags, str(source), "-o", str(built), *libraries], capture_output=True)
    return built if done.returncode == 0 else None


@cache
def bounds(threads: int) -> dict[str, float | str]:
    """Measured bounds: gflops (float32 FMA in registers on all threads), gbs (reading 256 MiB), and how each was got;
    gflops_bf16 (bfloat16 dot products) on CPUs that have them. The better of two measurements by `Peak`."""
    peak = Peak(peak_library())
    bf16 = max(peak.products(threads, True) for _ in range(2))
    return {"gflops": max(peak.products(threads, False) for _ in range(2)),
            "gbs": max(peak.bandwidth(threads) for _ in range(2)), **({"gflops_bf16": bf16} if bf16 else {}),
            "how": peak.how}  # fmt: skip


def _once(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
