"""The host build of the CUDA sources (csrc/simt) in tests: builds it, loads it as the CUDA library, gives seeds.

A test module takes the fixtures by name from `runpy.run_path`. `simt` loads the plain build: fast, poisoned memory,
late cp.async, threads in the order of a seed. `races` loads the race-instrumented one, which is slower: for small
shapes. `seed` runs a test once for each order of threads. What was compiled is kept under build/simt by its inputs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL
from functools import lru_cache
from pathlib import Path

import pytest
from forms import matrix

from peft_kernels import native, use_backend

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
CACHE = ROOT / "build" / "simt"
LIBRARY_ENV = "PEFT_KERNELS_SIMT_LIBRARY"  # set by `under_asan`: the library that the fixture `simt` loads
SEEDS = range(10)
KEPT = 3 * 24 * 3600  # seconds that an unused object stays

COMMON = "-std=c++17 -ffp-contract=off -fPIC -fvisibility=hidden -g1 -DPK_SIMT -Wall -Wextra -Werror"
# build: flags of everything, of the kernels, of the runtime, of the link
FLAGS = {
    "plain": ("-O2", "", "", ""),
    # instrumented for the functions of csrc/simt/races.cpp; without the flag at the link no sanitizer comes with it
    "races": ("-DPK_SIMT_RACES", "-O1 -fsanitize=thread,alignment", "-O2", ""),
    "ucontext": ("-O2", "", "-DPK_SIMT_UCONTEXT", ""),  # the change of fibres on other processors
    "asan": ("-O1 -fsanitize=address -fno-omit-frame-pointer", "", "", "-fsanitize=address"),
}


@lru_cache(maxsize=1)
def compiler() -> tuple[list[str], str]:
    """The C++ compiler (`CXX`, else the first of the usual names) and what it says it is. Skips where there is none."""
    command = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if not command or shutil.which(command[0]) is None:
        pytest.skip("the host build of the CUDA sources needs a C++ compiler: none of CXX, c++, g++, clang++ runs")
    return command, subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout


def _hash(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


_broken: dict[Path, str] = {}  # what does not compile, once for all tests


def _make(target: Path, command: list[str]) -> Path:
    """Run `command ... -o target` unless target is there; others never see half a file."""
    if target.exists():
        os.utime(target)  # in use
        return target
    if target not in _broken:
        part = target.with_suffix(f".{os.getpid()}{target.suffix}")
        done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
        if done.returncode == 0:
            return part.replace(target)
        _broken[target] = f"{shlex.join(command)}\n{done.stderr}"
    pytest.fail(_broken[target], pytrace=False)


def build(kind: str = "plain", sources: list[Path] | None = None) -> Path:
    """The library of `sources` (default: all of csrc/cuda) as "plain", "races" or "asan". Skips without a compiler."""
    command, version = compiler()
    everywhere, of_kernels, of_runtime, of_link = FLAGS[kind]
    if "clang" in version and kind == "asan":
        of_link += " -shared-libasan"
    runtime = sorted(p for p in (CSRC / "simt").glob("*.cpp") if kind == "races" or p.name != "races.cpp")
    headers = _hash(*(p.read_text() for p in sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])))
    CACHE.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        flags = shlex.split(
            f"{COMMON} -Wno-unknown-pragmas {everywhere} {of_runtime if source in runtime else of_kernels}"
        )
        key = _hash(version, command, flags, headers, source, source.read_text())
        options = [*flags, f"-I{CSRC}", "-x", "c++", "-c", str(source)]
        return _make(CACHE / f"{source.stem}-{key}.o", [*command, *options])

    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of pytest-xdist's workers one builds, the others wait
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, [*(KERNELS if sources is None else sources), *runtime]))
        # the library by name: CXX may be gcc, which does not link it by itself
        link = ["-shared", *shlex.split(of_link), *map(str, objects), "-lstdc++", "-lm", "-ldl"]
        library = _make(CACHE / f"lib-{kind}-{_hash(version, command, link)}.so", [*command, *link])
        for old in CACHE.iterdir():
            if time.time() - old.stat().st_mtime > KEPT:
                old.unlink()
    return library


@contextlib.contextmanager
def loaded(kind: str) -> Iterator[CDLL]:
    """The host build `kind` as the CUDA library: `use_backend("cuda")` runs it on CPU tensors."""
    lib = native.use_simt(os.environ.get(LIBRARY_ENV) or build(kind))
    assert lib is not None
    lib.pk_simt_set_seed(0)
    lib.pk_simt_set_device(89, 108)
    try:
        yield lib
    finally:
        native.use_simt(None)


@pytest.fixture
def simt() -> Iterator[CDLL]:
    with loaded("plain") as lib:
        yield lib


@pytest.fixture
def races() -> Iterator[CDLL]:
    with loaded("races") as lib:
        yield lib


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend forced: on a GPU, or on CPU tensors with the host build."""
    if request.param == "simt":
        request.getfixturevalue("simt")
    with use_backend("cuda"):
        yield "cpu" if request.param == "simt" else "cuda"


@pytest.fixture(params=matrix(SEEDS, short=[0, 4, 9]))
def seed(request: pytest.FixtureRequest) -> int:
    """An order of threads and blocks: for `lib.pk_simt_set_seed`."""
    return int(request.param)


def asan_environment() -> dict[str, str]:
    """The environment that a process needs to load an "asan" build. Skips where the runtime is missing."""
    command, version = compiler()
    name = f"libclang_rt.asan-{os.uname().machine}.so" if "clang" in version else "libasan.so"
    asked = subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    found = asked.stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the AddressSanitizer build needs {name}, which {command[0]} does not have")
    return {
        **os.environ,
        "LD_PRELOAD": str(Path(found).resolve()),
        # The leaks are Python's. To look for uses after a return is to map a stack at every switch of fibres, which
        # would take most of the time.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0" + ":symbolize=0" * ("clang" in version),
        "PYTHONMALLOC": "malloc",  # each object by itself, so that overruns are seen
    }


def under_asan(file: str, *arguments: str) -> None:
    """Run tests of `file` in a process of its own, in which the fixture `simt` loads the AddressSanitizer build."""
    environment = {**asan_environment(), LIBRARY_ENV: str(build("asan"))}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", file, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout, done.stdout


def for_seeds(lib: CDLL, check: Callable[[], None]) -> None:
    """`check()` for each seed: for what is too quick to be a test of its own."""
    for one in SEEDS:
        lib.pk_simt_set_seed(one)
        check()
