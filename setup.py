"""Builds the native library with CMake and Ninja and puts it into py3-none-<platform> wheels.

`python setup.py build_native` builds it in place (peft_kernels/lib); a wheel build does the same and packs the result.
The library is a plain C ABI loaded through ctypes: building it needs no torch, and one build serves every Python and
every torch. Without a C++ compiler the package is whole but for speed: every op then runs on its reference.
Its CUDA half is built where nvcc is; `build_native --for-this-machine` (make quickstart) builds it only where a GPU is
seen, too, or where an earlier build made it.
Environment: CXX, CUDACXX or CUDA_HOME choose compilers; PEFT_KERNELS_NATIVE=0 leaves the library out and
PEFT_KERNELS_CUDA=0 its CUDA half; PEFT_KERNELS_CUDA=1 builds that half wherever, or fails.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import ClassVar

from setuptools import Command, find_packages, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools below 70.1 leaves it to the wheel package
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
LIB = ROOT / "peft_kernels" / "lib"
BUILD = ROOT / "build" / "cmake"
STAMP = BUILD / "options.json"
# The first and the last architecture of CMakeLists.txt: an nvcc that knows both knows those between.
CUDA_RANGE = (80, 120)
# Where NVIDIA's driver shows the GPUs of this machine; torch, which would know, is not there in an isolated build.
GPU_FILES = ("/proc/driver/nvidia/gpus/*", "/dev/nvidia[0-9]*")


def which(*names: str) -> str | None:
    """The first of the programs found, the environment's own (a .venv that is not activated) before the system's."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def trial(command: list[str], suffix: str, source: str) -> str | None:
    """None if the compiler turns a trivial source into an object file, else the first line of what it said."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trial" + suffix)
        file.write_text(source)
        try:
            args = [*command, "-c", file.name, "-o", "trial.o"]
            done = subprocess.run(args, cwd=folder, capture_output=True, text=True)
        except OSError as error:
            return str(error)
        lines = (done.stderr + done.stdout).strip().splitlines()
        return None if done.returncode == 0 else (lines[0] if lines else f"exit code {done.returncode}")


def find_cxx() -> tuple[list[str], str | None]:
    """The C++ compiler as a command, or the reason why there is none."""
    if os.environ.get("PEFT_KERNELS_NATIVE") == "0":
        return [], "PEFT_KERNELS_NATIVE=0"
    named = shlex.split(os.environ.get("CXX", ""))
    if named and which(named[0]) is None:
        return [], f"no C++ compiler: CXX={os.environ['CXX']} is not a program"
    found = [] if named else [which("c++", "g++", "clang++")]
    command = named or [f for f in found if f]
    if not command:
        return [], "no C++ compiler: neither c++, g++ nor clang++ is on the PATH, and CXX is not set"
    reason = trial(command, ".cpp", "#include <cstdint>\nstd::int32_t f() { return 1; }\n")
    return command, f"the C++ compiler {command[0]} does not work: {reason}" if reason else None


def gpu_seen() -> bool:
    """An NVIDIA GPU is in this machine, by the files of its driver or by `nvidia-smi -L` (under WSL there are none)."""
    if any(glob.glob(pattern) for pattern in GPU_FILES):
        return True
    program = which("nvidia-smi")
    try:
        done = program and subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return bool(done) and done.returncode == 0 and done.stdout.startswith("GPU ")


def find_nvcc(wanted: bool = True) -> tuple[str, str | None]:
    """nvcc, or the reason why the CUDA half is left out. wanted: where PEFT_KERNELS_CUDA says neither 0 nor 1."""
    asked = os.environ.get("PEFT_KERNELS_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"error: PEFT_KERNELS_CUDA should be 0, 1 or not set, got {asked!r}")
    if asked == "0":
        return "", "PEFT_KERNELS_CUDA=0"
    if not asked and not wanted:
        return "", "no NVIDIA GPU is seen here; PEFT_KERNELS_CUDA=1 builds it all the same"
    nvcc, reason = working_nvcc()
    if asked and reason is not None:
        sys.exit(f"error: PEFT_KERNELS_CUDA=1 asks for the CUDA half, but {reason}")
    return nvcc, reason


def torch_cuda() -> str:
    """The major version of CUDA that the installed torch was built with, "" where there is none. Imports nothing."""
    try:
        found = importlib.util.find_spec("torch")
        text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8") if found and found.origin else ""
    except (ImportError, OSError, ValueError):
        return ""
    match = re.search(r"^cuda\b[^=]*= *['\"](\d+)\.", text, re.M)
    return match.group(1) if match else ""


def nvcc_candidates(root: str = "/usr/local") -> list[str]:
    """Programs to try, best first: the one that the environment names, else those of torch's major version, which the
    driver here runs, else any."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    named = [os.environ.get("CUDACXX"), *(str(Path(home, "bin", "nvcc")) for home in homes if home)]
    if any(found := [which(name) for name in named if name]):
        return [next(f for f in found if f)]
    major = torch_cuda()
    like_torch = glob.glob(f"{root}/cuda-{major}.*/bin/nvcc") if major else []
    newest = sorted(like_torch, key=lambda p: [int(n) for n in re.findall(r"\d+", p)], reverse=True)
    return [*newest, f"{root}/cuda/bin/nvcc", "nvcc"]


