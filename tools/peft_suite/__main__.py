"""PEFT's own tests, run with fastpeft in PEFT's place: `python tools/peft_suite [FILES...]`, or `make peft-suite`.

The tests come from PEFT's source distribution, which is downloaded once into build/peft-suite. They need no Hub: tiny
random models stand in for those that they load (hub.py). Each file is a run of pytest; its line is printed, its results
are kept in build/peft-suite, and docs/compatibility.md is written from what is there (report.py). Cases that are not
meant to pass are listed in not_meant.txt; the exit code is 1 while others fail.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SUITE = ROOT / "build" / "peft-suite"
VERSION = "0.21.2"
SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
NEEDS_MORE = ("gpu", "gptqmodel", "megatron", "torch_compile")  # files that want a GPU or packages few have
SECONDS_A_FILE = 7200
INI = """[pytest]
markers =
    regression: of PEFT's
    single_gpu_tests: of PEFT's
    multi_gpu_tests: of PEFT's
    bitsandbytes: of PEFT's
"""


def unpack() -> None:
    """Put PEFT's tests into SUITE/tests; a second call finds them."""
    if (SUITE / "tests" / ".whole").exists():
        return
    SUITE.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps", "-d", str(SUITE)]
    subprocess.run([*pip, "--no-binary", "peft", "--no-build-isolation", f"peft=={VERSION}"], check=True)
    archive = SUITE / f"peft-{VERSION}.tar.gz"
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256:
        sys.exit(f"peft-suite: {archive} has the sha256 {found}, expected {SHA256}")
    top = f"peft-{VERSION}/"
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            if member.name.startswith(f"{top}tests/") and (member.isfile() or member.isdir()):
                member.name = member.name.removeprefix(top)
                files.extract(member, SUITE, filter="data")
    (SUITE / "tests" / "__init__.py").touch()
    (SUITE / "pytest.ini").write_text(INI)
    (SUITE / "tests" / ".whole").touch()


def test_files() -> list[str]:
    """Names of the files that run without a GPU, without `.py`."""
    names = sorted(path.stem for path in (SUITE / "tests").glob("test_*.py"))
    return [name for name in names if not any(word in name for word in NEEDS_MORE)]


def run(name: str, package: str, results: Path, stubs: bool, rest: list[str]) -> None:
    """One file's tests; their results become results/name.xml."""
    results.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(HERE), str(ROOT / "python"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {
        **os.environ, "PYTHONPATH": path, "PEFT_SUITE_HUB": str(SUITE / f"hub-{package}"), "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false", "FASTPEFT_ALLOW_BIN": "1", "PEFT_SUITE_STUBS": str(int(stubs)),
    }  # fmt: skip
    plugins = ["-p", "in_place_of_peft"] if package == "fastpeft" else []
    plugins += ["-p", "hub", "-p", "no:cacheprovider", "-n", os.environ.get("WORKERS", "2")]
    kept = results / f"{name}.xml"
    kept.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"tests/{name}.py", "-q", "--timeout", "300", "--tb", "line", *plugins]
    begin = time.monotonic()
    with open(results / f"{name}.log", "w", encoding="utf-8") as log:
        try:
            subprocess.run(
                [*command, "--junitxml", str(kept), *rest], cwd=SUITE, env=env, stdout=log, stderr=subprocess.STDOUT,
                timeout=SECONDS_A_FILE,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            log.write(f"not done after {SECONDS_A_FILE} s\n")
    print(f"{name}: {report.counts(report.read(kept))} ({time.monotonic() - begin:.0f} s)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="peft-suite", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="test files, as test_config; default: all that need no GPU")
    parser.add_argument("--package", choices=("fastpeft", "peft"), default="fastpeft", help="peft: PEFT itself")
    parser.add_argument("--stubs", action="store_true", help="skip cases that need a name which is missing")
    parser.add_argument("-k", metavar="WORDS", help="as pytest's -k; results are printed and not written down")
    asked = parser.parse_args()
    unpack()
    every = test_files()
    names = [Path(name).stem for name in asked.files] or every
    if unknown := [name for name in names if not (SUITE / "tests" / f"{name}.py").exists()]:
        sys.exit(f"peft-suite: no such test file: {', '.join(unknown)}; there are {', '.join(every)}")
    results = report.results_of(SUITE, asked.package if asked.k is None else f"{asked.package}-some")
    for name in names:
        run(name, asked.package, results, asked.stubs, [] if asked.k is None else ["-k", asked.k])
    writes = asked.package == "fastpeft" and asked.k is None
    return report.show(results, names, every, ROOT if writes else None)


if __name__ == "__main__":
    sys.exit(main())
