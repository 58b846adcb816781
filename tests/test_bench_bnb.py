"""Rows say which bitsandbytes they are beside, and a built kernel that is named is the one that runs."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from bench import bnb, results, subjects

KERNEL = """
calls = []

def gemm_4bit_forward(x, packed, absmax, blocksize, quant_type):
    calls.append((tuple(x.shape), x.dtype, quant_type))
    return x.new_zeros(x.shape[0], packed.shape[0])
"""


def built(folder: Path) -> Path:
    package = folder / "kernels-community-abc123" / bnb.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(KERNEL)
    return package


@pytest.mark.parametrize("inside", ["", bnb.PACKAGE, f"{bnb.PACKAGE}/_x.abi3.so", "_x.so"])
def test_results_name_the_folder_of_a_build_and_no_path(inside: str) -> None:
    assert bnb.built_name(Path("builds/kernels-1a2b") / inside) == "kernels-1a2b"


def test_a_path_without_a_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"{bnb.VARIABLE}.*expected a folder with {bnb.PACKAGE}"):
        bnb.load_built(tmp_path)


def test_lines_say_which_bitsandbytes() -> None:
    assert results.header({"bnb": "1.0, the wheel's kernel"}, {}, "c", "qlora")["bnb"] == "1.0, the wheel's kernel"


@pytest.fixture
def cpu_ops(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """bitsandbytes' module of CPU operators, as it is without the package `kernels`."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from bitsandbytes.backends.cpu import ops

    if not functional.has_avx512bf16():
        pytest.skip("bitsandbytes has a kernel for evaluation only on CPUs with AVX512-BF16")
    monkeypatch.setattr(ops, "gemm_4bit_forward_kernel", None)
    return ops


def test_the_wheels_kernel_is_named(cpu_ops: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(bnb.VARIABLE, raising=False)
    assert bnb.use_kernel.__wrapped__() == f"{metadata.version('bitsandbytes')}, the wheel's kernel"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_built_kernel_runs_in_evaluation_and_not_in_training(
    dtype: torch.dtype, cpu_ops: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = built(tmp_path)
    monkeypatch.setenv(bnb.VARIABLE, str(package.parent))
    version, label = metadata.version("bitsandbytes"), bnb.use_kernel.__wrapped__()
    assert label == f"{version}, quantization-bitsandbytes, built from kernels-community-abc123"
    monkeypatch.setattr(subjects, "use_kernel", lambda: label)  # it is kept for the process: not with this kernel
    calls = cpu_ops.gemm_4bit_forward_kernel.__globals__["calls"]  # type: ignore[attr-defined]
    layer = subjects.bnb_layer(subjects.quant_copies(64, 128, 1)[0], dtype)
    x = torch.randn(3, 128, dtype=dtype)
    layer.train()(x)
    assert calls == [], "training decodes the weight"
    assert not layer.eval()(x).any()
    assert calls == [((3, 128), torch.bfloat16, 0)]
