"""A CUDA library that cannot run on a GPU is refused with the reason, so that Triton serves; which nvcc builds it.

The library is a fake here: what a driver answers is planted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_kernels import cuda_rt, native

ROOT = Path(__file__).parents[1]


class Library:
    """Answers as a driver makes it. loads: by GPU, the text of an error or None. versions: (built, driver)."""

    def __init__(self, loads: list[str | None], count_error: str = "", versions: tuple[int, int] = (12080, 12090)):
        self.loads, self.count_error, self.versions, self.text, self.asked = loads, count_error, versions, "", 0

    def pk_last_error(self) -> bytes:
        return self.text.encode()

    def pk_cuda_device_count(self, count: Any) -> int:
        self.text = self.count_error
        count._obj.value = len(self.loads)
        return 4 if self.count_error else 0

    def pk_cuda_versions(self, built: Any, driver: Any) -> int:
        built._obj.value, driver._obj.value = self.versions
        return 0

    def pk_cuda_loads(self, gpu: int) -> int:
        self.asked += 1
        self.text = self.loads[gpu] or ""
        return 4 if self.text else 0


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(library: Library) -> Library:
        monkeypatch.setitem(native._loaded, "cuda", library)
        monkeypatch.setattr(native, "_refused", {})
        return library

    return put


def test_it_is_asked_once_for_each_gpu(plant: Any) -> None:
    library = plant(Library([None, "cudaFuncGetAttributes: no kernel image is available (cudaErrorNoKernelImage)"]))
    for _ in range(3):
        assert cuda_rt.ready(0) is None
        assert "kernels do not load on GPU 1: cudaFuncGetAttributes: no kernel image" in str(cuda_rt.ready(1))
    assert library.asked == 2
    assert native.native_library("cuda", gpu=0) == native.NativeLibrary(None, built_with="12.8")
    assert "GPU 1" in str(native.native_library("cuda", gpu=1).reason)


def test_a_backend_refuses_the_gpu_that_runs_none_of_its_kernels(plant: Any) -> None:
    plant(Library([None, "no kernel image"]))
    backend = cuda_rt.backend(lambda x: x)
    assert backend.when is not None
    for gpu, expected in ((0, None), (1, "the CUDA library's kernels do not load on GPU 1: no kernel image")):
        x = SimpleNamespace(device=SimpleNamespace(type="cuda"), get_device=lambda gpu=gpu: gpu)
        assert backend.when(x) == expected


def test_a_library_newer_than_the_driver_says_so(plant: Any) -> None:
    plant(Library([], "cudaGetDeviceCount: CUDA driver version is insufficient", versions=(13000, 12080)))
    why = str(cuda_rt.ready())
    assert "insufficient; it was built with CUDA 13.0, the driver runs up to 12.8" in why
    assert "rebuild with an nvcc of CUDA 12" in why
    plant(Library([], "cudaGetDeviceCount: no device", versions=(12080, 12090)))
    assert "built with" not in str(cuda_rt.ready())


def test_under_capture_nothing_is_loaded_and_nothing_is_kept(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = plant(Library([None]))
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_initialized", lambda: True)
        m.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert "a CUDA graph is being captured" in str(cuda_rt.ready())
        assert library.asked == 0
    assert cuda_rt.ready() is None


@pytest.fixture
def builder() -> Any:
    spec = importlib.util.spec_from_file_location("gate_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def programs(root: Path, *names: str) -> list[str]:
    made = []
    for name in names:
        file = root / name / "bin" / "nvcc"
        file.parent.mkdir(parents=True)
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
        made.append(str(file))
    return made


def test_the_nvcc_of_torchs_major_version_comes_first(
    builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    twelve, older, default = programs(tmp_path, "cuda-12.10", "cuda-12.9", "cuda")
    programs(tmp_path, "cuda-13.0")
    monkeypatch.setattr(builder, "torch_cuda", lambda: "12")
    assert builder.nvcc_candidates(str(tmp_path)) == [twelve, older, default, "nvcc"]
    monkeypatch.setattr(builder, "torch_cuda", lambda: "")
    assert builder.nvcc_candidates(str(tmp_path)) == [default, "nvcc"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda-13.0"))  # who names one has decided
    assert builder.nvcc_candidates(str(tmp_path)) == [str(tmp_path / "cuda-13.0" / "bin" / "nvcc")]
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(builder, "torch_cuda", lambda: "12")
    monkeypatch.setattr(builder, "nvcc_candidates", lambda: [twelve, default])
    monkeypatch.setattr(builder, "trial", lambda c, *_: "too old" if c[0] == twelve else None)
    assert builder.working_nvcc() == (default, None)
    monkeypatch.setattr(builder, "trial", lambda c, *_: "too old")
    assert builder.working_nvcc() == (twelve, f"{twelve} cannot build for sm_120: too old")


@pytest.mark.parametrize(
    ("text", "major"),
    [("cuda: Optional[str] = '12.8'\n", "12"), ("cuda = '13.0'\n", "13"), ("cuda: Optional[str] = None\n", "")],
)
def test_torchs_cuda_is_read_without_importing_it(
    builder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, major: str
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2'\n{text}")
    found = SimpleNamespace(origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert builder.torch_cuda() == major
    assert "torch" in sys.modules  # this process's own
