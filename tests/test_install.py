"""Setting up and building, as `make` and `pip wheel` do it: with a compiler, without one, and after an interruption."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
HAS_CXX = any(shutil.which(name) for name in ("c++", "g++", "clang++"))

# One call of an op in a fresh process, with the copy under test first on the path.
USE = """
import torch, peft_kernels
from peft_kernels import native
w, x = torch.randn(8, 64), torch.randn(3, 64)
y = peft_kernels.lora_linear(x, w)
assert y.shape == (3, 8)
print(peft_kernels.__file__)
print(native.available("cpu"))
"""


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH", "CUDACXX", "CUDA_HOME")}
    return subprocess.run(command, cwd=cwd, env=kept | env, capture_output=True, text=True)


def use(path: Path, cwd: Path) -> list[str]:
    done = run(sys.executable, "-c", USE, cwd=cwd, PYTHONPATH=str(path))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source_copy(target: Path) -> Path:
    """The files of a fresh clone, less what building does not read."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        target.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    for name in ("csrc", "peft_kernels", "python"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("lib", "__pycache__", "*.egg-info"))
    return target


def build_wheel(source: Path, into: Path, **env: str) -> Path:
    """The one wheel that pip makes of a source tree."""
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(into)]
    done = run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.mark.skipif(not HAS_CXX, reason="no C++ compiler on the PATH")
def test_wheel_carries_the_library(tmp_path: Path) -> None:
    """A py3-none-<platform> wheel with the library inside, which an unpacked copy of it loads."""
    # In the tree itself: the library is there already, and what does not need building is not built again.
    wheel = build_wheel(ROOT, tmp_path)
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "unpacked")
        names = packed.namelist()
    assert "peft_kernels/lib/libpeft_kernels_cpu.so" in names
    assert "peft_kernels/lib/build.json" in names
    missing = [
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in (("peft_kernels", "peft_kernels"), ("fastpeft", "python/fastpeft"))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".json", ".typed") and "lib" not in path.parts
    ]
    assert not set(missing) - set(names)
    where, reason = use(tmp_path / "unpacked", tmp_path)
    assert where.startswith(str(tmp_path / "unpacked"))
    assert reason == "None"


def no_compiler_path(tmp_path: Path) -> str:
    """A PATH that has the system's basic programs and no compiler."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "env", "uname"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    return str(programs)


@pytest.mark.parametrize("hidden", ["path", "broken"])
def test_without_a_compiler_everything_runs_on_the_reference(tmp_path: Path, hidden: str) -> None:
    copy = source_copy(tmp_path / "copy")
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    env = {"PATH": no_compiler_path(tmp_path)} if hidden == "path" else {"CXX": str(broken)}
    done = run(sys.executable, "setup.py", "-q", "build_native", cwd=copy, **env)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("native library:")]
    expected = "no C++ compiler" if hidden == "path" else "does not work"
    assert len(said) == 1
    assert expected in said[0]
    assert "reference" in said[0]
    assert expected in json.loads((copy / "peft_kernels" / "lib" / "build.json").read_text())["cpu"]
    where, reason = use(copy, tmp_path)
    assert where.startswith(str(copy))
    assert "not built" in reason
    assert build_wheel(copy, tmp_path, **env).name.split("-", 2)[2] == "py3-none-any.whl"


@pytest.mark.skipif(not HAS_CXX, reason="no C++ compiler on the PATH")
def test_a_broken_source_fails_loudly(tmp_path: Path) -> None:
    """A compiler that is there and a source that does not compile is an error, never a quiet run on the reference."""
    copy = source_copy(tmp_path / "copy")
    (copy / "csrc" / "cpu" / "dispatch.cpp").write_text("this is not C++\n")
    done = run(sys.executable, "setup.py", "-q", "build_native", cwd=copy, PEFT_KERNELS_CUDA="0")
    assert done.returncode != 0


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py over a scratch folder, with compilers that work, no GPU, and a CMake that remembers its calls."""
    module = load(ROOT / "setup.py")
    calls: list[tuple[str, ...]] = []

    def cmake(*args: str, quiet: bool = False) -> None:
        calls.append(args)
        module.BUILD.mkdir(parents=True, exist_ok=True)

    (tmp_path / "CMakeLists.txt").touch()
    for name in ("PEFT_KERNELS_CUDA", "PEFT_KERNELS_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "ROOT": tmp_path,
        "LIB": tmp_path / "lib",
        "BUILD": tmp_path / "cmake",
        "STAMP": tmp_path / "cmake" / "options.json",
        "GPU_FILES": (str(tmp_path / "gpus" / "*"), str(tmp_path / "nvidia[0-9]*")),
        "which": lambda *names: None,
        "find_cxx": lambda: (["c++"], None),
        "working_nvcc": lambda: ("nvcc", None),
        "cmake": cmake,
    }.items():
        monkeypatch.setattr(module, name, value)
    module.calls = calls  # type: ignore[attr-defined]
    return module


