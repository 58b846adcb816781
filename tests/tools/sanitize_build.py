"""Builds of the CPU library, of the driver of recorded calls and of planted faults with sanitizers, under build/."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitize"
COMMON = "-O1 -g1 -fno-omit-frame-pointer"
# kind -> flags; "plain" is the driver alone, for the library as it is released
KINDS = {
    "plain": COMMON,
    "address": f"{COMMON} -fsanitize=address,undefined",
    "thread": f"{COMMON} -fsanitize=thread",
}


def build(kind: str, *targets: str) -> Path:
    """The folder of the targets, built: peft_kernels_cpu (the library), pk_replay, pk_planted. Skips without tools."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if compiler:  # CXX=gcc compiles C++, but links without its library
        path = Path(compiler[0])
        compiler[0] = str(path.with_name({"cc": "c++", "gcc": "g++", "clang": "clang++"}.get(path.name, path.name)))
    for tool in (compiler[0] if compiler else "a C++ compiler (CXX)", "cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"the sanitized builds need {tool}")
    folder = FOLDER / kind
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "CMAKE_BUILD_TYPE": "None", "CMAKE_CXX_COMPILER": shutil.which(compiler[0]), "PK_CUDA": "OFF",
        "CMAKE_CXX_FLAGS": shlex.join([*compiler[1:], *shlex.split(KINDS[kind])]), "PK_LIB_DIR": str(folder / "lib"),
        "PK_REPLAY": "ON",
    }  # fmt: skip
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of pytest-xdist's workers one builds, the others wait
        stamp, wanted = folder / "options.json", json.dumps(options, sort_keys=True)
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(folder / "cmake", ignore_errors=True)
            defines = [f"-D{name}={value}" for name, value in options.items()]
            _run("cmake", "-S", ROOT, "-B", folder / "cmake", "-G", "Ninja", *defines)
            stamp.write_text(wanted)
        _run("cmake", "--build", folder / "cmake", "--target", *targets)
    return folder / "lib"


def _run(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        pytest.fail(f"{shlex.join(map(str, command))}\n{done.stdout[-4000:]}", pytrace=False)


def run(*command: str | Path | int) -> subprocess.CompletedProcess[str]:
    """A program of a build, with what it said on both streams in `stdout`."""
    return subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace")  # fmt: skip
