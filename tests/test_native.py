"""The native library itself: levels, errors, the ABI, and one OpenMP runtime in the process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
import torch

from peft_kernels import native
from peft_kernels.formats import NF4_TABLE, TABLES
from peft_kernels.ops.lora_linear import native as backend

needs_native = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


def run(code: str, **env: str) -> str:
    """The output of `code` in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_native
@linux
def test_one_openmp_runtime_in_the_process() -> None:
    code = """
import os, re, torch, peft_kernels
from peft_kernels import native
from peft_kernels.testing import random_quant_weight
torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
x = torch.randn(64, 512)
(x @ x.t()).sum(); torch.ones(1 << 20).exp_()
pool = len(os.listdir("/proc/self/task"))
peft_kernels.lora_linear(x, random_quant_weight(512, 512))
assert len(os.listdir("/proc/self/task")) == pool, "the library started threads of its own"
mapped = {os.path.realpath(l.split()[-1]) for l in open("/proc/self/maps")
          if re.search(r"/lib(gomp|omp|iomp5)[^/]*\\.so", l)}
print(len(mapped), os.path.realpath(native.openmp()) in mapped)
"""
    assert run(code, PEFT_KERNELS_BACKEND="native") == "1 True"


@needs_native
@linux
def test_the_library_does_not_link_openmp() -> None:
    # a DT_NEEDED of ours could name another file than the one that torch bundles
    library = Path(native.__file__).parent / "lib" / "libpeft_kernels_cpu.so"
    assert b"libgomp.so" not in library.read_bytes()


@needs_native
@pytest.mark.parametrize("level", [] if native.available() else native.levels())
def test_the_environment_forces_a_level(level: str) -> None:
    code = "from peft_kernels import native; print(native.available(), native.level())"
    assert run(code, PEFT_KERNELS_CPU_LEVEL=level) == f"None {level}"


@needs_native
def test_an_unknown_level_is_a_reason_not_a_crash() -> None:
    code = "from peft_kernels import native; print(native.available())"
    why = run(code, PEFT_KERNELS_CPU_LEVEL="sse9")
    assert "PEFT_KERNELS_CPU_LEVEL=sse9: unknown level sse9" in why
    assert "scalar" in why


@needs_native
def test_set_level() -> None:
    before = native.level()
    assert native.levels()[0] == "scalar"
    native.set_level("scalar")
    assert native.level() == "scalar"
    with pytest.raises(native.NativeError, match=r"unknown level nope; this CPU and build have scalar"):
        native.set_level("nope")
    assert native.level() == "scalar"
    native.set_level(before)
    assert native.level() == before


def test_a_library_that_is_not_built_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_LIB_DIR", tmp_path)
    monkeypatch.setattr(native, "_loaded", {})
    why = native.available()
    assert why is not None
    assert "not built" in why
    assert "make native" in why
    with pytest.raises(native.NativeError, match="not built"):
        native.cpu()
    (tmp_path / "build.json").write_text('{"cpu": "built", "cuda": "skipped: no NVIDIA GPU is seen here"}')
    monkeypatch.setattr(native, "_loaded", {})
    assert native.available("cuda") == "the native cuda library is not built (no NVIDIA GPU is seen here): " + (
        "run `make native` in the repository"
    )
    assert native.available() == why


def test_a_broken_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libpeft_kernels_cpu.so").write_bytes(b"\x7fELF not really")
    monkeypatch.setattr(native, "_LIB_DIR", tmp_path)
    monkeypatch.setattr(native, "_loaded", {})
    assert "cannot be loaded" in str(native.available())


@needs_native
def test_another_abi_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    monkeypatch.setattr(native, "_loaded", {})
    assert f"has ABI {native.ABI_VERSION - 1}, this package needs {native.ABI_VERSION}" in str(native.available())


@needs_native
def test_the_struct_of_the_call_has_the_size_that_c_gives_it() -> None:
    assert backend._ARGS.size == native.lora_args_size()