def test_a_gpu_is_seen_without_torch(builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not builder.gpu_seen()
    (tmp_path / "nvidiactl").touch()  # the driver's own, which is there without a GPU
    assert not builder.gpu_seen()
    for file in ("nvidia0", "gpus/0000:01:00.0"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
        assert builder.gpu_seen()
        (tmp_path / file).unlink()
    program = tmp_path / "nvidia-smi"
    monkeypatch.setattr(builder, "which", lambda *names: str(program) if names == ("nvidia-smi",) else None)
    assert not builder.gpu_seen()  # it does not run
    for says, seen in (
        ("echo 'GPU 0: NVIDIA L4 (UUID: GPU-1)'", True),
        ("echo 'No devices found.'", False),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9", False),
    ):
        program.write_text(f"#!/bin/sh\n{says}\n")
        program.chmod(0o755)
        assert builder.gpu_seen() is seen, says


def test_the_cuda_half_is_built_where_it_is_asked_for(builder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """`build_native`: where nvcc is. With --for-this-machine: where a GPU is, too, or where it was built before."""

    def cuda(**options: bool) -> str:
        state: str = builder.build(**options)["cuda"]
        configured = [a for call in builder.calls for a in call if a.startswith("-DPK_CUDA=")]
        assert configured[-1] == ("-DPK_CUDA=ON" if state == "built" else "-DPK_CUDA=OFF")
        assert json.loads((builder.LIB / "build.json").read_text())["cuda"] == state
        return state

    assert "no NVIDIA GPU is seen" in cuda(for_this_machine=True)
    objects = builder.BUILD / "objects"
    objects.touch()
    assert "PEFT_KERNELS_CUDA=1 builds it" in cuda(for_this_machine=True)
    assert cuda() == "built"
    assert objects.exists()  # it is added, and the CPU half not built anew
    assert cuda(for_this_machine=True) == "built"  # else its library would grow older than its sources
    assert objects.exists()
    monkeypatch.setenv("PEFT_KERNELS_CUDA", "0")
    assert cuda() == "skipped: PEFT_KERNELS_CUDA=0"
    assert not objects.exists()
    monkeypatch.setenv("PEFT_KERNELS_CUDA", "1")
    assert cuda(for_this_machine=True) == "built"
    monkeypatch.setenv("PEFT_KERNELS_CUDA", "0")
    cuda()
    monkeypatch.delenv("PEFT_KERNELS_CUDA")
    monkeypatch.setattr(builder, "gpu_seen", lambda: True)
    assert cuda(for_this_machine=True) == "built"


def test_one_architecture_alone(builder: ModuleType) -> None:
    """`build_native --arch=90`, on a machine with one GPU; a library for all of them stays one."""

    def arch(**options: str) -> list[str]:
        builder.calls.clear()
        builder.build(**options)
        return [a for call in builder.calls for a in call if a.startswith("-DPK_CUDA_ARCH=")]

    assert arch(arch="90") == ["-DPK_CUDA_ARCH=90"]
    objects = builder.BUILD / "objects"
    objects.touch()
    assert arch(arch="90") == ["-DPK_CUDA_ARCH=90"]
    assert objects.exists()
    assert arch() == []
    assert not objects.exists()
    assert arch(arch="90") == []


def test_a_cuda_half_that_is_asked_for_and_cannot_be_built_is_an_error(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "working_nvcc", lambda: ("", "no nvcc"))
    assert builder.build()["cuda"] == "skipped: no nvcc"
    for value, match in (("1", "asks for the CUDA half, but no nvcc"), ("yes", "should be 0, 1 or not set, got 'yes'")):
        monkeypatch.setenv("PEFT_KERNELS_CUDA", value)
        with pytest.raises(SystemExit, match=match):
            builder.build()
    monkeypatch.setenv("PEFT_KERNELS_CUDA", "1")
    monkeypatch.setattr(builder, "find_cxx", lambda: ([], "no C++ compiler"))
    with pytest.raises(SystemExit, match="but no C\\+\\+ compiler"):
        builder.build()
    monkeypatch.setenv("PEFT_KERNELS_NATIVE", "0")  # tools/setup_env.py: the library comes later, with `build_native`
    assert builder.build()["cuda"].startswith("skipped")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on the PATH")
@pytest.mark.parametrize("target", ["quickstart", "demo-adapters", "native", "test", "bench"])
def test_only_the_demos_leave_the_cuda_half_out_where_no_gpu_is_seen(target: str) -> None:
    done = run("make", "-n", target, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "build_native" in line]
    assert line.endswith("--for-this-machine") is (target in ("quickstart", "demo-adapters"))


@pytest.fixture
def setup_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/setup_env.py over a scratch folder, with a pip that installs nothing and remembers its calls."""
    module = load(ROOT / "tools" / "setup_env.py")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    venv = tmp_path / ".venv"
    venv.mkdir()
    calls: list[tuple[str, ...]] = []

    def pip(*args: str) -> subprocess.CompletedProcess[str]:
        calls.append(args)
        return subprocess.CompletedProcess(args, 0, stdout="pip 99.0 from here", stderr="")

    item = {"metadata": {"name": "torch", "version": "2.13.0"}}
    for name, value in {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "BUSY": venv / ".setup-unfinished",
        "STAMP": venv / ".setup-done",
        "pip": pip,
        "download": lambda *args: calls.append(("download", *args)),
        "resolve": lambda wanted: [item],
    }.items():
        monkeypatch.setattr(module, name, value)
    module.calls = calls  # type: ignore[attr-defined]
    return module


def test_setup_is_idempotent_and_follows_pyproject(setup_env: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    setup_env.install(["demo", "test"])
    said = capsys.readouterr().out
    assert "torch 2.13.0" in said
    assert " MB " in said
    assert any(call[0] == "download" for call in setup_env.calls)
    assert not setup_env.BUSY.exists()
    for fewer in (["demo", "test"], ["demo"]):
        setup_env.calls.clear()
        setup_env.install(fewer)
        assert setup_env.calls == []  # nothing asked of pip, so nothing of the network
    setup_env.install(["lint"])
    assert any("ruff" in " ".join(call) for call in setup_env.calls)
    setup_env.calls.clear()
    file = setup_env.ROOT / "pyproject.toml"
    file.write_text(file.read_text().replace('"numpy"]', '"numpy>=2"]'))
    setup_env.install(["demo"])
    assert any("numpy>=2" in call for call in setup_env.calls)


def test_setup_recovers_from_an_interruption(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "download", killed)
        with pytest.raises(KeyboardInterrupt):
            setup_env.install(["demo"])
    assert setup_env.BUSY.exists()
    assert not setup_env.STAMP.exists()
    (setup_env.VENV / "half-written").touch()
    setup_env.make_venv()  # a real one, with pip
    assert not (setup_env.VENV / "half-written").exists()
    assert setup_env.works()
    (setup_env.VENV / "bin" / "python").unlink()  # `python -m venv` itself was interrupted
    assert not setup_env.works()
    setup_env.make_venv()
    assert setup_env.works()


def test_requirements_follow_the_extras(setup_env: ModuleType) -> None:
    pyproject = setup_env.read_pyproject()
    wanted = setup_env.requirements(pyproject, ["dev"])
    assert len(wanted) == len(set(wanted))
    for name in (
        "torch>=2.9",
        "numpy",
        "pytest",
        "ruff==",
        "triton>=3.6",
        "bitsandbytes>=0.49",
        "transformers>=5.17,<5.24",
    ):
        assert any(line.startswith(name) for line in wanted), name
    # Ranges only, but for the linters, and no build of torch chosen.
    assert [line.split("==")[0] for line in wanted if "==" in line.split(";")[0]] == ["ruff", "mypy"]
    assert not any("+" in line for line in wanted)