def working_nvcc() -> tuple[str, str | None]:
    """The first nvcc that can build for all architectures, or the reason why none can."""
    flags = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in CUDA_RANGE]
    first: tuple[str, str | None] = "", "no nvcc: it is not on the PATH, and neither CUDACXX nor CUDA_HOME names one"
    for nvcc in dict.fromkeys(found for c in nvcc_candidates() if (found := which(c))):
        reason = trial([nvcc, *flags], ".cu", "__global__ void f() {}\n")
        if reason is None:
            return nvcc, None
        first = first if first[0] else (nvcc, f"{nvcc} cannot build for sm_{CUDA_RANGE[1]}: {reason}")
    return first


def cmake(*args: str, quiet: bool = False) -> None:
    program = which("cmake")
    if program is None:
        sys.exit("error: a C++ compiler is here but no cmake: pip install cmake ninja")
    done = subprocess.run([program, *args], cwd=ROOT, stdout=subprocess.PIPE if quiet else None, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout or ''}error: building the native library failed (PEFT_KERNELS_NATIVE=0 leaves it out)")


def last_options() -> dict[str, str] | None:
    """CMake's options of the build that is there; None where it is not of this folder."""
    root, options = json.loads(STAMP.read_text()) if STAMP.exists() else ("", None)
    return options if root == str(ROOT) else None


def build(for_this_machine: bool = False, arch: str = "") -> dict[str, str]:
    """Build what can be built into peft_kernels/lib and say, per half, what became of it.

    for_this_machine: the CUDA half only where it can run, or where it was built before and would grow stale.
    arch: "90" builds the CUDA half for sm_90 alone, unless one for all architectures is here."""
    state = {"cpu": "built", "cuda": "built"}
    cxx, reason = find_cxx()
    nvcc = ""
    if not (ROOT / "CMakeLists.txt").exists():
        reason = "CMakeLists.txt is missing"
    if reason is not None:
        if os.environ.get("PEFT_KERNELS_CUDA") == "1" and os.environ.get("PEFT_KERNELS_NATIVE") != "0":
            sys.exit(f"error: PEFT_KERNELS_CUDA=1 asks for the CUDA half, but {reason}")
        state = {"cpu": f"skipped: {reason}", "cuda": f"skipped: {reason}"}
    else:
        last = last_options()
        built_before = last is not None and last["PK_CUDA"] == "ON"
        nvcc, cuda_reason = find_nvcc(not for_this_machine or built_before or gpu_seen())
        if cuda_reason is not None:
            state["cuda"] = f"skipped: {cuda_reason}"
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": which(cxx[0]) or cxx[0],
            "CMAKE_MAKE_PROGRAM": which("ninja", "ninja-build") or "ninja",
            "PK_LIB_DIR": str(LIB),
            "PK_CUDA": "OFF" if cuda_reason else "ON",
        }
        if cxx[1:]:
            options["CMAKE_CXX_FLAGS"] = shlex.join(cxx[1:])
        if not cuda_reason:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            if arch and not (built_before and "PK_CUDA_ARCH" not in last):
                options["PK_CUDA_ARCH"] = arch
        # CMake stops at a cache made with other compilers or in another folder: start clean instead. The CUDA half can
        # be added to a build without it.
        cuda_only = ("CMAKE_CUDA_COMPILER", "PK_CUDA_ARCH")
        without = {k: v for k, v in options.items() if k not in cuda_only} | {"PK_CUDA": "OFF"}
        if BUILD.exists() and last not in (options, without):
            shutil.rmtree(BUILD)
        defines = [f"-D{name}={value}" for name, value in options.items()]
        cmake("-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *defines, quiet=True)
        STAMP.write_text(json.dumps([str(ROOT), options], sort_keys=True))
        cmake("--build", str(BUILD))
    LIB.mkdir(parents=True, exist_ok=True)
    (LIB / "build.json").write_text(json.dumps(state, indent=1) + "\n")  # `fastpeft doctor` repeats it
    if reason is None:
        print(f"native library: CPU half {state['cpu']}, CUDA half {state['cuda']}", flush=True)
    else:
        print(f"native library: not built, every op runs on its reference (correct, but slower): {reason}", flush=True)
    return state


class BuildNative(Command):
    """Build the native library in place."""

    description = "build the native library into peft_kernels/lib"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = [
        ("for-this-machine", None, "leave the CUDA half out where no GPU is seen"),
        ("arch=", None, "90: the CUDA half for sm_90 alone (tools/gpu_run.py)"),
    ]
    boolean_options: ClassVar[list[str]] = ["for-this-machine"]

    def initialize_options(self) -> None:
        self.for_this_machine = False
        self.arch = ""

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        build(bool(self.for_this_machine), self.arch)


class BuildPy(build_py):
    """build_py, and the native library beside the Python files."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # else files since removed would be packed again
        super().run()
        build()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "peft_kernels", "lib")
        shutil.copytree(LIB, target)


class BdistWheel(bdist_wheel):
    """A wheel for any Python 3 on this platform; for any platform where no library could be built."""

    def finalize_options(self) -> None:
        pure = find_cxx()[1] is not None
        self.distribution.has_ext_modules = lambda: not pure  # decides where in the wheel the packages lie
        super().finalize_options()
        self.root_is_pure = pure

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return ("py3", "none", "any" if self.root_is_pure else platform)


if __name__ == "__main__":  # so that tests can read this file
    setup(
        packages=find_packages(".", include=["peft_kernels*"]) + find_packages("python", include=["fastpeft*"]),
        package_data={"peft_kernels": ["tuned/*.json", "tuned/**/*.json"], "fastpeft": ["py.typed"]},
        cmdclass={"build_native": BuildNative, "build_py": BuildPy, "bdist_wheel": BdistWheel},
    )
