"""The CUDA library as it was built: loadable with no driver, every symbol, machine code for every architecture, errors.

What needs a GPU is in test_quantize_device.py; here the library is only looked at and asked to refuse.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from ctypes import byref, c_int64
from pathlib import Path

import pytest
import torch

from bench.static import sass
from peft_kernels import cuda_rt, native

ROOT = Path(__file__).parents[1]
ARCHITECTURES = {80, 86, 89, 90, 100, 120}
STATE = native._LIB_DIR / "build.json"


def built() -> str | None:
    """Why there is no library to look at. That a build said "built" and left none is a failure, not a reason."""
    state = json.loads(STATE.read_text())["cuda"] if STATE.exists() else "skipped: it was not built through setup.py"
    return native.available("cuda") if state != "built" else None


pytestmark = pytest.mark.skipif(built() is not None, reason=str(built()))


def path() -> Path:
    return native._LIB_DIR / "libpeft_kernels_cuda.so"


def declared() -> set[str]:
    """The functions that pk_abi.h declares for the CUDA library."""
    text = (ROOT / "csrc" / "pk_abi.h").read_text()
    return set(re.findall(r"PK_EXPORT [\w ]+?\*?(pk_cuda_\w+)\(", text))


def test_the_library_loads_and_the_binding_is_whole():
    assert native.available("cuda") is None
    names = declared()
    assert len(names) >= 4
    assert names == set(native._CUDA_SIGNATURES)
    for name in names:
        assert getattr(native.cuda(), name).argtypes == native._CUDA_SIGNATURES[name]


def test_argument_counts_are_the_headers():
    """ctypes checks no prototype: count the parameters of each declaration."""
    text = re.sub(r"/\*.*?\*/", "", (ROOT / "csrc" / "pk_abi.h").read_text(), flags=re.S)
    for name, signature in native._CUDA_SIGNATURES.items():
        parameters = re.search(rf"\b{name}\((.*?)\);", text, re.S)
        assert parameters is not None, name
        assert len(parameters.group(1).split(",")) == len(signature), name


def test_it_exports_the_abi_and_nothing_else():
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm on the path")
    out = subprocess.run([nm, "-D", "--defined-only", str(path())], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in out.splitlines() if line.strip()}
    assert exported == declared() | {"pk_abi_version", "pk_last_error"}


def test_it_needs_neither_driver_nor_runtime():
    """The CUDA runtime is linked in and looks for the driver on first use only."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf on the path")
    out = subprocess.run([readelf, "-d", str(path())], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\]", out)
    assert needed, out
    assert not [n for n in needed if re.match(r"lib(cuda|cudart|nvidia|torch)", n)], needed


def cuobjdump() -> str:
    found = sass.carried_tool("cuobjdump")
    if found is None:
        pytest.skip("cuobjdump is neither in Triton nor on the path")
    return str(found)


def test_machine_code_for_every_architecture():
    out = subprocess.run([cuobjdump(), "--list-elf", str(path())], capture_output=True, text=True, check=True).stdout
    found = [int(sm) for sm in re.findall(r"\.sm_(\d+)\w?\.cubin", out)]
    assert set(found) == ARCHITECTURES, out
    ptx = subprocess.run([cuobjdump(), "--list-ptx", str(path())], capture_output=True, text=True, check=True).stdout
    assert {int(sm) for sm in re.findall(r"\.sm_(\d+)\w?\.ptx", ptx)} == {80, 90}, "for GPUs without machine code"
    assert len({found.count(sm) for sm in ARCHITECTURES}) == 1, out


def test_kernels_bound_by_memory_use_few_registers():
    """At most what 4 blocks of 256 threads share on an SM. Spills and stack of every kernel are in test_static.py."""
    out = subprocess.run([cuobjdump(), "-res-usage", str(path())], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", out)
    kernels = {name for name, *_ in rows}
    assert sum("quantize_kernel" in name for name in kernels) == 3 * 8 + 3 * 2  # dequantise: aligned, or not
    assert sum("absmax_kernel" in name for name in kernels) == 1
    assert len(rows) == len(kernels) * len(ARCHITECTURES)
    for name, registers, *_ in rows:
        if any(kind in name for kind in ("quantize_kernel", "absmax_kernel")):
            assert int(registers) <= 64, name


def test_bad_arguments_are_named():
    lib, p = native.cuda(), torch.zeros(64).data_ptr()
    with pytest.raises(native.NativeError, match=r"quantize_4bit: blocksize must be .* got 63"):
        native.check(lib.pk_cuda_quantize_4bit(p, 0, 64, 63, p, p, p, p, 0, None), "cuda")
    with pytest.raises(native.NativeError, match=r"quantize_4bit: w_dtype must be .* got code 3"):
        native.check(lib.pk_cuda_quantize_4bit(p, 3, 64, 64, p, p, p, p, 0, None), "cuda")
    with pytest.raises(native.NativeError, match="dequantize_4bit: a pointer is NULL"):
        native.check(
            lib.pk_cuda_dequantize_4bit(p, None, None, None, None, p, 64, 256, 64, 0, p, 0, None), "cuda"
        )  # fmt: skip
    with pytest.raises(native.NativeError, match="nested scales need nested_absmax"):
        native.check(lib.pk_cuda_dequantize_4bit(p, p, None, p, p, p, 64, 256, 64, 0, p, 0, None), "cuda")
    with pytest.raises(native.NativeError, match="quantize_absmax: nested_blocksize must be positive, got 0"):
        native.check(lib.pk_cuda_quantize_absmax(p, 1, p, 0, p, p, p, 0, None), "cuda")


def test_nothing_to_do_is_no_error():
    lib = native.cuda()
    assert lib.pk_cuda_quantize_4bit(None, 0, 0, 64, None, None, None, None, 0, None) == 0
    assert lib.pk_cuda_dequantize_4bit(None, None, None, None, None, None, 64, 256, 0, 0, None, 0, None) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_launches_without_a_gpu_fail_with_cudas_reason():
    lib, p, count = native.cuda(), torch.zeros(64).data_ptr(), c_int64(-1)
    assert lib.pk_cuda_device_count(byref(count)) == 4  # PK_ERR_DEVICE
    assert count.value == -1
    for call in (
        lambda: lib.pk_cuda_device_count(byref(count)),
        lambda: lib.pk_cuda_quantize_4bit(p, 0, 64, 64, p, p, p, p, 0, None),
        lambda: lib.pk_cuda_quantize_absmax(p, 1, p, 256, p, p, p, 0, None),
        lambda: lib.pk_cuda_dequantize_4bit(p, p, None, None, None, p, 64, 256, 64, 0, p, 0, None),
    ):
        with pytest.raises(native.NativeError, match=r"\(cudaError\w+\)"):
            native.check(call(), "cuda")
    assert "no usable GPU" in str(cuda_rt.ready())


def test_it_loads_in_a_process_without_torch():
    """A plain C library: nothing in it waits for torch's CUDA."""
    code = f"import ctypes; print(ctypes.CDLL({str(path())!r}).pk_abi_version())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == native.ABI_VERSION
