"""No speed-up without right answers: the quick tests of what is measured run first, or passed on the same sources.

A pass is remembered under a digest of the sources and the built library, so a second bench does not test again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEN = ROOT / "bench" / "results" / ".checks.json"
QUICK = "not slow and not gpu"
SHORT = ("families",)  # whose tests run in their short form: all cases of each family take an hour


@dataclass(frozen=True)
class Verdict:
    passed: bool
    text: str


def test_files(what: str) -> list[Path]:
    """The tests of an op or of a part of fastpeft; those of the whole model for `fastpeft`."""
    tests = ROOT / "tests"
    if what == "fastpeft":
        return sorted(p for p in (tests / "fastpeft").glob("test_*.py") if p.stem in ("test_laws", "test_lora"))
    return sorted(tests.glob(f"test_{what}*.py")) or sorted((tests / "fastpeft").glob(f"test_{what}*.py"))


def digest(files: list[Path]) -> str:
    """Over the tests, the kernels' sources, the adapters' sources and the built library."""
    return _digest([*files, *_below("peft_kernels", "csrc", "python")], {".pyc", ".json", ".lock"})


def digest_of_tree() -> str:
    """Over all that a GPU run is made of, but for what is built on the machine; 16 digits."""
    made = {"__pycache__", "lib", "results", "golden"}
    found = _below("peft_kernels", "csrc", "python", "bench", "tests", "tools")
    return _digest([p for p in found if not made & set(p.relative_to(ROOT).parts)], {".pyc"})[:16]


def _below(*tops: str) -> list[Path]:
    return [p for top in tops for p in sorted((ROOT / top).rglob("*")) if p.is_file()]


def _digest(files: list[Path], without: set[str]) -> str:
    h = hashlib.sha256(sys.version.encode())
    for path in files:
        if path.suffix not in without:
            h.update(str(path.relative_to(ROOT)).encode())
            h.update(path.read_bytes())
    return h.hexdigest()


def pytest(files: list[Path], marker: str, timeout_s: float = 900.0, full: bool = True) -> tuple[int, str] | str:
    """(exit status, last line) of the tests of `files` with a marker; a sentence where they did not finish."""
    environment = {**os.environ, "PEFT_KERNELS_FULL_TESTS": str(int(full))}  # tests/tools/forms.py
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider", *map(str, files)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"did not finish in {timeout_s:.0f} s"
    return done.returncode, (done.stdout.strip().splitlines() or ["no output"])[-1]


def check(what: str, timeout_s: float = 900.0) -> Verdict:
    """Run (or look up) the quick tests of `what`."""
    files = test_files(what)
    if not files:
        return Verdict(False, f"there are no tests of {what}")
    key = f"{what}:{digest(files)}"
    try:
        seen: dict[str, str] = json.loads(SEEN.read_text())
    except (OSError, ValueError):
        seen = {}
    if key in seen:
        return Verdict(True, f"tests of {what}: {seen[key]} (seen before on the same sources)")
    done = pytest(files, QUICK, timeout_s, what not in SHORT)
    if isinstance(done, str):
        return Verdict(False, f"tests of {what} {done}")
    code, tail = done
    if code != 0:
        return Verdict(False, f"tests of {what} fail: {tail}")
    SEEN.parent.mkdir(parents=True, exist_ok=True)
    SEEN.write_text(json.dumps({key: tail, **dict(list(seen.items())[:15])}))
    return Verdict(True, f"tests of {what}: {tail}")


def check_all(what: list[str], skip: bool) -> Verdict:
    """The verdict on everything that a bench rests on. Skipping is a verdict too: no speed-ups."""
    if skip:
        return Verdict(False, "checks were skipped (--skip-checks): times only, no speed-ups")
    texts = []
    for name in what:
        verdict = check(name)
        texts.append(verdict.text)
        if not verdict.passed:
            return Verdict(False, verdict.text + ": times only, no speed-ups")
    return Verdict(True, "; ".join(texts))