@needs_native
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64"])
def test_places_in_memory_are_as_they_were(dtype: str) -> None:
    library, t = native.cpu(), torch.arange(100, dtype=getattr(torch, dtype))
    size = t.element_size()
    places = array("q", range(t.data_ptr(), t.data_ptr() + 100 * size, 7 * size))
    content = t[::7].numpy().tobytes()
    check = [*places.buffer_info(), size, content]
    assert library.pk_cpu_unchanged(*check) == 1
    t[50] = -1  # is not looked at
    assert library.pk_cpu_unchanged(*check) == 1
    t[98] = -1
    assert library.pk_cpu_unchanged(*check) == 0
    assert library.pk_cpu_unchanged(places.buffer_info()[0], 14, size, content) == 1


@needs_native
def test_errors_of_the_library_carry_its_text() -> None:
    sizes, x_dtype = slice(16, 19), 23  # of the fields of pk_lora_args

    def arguments(mnk: tuple[int, int, int], dtype: int) -> bytes:
        fields = list(backend._ARGS.unpack(bytes(backend._ARGS.size)))
        fields[sizes], fields[x_dtype] = mnk, dtype
        return backend._ARGS.pack(*fields)

    with pytest.raises(native.NativeError, match=r"negative size \(M -1, N 4"):
        native.check(native.cpu().pk_cpu_lora_linear(arguments((-1, 4, 4), 0), 1))
    with pytest.raises(native.NativeError, match="x_dtype must be float32, bfloat16 or float16, got 3"):
        native.check(native.cpu().pk_cpu_lora_linear(arguments((1, 4, 4), 3), 1))


@needs_native
@pytest.mark.parametrize("quant_type", [1, 2])
def test_the_tables_in_c_are_those_of_formats(quant_type: int) -> None:
    # one block of 16 codes 0 .. 15 with scale 1, through an identity x
    packed = torch.tensor([(2 * i) << 4 | (2 * i + 1) for i in range(8)] * 2, dtype=torch.uint8)
    x = torch.eye(32)
    before = native.level()
    for level in native.levels():
        native.set_level(level)
        y, _ = backend.forward(
            x, packed, torch.ones(1), None, None, None, quant_type, 32, 256, 1, None, None, 1.0, None, 0.0, None
        )
        assert y[:16, 0].tolist() == torch.tensor(TABLES[quant_type]).tolist()
    native.set_level(before)


def test_the_bf16_table_of_the_kernels_loses_less_than_a_rounded_weight() -> None:
    # csrc/cpu/lora/pack_forward.inc: codes are multiplied in bf16 as table * factor, and scaled in float32 afterwards
    table = torch.tensor(NF4_TABLE, dtype=torch.float64)
    factor = torch.tensor(1.8598137, dtype=torch.float32)
    kept = (table.float() * factor).bfloat16().double() / factor.double()
    scales = torch.rand(4096, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e-3
    eager = ((table * scales).float().bfloat16().double() / scales - table).pow(2).mean().sqrt()
    ours = (kept - table).pow(2).mean().sqrt()
    assert ours < 0.55 * eager
    assert (kept - table).mean().abs() < 0.01 * ours
    fp4 = torch.tensor(TABLES[2], dtype=torch.float64)
    exact = (fp4.float() * 1.5).bfloat16().double() / 1.5
    assert (exact - fp4).abs().max() < 2.0**-24


def test_comments_of_the_sources_name_their_subject() -> None:
    """The first word of a comment is a noun or a verb of the field."""
    begins = re.compile(r"(?:/\*|//) *(?:What|Whether|Who|That)\b.*")
    for path in sorted((Path(__file__).parents[1] / "csrc").rglob("*.*")):
        found = begins.search(path.read_text())
        assert found is None, f"{path.name}: {found[0]}"


@needs_native
def test_works_in_a_forked_process_and_after_threads_changed() -> None:
    code = """
import os, torch, peft_kernels
from peft_kernels.testing import random_quant_weight
qw, x = random_quant_weight(512, 512), torch.randn(8, 512)
want = peft_kernels.lora_linear(x, qw)
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)  # what torch's data loader does in its workers
    os._exit(0 if torch.equal(peft_kernels.lora_linear(x, qw), want) else 1)
print(os.waitpid(pid, 0)[1])
"""
    assert run(code, PEFT_KERNELS_BACKEND="native") == "0"
