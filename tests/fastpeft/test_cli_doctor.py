"""The doctor, on this machine and on broken ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastpeft.apps.cli import doctor


def examine(*shadows: Path, code: int = 0, **environment: str) -> dict[str, Any]:
    """The JSON report of a doctor for whom the folders ``shadows`` come before all other packages."""
    paths = [*map(str, shadows), *(p for p in sys.path if p)]
    done = subprocess.run(
        [sys.executable, "-m", "fastpeft", "doctor", "--json"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def findings(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {f["name"]: f for section in report["sections"].values() for f in section}


def package(folder: Path, name: str, source: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    return folder


def test_this_machine() -> None:
    report = examine()
    assert report["usable"] is True
    assert {"python", "torch", "transformers", "peft_kernels"} <= set(report["versions"])
    assert {"lora_linear", "lora_linear_backward", "quantize_4bit", "dequantize_4bit"} <= set(report["backends"])
    for calls in report["backends"].values():
        for reasons in calls.values():
            assert list(reasons.values()).count("chosen") == 1
            assert set(reasons) == {"cuda", "triton", "native", "reference"}
    for f in findings(report).values():
        assert f["status"] in ("ok", "note", "missing", "broken")
        assert f["status"] == "ok" or f["fix"], f  # whatever is not right comes with what to do


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise OSError('libtorch_cpu.so: cannot open shared object file')", "libtorch_cpu.so: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "looking at it ended the process with SIGILL"),
        ("import os; os._exit(7)", "looking at it ended the process with code 7"),
        ("raise SystemExit(0)", "SystemExit"),
    ],
)
def test_broken_torch(tmp_path: Path, source: str, message: str) -> None:
    report = examine(package(tmp_path, "torch", source), code=1)
    found = findings(report)
    assert report["usable"] is False
    assert message in found["torch"]["value"]
    assert found["torch"]["fix"].startswith("pip install")
    assert found["peft_kernels"]["fix"] == "repair torch first"
    assert found["c++ compiler"]["status"] in ("ok", "missing")


def test_broken_triton_breaks_nothing_else_and_forcing_is_reported(tmp_path: Path) -> None:
    report = examine(package(tmp_path, "triton", "import os; os.abort()"), PEFT_KERNELS_BACKEND="reference")
    assert report["usable"] is True
    assert "SIGABRT" in findings(report)["triton"]["value"]
    assert report["backends"]
    assert findings(report)["PEFT_KERNELS_BACKEND"]["value"] == "forces reference"


def test_unusable_native_library() -> None:
    report = examine(PEFT_KERNELS_CPU_LEVEL="avx4096")
    native = findings(report)["native CPU library"]
    assert native["status"] == "missing"
    assert "the slower reference serves" in native["value"]
    reasons = report["backends"]["lora_linear"]["cpu float32"]
    assert reasons["reference"] == "chosen"
    assert reasons["native"] not in ("chosen", "able")


def test_absent_package_is_told_from_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(names: list[str]) -> dict[str, dict[str, Any]]:
        found = {n: {"name": n, "found": {}} for n in names}
        found["torch"] = {"found": {"gpus": [], "cuda_build": "13.0", "version": "2"}}
        found["transformers"] = {"found": {"version": "5.24.0", "needs_peft": "0.22.0"}}
        found["triton"] = {"error": "ModuleNotFoundError: No module named 'triton'", "absent": True}
        found["native_cpu"] = {"found": {"reason": "the native cpu library is not built"}}
        found["native_cuda"] = {"found": {"reason": "the native cuda library is not built (no NVIDIA GPU is seen)"}}
        return found

    monkeypatch.setattr(doctor, "probe", probe)
    monkeypatch.setattr(doctor, "_version", lambda package: {"peft": "0.21.2"}.get(package))
    monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: None)
    report = doctor.examine()
    found = findings(report)
    assert found["triton"] == {
        "name": "triton", "status": "missing", "value": "not installed",
        "fix": "pip install triton (Linux; used on GPUs only)",
    }  # fmt: skip
    # transformers 5.24 wants a peft that was never published.
    assert "wants peft >= 0.22.0, installed is 0.21.2" in found["transformers and peft"]["value"]
    assert report["trap"] is not None
    for tool in ("nvcc", "c++ compiler", "cmake", "ninja"):
        assert found[tool]["status"] == "missing"
        assert found[tool]["fix"]
    assert "built for CUDA 13.0" in found["gpu"]["value"]
    assert "the slower reference serves" in found["native CPU library"]["value"]
    assert "no NVIDIA GPU is seen" in found["native CUDA library"]["value"]
    assert "PEFT_KERNELS_CUDA=1 make native" in found["native CUDA library"]["fix"]


@pytest.mark.parametrize(
    ("triton", "torch", "status", "text"),
    [
        ("3.5.0", ("2.9.1", "12.8"), "broken", "3.5.0, which torch 2.9.1 for CUDA 12.8 brings, is older than 3.6"),
        ("3.5.1", ("2.9.1", None), "note", "3.5.1, older than 3.6"),
        ("3.6.0", ("2.11.0", "13.0"), "ok", "3.6.0"),
        ("3.10.0", ("2.16.0", "13.0"), "ok", "3.10.0"),
    ],
)
def test_an_old_triton_is_said(
    triton: str, torch: tuple[str, str | None], status: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(names: list[str]) -> dict[str, dict[str, Any]]:
        found = {n: {"found": {}} for n in names}
        found["torch"] = {"found": {"gpus": [], "cuda_build": torch[1], "version": torch[0]}}
        found["triton"] = {"found": {"version": triton}}
        for name in ("native_cpu", "native_cuda"):
            found[name] = {"found": {"reason": "not built"}}
        return found

    monkeypatch.setattr(doctor, "probe", probe)
    row = findings(doctor.examine())["triton"]
    assert row["status"] == status
    assert text in row["value"]
    assert ("2.10" in row["fix"]) == (status == "broken")


def test_the_oldest_triton_is_the_one_that_pyproject_asks_for() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    asked = re.search(r'triton = \["triton>=([0-9.]+);', text)
    assert asked is not None
    assert asked[1] == doctor._TRITON


WAYS = ("fastpeft.patch(), fastpeft run --patch", "import fastpeft as peft", "fastpeft.as_peft(), fastpeft run")


@pytest.mark.parametrize(
    ("peft", "transformers", "states", "texts"),
    [
        ("0.21.2", ("5.23.0", "0.20.0"), "ok ok ok", ["peft 0.21.2", "beside peft 0.21.2", "finds peft 0.22.0"]),
        ("0.18.1", ("5.23.0", "0.20.0"), "ok ok ok", ["refuses add_adapter", "refuses add_adapter", "finds peft"]),
        ("0.21.2", ("5.24.0", "0.22.0"), "ok ok ok", ["5.24.0 refuses", "5.24.0 refuses", "5.24.0 finds peft 0.22.0"]),
        ("0.17.1", ("5.23.0", "0.20.0"), "note ok ok", ["0.17.1 is not from 0.18 up to below 0.22", "", ""]),
        ("0.22.0", ("5.24.0", "0.22.0"), "note ok ok", ["0.22.0 is not from", "beside peft 0.22.0", ""]),
        (None, ("5.23.0", "0.20.0"), "note note ok", ["PEFT is not installed", "in your own loops", "finds peft"]),
        ("broken", ("5.23.0", "0.20.0"), "broken ok ok", ["cannot be imported: OSError", "", ""]),
        ("0.21.2", ("5.30.0", "0.30.0"), "ok ok note", ["", "", "5.30.0 wants peft >= 0.30.0, and finds 0.22.0"]),
        ("0.21.2", None, "ok ok note", ["", "", "without transformers"]),
    ],
)  # fmt: skip
def test_the_three_ways(
    peft: str | None, transformers: Any, states: str, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(names: list[str]) -> dict[str, dict[str, Any]]:
        found = {n: {"found": {}} for n in names}
        found["torch"] = {"found": {"gpus": [], "cuda_build": None, "version": "2"}}
        for name in ("native_cpu", "native_cuda"):
            found[name] = {"found": {"reason": "not built"}}
        found["transformers"] = {"error": "gone", "absent": True}
        if transformers is not None:
            found["transformers"] = {"found": {"version": transformers[0], "needs_peft": transformers[1]}}
        if peft == "broken":
            found["peft"] = {"error": "OSError: gone"}
        return found

    monkeypatch.setattr(doctor, "probe", probe)
    version = "0.21.2" if peft == "broken" else peft
    monkeypatch.setattr(doctor, "_version", lambda package: version if package == "peft" else None)
    rows = [findings(doctor.examine())[way] for way in WAYS]
    assert [row["status"] for row in rows] == states.split()
    for row, text in zip(rows, texts, strict=True):
        assert text in row["value"]
        assert row["status"] == "ok" or row["fix"]


def test_what_the_ways_say_holds() -> None:
    """The constants of the doctor, which may import nothing that could be broken."""
    from fastpeft.compat import stand_in
    from fastpeft.compat.patch import patching

    assert doctor._STANDS_FOR == stand_in.VERSION
    first, end = (tuple(int(part) for part in version.split(".")) for version in doctor._PATCHED)
    assert (first, end) == (patching.OLDEST, (patching.NEWEST[0], patching.NEWEST[1] + 1))


def test_refused_kernels_and_a_library_that_does_not_load_are_said() -> None:
    row = {"op": "lora_linear", "backend": "triton", "path": "x=bfloat16 M=9", "why": "failed its check: off by 1",
           "arch": "sm_90", "made_by": "Triton 3.6.0, ptxas 12.8", "file": "/cache/verdicts/sm_90.json"}  # fmt: skip
    rows = doctor._verdicts({"found": {"passed": 7, "refused": [row]}})
    assert rows[0]["value"] == "7 passed, 1 refused"
    assert rows[1]["name"] == "lora_linear by triton"
    assert rows[1]["value"] == "failed its check: off by 1 (sm_90, Triton 3.6.0, ptxas 12.8; x=bfloat16 M=9)"
    assert "Delete /cache/verdicts/sm_90.json" in rows[1]["fix"]
    assert doctor._verdicts({"found": {"passed": 0, "refused": []}}) == []
    found = {"reason": None, "built_with": "13.0", "torch": "12.8", "gpus": [None, "its kernels do not load on GPU 1"]}
    rows = doctor._cuda_library({"found": found})
    assert [f["name"] for f in rows] == ["native CUDA library", "CUDA of nvcc and torch", "CUDA library on GPU 1"]
    assert rows[2]["value"] == "its kernels do not load on GPU 1; Triton serves"
    same = doctor._cuda_library({"found": {**found, "torch": "13.1", "gpus": []}})
    assert [f["value"] for f in same] == ["loaded, built with CUDA 13.0"]
