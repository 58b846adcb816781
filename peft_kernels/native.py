"""The only ctypes binding: the native libraries behind `csrc/pk_abi.h`, loaded on first use, after torch.

`available()` says why the CPU library cannot be used (None: it can); `cpu()` is the loaded library. Callers check
dtype, device, contiguity and shape, and pass `data_ptr()`s. What else reads or compares memory is here too: `places`,
`addresses`, `Samples`.

Adding a function: declare it in csrc/pk_abi.h (which lists the other places) and add its argument types to
`_CPU_SIGNATURES` (or `_CUDA_SIGNATURES`). Every function there returns a `pk_status`; wrap calls in `check(...)`.
"""

from __future__ import annotations

import json
import os
import warnings
from array import array
from collections.abc import Iterator, Sequence
from ctypes import CDLL, PYFUNCTYPE, byref, c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p, string_at
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch  # first: its OpenMP runtime is the one that the CPU library uses

from .checks import capturing

ABI_VERSION = 13  # PK_ABI_VERSION of csrc/pk_abi.h
LEVEL_ENV = "PEFT_KERNELS_CPU_LEVEL"
BUILD_COMMAND = "make native"
DTYPES: dict[torch.dtype, int] = {  # pk_dtype
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.uint8: 4,
}

# name -> argument types; all return a pk_status
_CPU_SIGNATURES: dict[str, list[Any]] = {
    "pk_cpu_set_level": [c_char_p],
    "pk_cpu_quantize_4bit": [c_void_p, c_int64, c_int64, c_int64, *[c_void_p] * 4, c_int64],
    "pk_cpu_quantize_absmax": [c_void_p, c_int64, c_void_p, c_int64, *[c_void_p] * 3, c_int64],
    # an array of pk_lora_args packed into bytes, which ctypes passes far faster than 30 arguments; its length
    "pk_cpu_lora_linear": [c_char_p, c_int64],
    "pk_cpu_lora_linear_backward": [c_char_p, c_int64],
    "pk_cpu_lora_linear_paths": [c_char_p, *[c_int64] * 2, c_void_p],
    "pk_cpu_squared_row_norms": [c_char_p, c_void_p],
    "pk_cpu_lora_mixture": [c_char_p, c_void_p, *[c_int64] * 2],
    "pk_cpu_lora_mixture_backward": [c_char_p, c_void_p, *[c_int64] * 2, c_void_p],
    "pk_cpu_grouped_linear": [c_char_p, c_void_p, *[c_int64] * 2],
    "pk_cpu_grouped_linear_backward": [c_char_p, c_void_p, *[c_int64] * 2],
    "pk_cpu_dora_linear": [c_char_p, *[c_void_p] * 3],
    "pk_cpu_dora_linear_backward": [c_char_p, c_void_p],
    "pk_cpu_gated": [*[c_void_p] * 2, *[c_int64] * 7, *[c_double] * 3, c_void_p, c_int64],
    "pk_cpu_gated_backward": [*[c_void_p] * 3, *[c_int64] * 9, *[c_double] * 3, *[c_void_p] * 2, c_int64],
    "pk_cpu_adamw": [c_char_p, c_int64, c_char_p, c_int64],
    "pk_cpu_squared_norm": [c_char_p, c_int64, c_void_p, c_int64],
    "pk_cpu_softmax_slice": [c_void_p, *[c_int64] * 3, c_void_p, c_int64, c_double, *[c_void_p] * 4, c_int64],
    "pk_cpu_norm": [*[c_void_p] * 3, *[c_int64] * 8, *[c_double] * 2, c_void_p, c_int64],
    "pk_cpu_norm_backward": [*[c_void_p] * 3, *[c_int64] * 8, *[c_double] * 2, *[c_void_p] * 3, c_int64],
    "pk_cpu_attention": [c_char_p],  # a pk_attention_args packed into bytes
    "pk_cpu_attention_backward": [c_char_p],
    "pk_cpu_rotary": [c_char_p],
    "pk_cpu_butterfly_rotate": [*[c_void_p] * 2, *[c_int64] * 7, c_void_p, c_int64],
    "pk_cpu_butterfly_rotate_backward": [*[c_void_p] * 3, *[c_int64] * 7, *[c_void_p] * 2, c_int64],
    "pk_cpu_butterfly_linear": [c_char_p, c_void_p, *[c_int64] * 3],
    "pk_cpu_butterfly_linear_backward": [c_char_p, c_void_p, *[c_int64] * 3, c_void_p],
    "pk_cpu_cayley": [c_void_p, *[c_int64] * 2, c_void_p, c_int64, c_void_p, c_int64],
    "pk_cpu_cayley_backward": [*[c_void_p] * 3, *[c_int64] * 2, c_void_p, c_int64, c_void_p, c_int64],
    "pk_cpu_householder_rotate": [*[c_void_p] * 3, *[c_int64] * 4, *[c_void_p] * 2, c_int64],
    "pk_cpu_householder_rotate_backward": [*[c_void_p] * 5, *[c_int64] * 4, *[c_void_p] * 3, c_int64],
    "pk_cpu_pair_rotate": [*[c_void_p] * 3, *[c_int64] * 4, c_void_p, c_int64],
    "pk_cpu_pair_rotate_backward": [*[c_void_p] * 4, *[c_int64] * 4, *[c_void_p] * 3, c_int64],
    "pk_cpu_dequantize_4bit": [*[c_void_p] * 5, *[c_int64] * 5, c_void_p, c_int64],
    "pk_cpu_dequantize_rows": [*[c_void_p] * 5, *[c_int64] * 7, c_void_p, c_int64],
}
# Which look at what other threads of Python may change: these wait while they run. Any result.
_CPU_HOLDING: dict[str, list[Any]] = {
    "pk_cpu_unchanged": [c_int, c_void_p, c_int64, c_int64, c_char_p],
}
_CUDA_SIGNATURES: dict[str, list[Any]] = {
    "pk_cuda_device_count": [c_void_p],
    "pk_cuda_versions": [c_void_p, c_void_p],
    "pk_cuda_loads": [c_int64],
    "pk_cuda_quantize_4bit": [c_void_p, c_int64, c_int64, c_int64, *[c_void_p] * 4, c_int64, c_void_p],
    "pk_cuda_quantize_absmax": [c_void_p, c_int64, c_void_p, c_int64, *[c_void_p] * 3, c_int64, c_void_p],
    "pk_cuda_dequantize_4bit": [*[c_void_p] * 6, *[c_int64] * 4, c_void_p, c_int64, c_void_p],
    "pk_cuda_dequantize_rows": [c_char_p, c_int64, c_void_p, c_int64, c_void_p],
    "pk_cuda_lora_workspace": [c_char_p, c_int64, c_void_p],
    "pk_cuda_lora_linear": [c_char_p, c_int64, c_void_p],
    "pk_cuda_lora_linear_backward": [c_char_p, c_int64, c_void_p],
    "pk_cuda_lora_stacked_workspace": [c_char_p, c_int64, c_void_p],
    "pk_cuda_lora_linear_stacked": [c_char_p, *[c_int64] * 2, c_void_p],
    "pk_cuda_squared_row_norms": [c_char_p, c_void_p, c_int64, c_int64, c_void_p],
    "pk_cuda_pair_rotate": [*[c_void_p] * 3, *[c_int64] * 4, c_void_p, c_int64, c_void_p],
    "pk_cuda_pair_rotate_backward": [*[c_void_p] * 4, *[c_int64] * 4, *[c_void_p] * 2, *[c_int64] * 2, c_void_p],
    "pk_cuda_butterfly_rotate": [*[c_void_p] * 2, *[c_int64] * 8, c_void_p, c_int64, c_void_p],
    "pk_cuda_butterfly_gradient": [*[c_void_p] * 3, *[c_int64] * 4, c_void_p, c_int64, c_void_p],
    "pk_cuda_block_product": [*[c_void_p] * 2, *[c_int64] * 7, c_void_p, c_int64, c_void_p],
    "pk_cuda_block_gradient": [*[c_void_p] * 2, *[c_int64] * 6, c_void_p, *[c_int64] * 2, c_void_p],
    "pk_cuda_householder_rotate": [*[c_void_p] * 3, *[c_int64] * 4, *[c_void_p] * 2, c_int64, c_void_p],
    "pk_cuda_householder_gradient": [*[c_void_p] * 2, *[c_int64] * 4, c_void_p, *[c_int64] * 2, c_void_p],
    "pk_cuda_cayley": [c_void_p, *[c_int64] * 2, c_void_p, c_int64, c_void_p, c_int64, c_void_p],
    "pk_cuda_cayley_backward": [*[c_void_p] * 3, *[c_int64] * 2, c_void_p, c_int64, c_void_p, c_int64, c_void_p],
}

_LIB_DIR = Path(__file__).resolve().parent / "lib"
_loaded: dict[str, CDLL | str] = {}  # library -> the loaded library, or the reason why there is none
_hosts: dict[str, CDLL] = {}  # path -> a host build of the CUDA sources
_host: CDLL | None = None  # the one in use


class NativeError(RuntimeError):
    """A native function failed; the text is the library's own."""


def _bind(lib: CDLL, signatures: dict[str, list[Any]]) -> str | None:
    """Declare the functions of a library; the reason why that is impossible, or None."""
    try:
        lib.pk_abi_version.argtypes, lib.pk_abi_version.restype = [], c_int
        lib.pk_last_error.argtypes, lib.pk_last_error.restype = [], c_char_p
        version = lib.pk_abi_version()
        if version != ABI_VERSION:
            return (
                f"the built library has ABI {version}, this package needs {ABI_VERSION}: rebuild it ({BUILD_COMMAND})"
            )
        for name, argtypes in signatures.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = argtypes, c_int
    except AttributeError as e:
        return f"the built library lacks a function, {e}: rebuild it ({BUILD_COMMAND})"
    return None


def _left_out(name: str) -> str:
    """The reason that the last build gave for having no library `name`, in brackets."""
    try:
        state = str(json.loads((_LIB_DIR / "build.json").read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError):
        return ""
    return f" ({state.removeprefix('skipped: ')})" if state.startswith("skipped: ") else ""


def _load(name: str, signatures: dict[str, list[Any]]) -> CDLL | str:
    path = _LIB_DIR / f"libpeft_kernels_{name}.so"
    if not path.is_file():
        return f"the native {name} library is not built{_left_out(name)}: run `{BUILD_COMMAND}` in the repository"
    try:
        lib = CDLL(str(path))
    except OSError as e:
        return f"the native {name} library cannot be loaded: {e}"
    return _bind(lib, signatures) or lib


def _load_cpu() -> CDLL | str:
    lib = _load("cpu", _CPU_SIGNATURES)
    if isinstance(lib, str):
        return lib
    for name in ("pk_lora_args_size", "pk_attention_args_size"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = [], c_int64
    for name in ("pk_cpu_level", "pk_cpu_levels", "pk_cpu_openmp"):
        getattr(lib, name).argtypes, getattr(lib, name).restype = [], c_char_p
    try:
        for name, types in _CPU_HOLDING.items():
            setattr(lib, name, PYFUNCTYPE(*types)((name, lib)))
    except AttributeError as e:
        return f"the built library lacks a function, {e}: rebuild it ({BUILD_COMMAND})"
    wanted = os.environ.get(LEVEL_ENV, "")
    if wanted and lib.pk_cpu_set_level(wanted.encode()) != 0:
        return f"{LEVEL_ENV}={wanted}: {_text(lib)}"
    return lib


def use_simt(path: str | os.PathLike[str] | None) -> CDLL | None:
    """Let a host build of the CUDA sources (csrc/simt) stand in for the CUDA library, on CPU tensors, from now on.

    None: the CUDA library again. Process-wide; for tests, which build it (tests/simt_tools.py). Returns the library.
    Raises NativeError where it is none.
    """
    global _host
    if path is None:
        _host = None
        return None
    lib = _hosts.get(str(path))
    if lib is None:
        try:
            lib = CDLL(str(path))
            lib.pk_simt_set_seed.argtypes, lib.pk_simt_set_seed.restype = [c_uint64], None
        except (OSError, AttributeError) as e:
            raise NativeError(f"use_simt: path must be a host build of the CUDA sources, got {path}: {e}") from e
        why = _bind(lib, _CUDA_SIGNATURES)
        if why is not None:
            raise NativeError(f"use_simt: {path}: {why}")
        _hosts[str(path)] = lib
    _host = lib
    return lib


def simt() -> bool:
    """True if a host build stands in for the CUDA library."""
    return _host is not None


def _get(name: str) -> CDLL | str:
    if name == "cuda" and _host is not None:
        return _host
    found = _loaded.get(name)
    if found is None:
        found = _loaded[name] = _load_cpu() if name == "cpu" else _load(name, _CUDA_SIGNATURES)
    return found


def _text(lib: CDLL) -> str:
    return str(lib.pk_last_error().decode(errors="replace"))


def available(library: str = "cpu") -> str | None:
    """Why `library` ("cpu" or "cuda") cannot be used; None where it can."""
    found = _get(library)
    return found if isinstance(found, str) else None


def cpu() -> CDLL:
    """The CPU library. Raises NativeError with the reason where there is none."""
    found = _get("cpu")
    if isinstance(found, str):
        raise NativeError(found)
    return found


def cuda() -> CDLL:
    """The CUDA library. Raises NativeError with the reason where there is none."""
    found = _get("cuda")
    if isinstance(found, str):
        raise NativeError(found)
    return found


def pointer(t: torch.Tensor | None) -> int:
    """Where a tensor's data begins; 0 for none, which is C's NULL."""
    return 0 if t is None else t.data_ptr()


def say_misaligned(**tensors: torch.Tensor) -> None:
    """A warning for each tensor that does not begin at a multiple of 16 bytes: a GPU reads it element by element."""
    for name, t in tensors.items():
        if t.data_ptr() % 16:
            warnings.warn(
                f"peft_kernels: {name} does not begin at a multiple of 16 bytes (a view into the middle of another "
                f"tensor?): kernels read it element by element, which is far slower; pass {name}.clone()", stacklevel=4,
            )  # fmt: skip


class NativeLibrary(NamedTuple):
    """Facts about a native library. reason: why it cannot be used; None where it can. Of the CPU's: level, levels: the
    instruction set in use and those that there are, rising; openmp: path of the OpenMP runtime, "" where there is none.
    Of the CUDA library: built_with: the CUDA release of its nvcc, "13.0".
    """

    reason: str | None
    level: str = ""
    levels: tuple[str, ...] = ()
    openmp: str = ""
    built_with: str = ""


def native_library(library: str = "cpu", gpu: int | None = None) -> NativeLibrary:
    """Facts about a native library, "cpu" or "cuda". gpu: a GPU's index; the reason is then why it cannot run there."""
    why = available(library)
    if why is not None:
        return NativeLibrary(why)
    if library == "cuda":
        return NativeLibrary(None if gpu is None else gpu_refusal(gpu), built_with=_cuda_versions()[0])
    return NativeLibrary(None, level(), levels(), openmp())


def _cuda_versions() -> tuple[str, str]:
    """(the CUDA release that the CUDA library was built with, the newest that the driver runs): "" for no driver."""
    built, driver = c_int64(0), c_int64(0)
    if cuda().pk_cuda_versions(byref(built), byref(driver)):
        return "", ""
    one, other = (f"{n.value // 1000}.{n.value % 1000 // 10}" if n.value else "" for n in (built, driver))
    return one, other


_refused: dict[int, str | None] = {}  # GPU -> why the CUDA library cannot run there; drivers do not come and go


def gpu_refusal(gpu: int) -> str | None:
    """Why the CUDA library cannot run on a GPU, by its index; None where it can. Asked once for each."""
    if gpu not in _refused:
        if (why := available("cuda")) is None and capturing():
            # it would be loaded now, which capture does not take; nothing is known, so nothing is kept
            return "the CUDA library is not loaded on this GPU yet, and a CUDA graph is being captured: call it before"
        _refused[gpu] = why or _gpu_refusal(gpu)
    return _refused[gpu]


def _gpu_refusal(gpu: int) -> str | None:
    lib, count = cuda(), c_int64(0)
    if lib.pk_cuda_device_count(byref(count)):
        why = _text(lib)
        built, driver = _cuda_versions()
        if driver and [*map(int, built.split("."))] > [*map(int, driver.split("."))]:
            older = f"with an nvcc of CUDA {driver.split('.')[0]} (CUDACXX=...; {BUILD_COMMAND})"
            why += f"; it was built with CUDA {built}, the driver runs up to {driver}: update that, or rebuild {older}"
        return f"the CUDA library finds no usable GPU: {why}"
    if not count.value:
        return "the CUDA library finds no GPU"
    with torch.cuda.device(gpu if torch.cuda.is_available() else -1):  # the library changes the thread's device
        if lib.pk_cuda_loads(gpu):
            return f"the CUDA library's kernels do not load on GPU {gpu}: {_text(lib)}"
    return None


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [*map(torch.Tensor.data_ptr, tensors)]


class Samples:
    """A few elements of tensors on the CPU, as they were. Their memory must be there whenever they are compared."""

    def __init__(self, tensors: Sequence[torch.Tensor], count: int) -> None:
        at: dict[int, list[int]] = {}  # of elements in memory, by their size in bytes
        for t in tensors:
            at.setdefault(min(t.element_size(), 8), []).extend(_sampled(t, count))
        self._parts = [(array("q", places), size) for size, places in at.items() if places]
        self._content = [*map(_read, self._parts)]
        # compared in one native call: one after the other each costs a trip to memory
        self._compare = None if available() else cpu().pk_cpu_unchanged
        parts = zip(self._parts, self._content, strict=True)
        self._arguments = [(*places.buffer_info(), size, content) for (places, size), content in parts]

    def unchanged(self) -> bool:
        compare = self._compare
        if compare is None:
            return [*map(_read, self._parts)] == self._content
        for arguments in self._arguments:  # noqa: SIM110  # half of the time of all() with a generator
            if not compare(*arguments):
                return False
        return True


def _read(part: tuple[array[int], int]) -> bytes:
    return b"".join(map(string_at, part[0], repeat(part[1])))


def _sampled(t: torch.Tensor, count: int) -> Iterator[int]:
    """Addresses of elements of a tensor, evenly from its first to its last, however it lies in memory."""
    first, size = t.data_ptr(), t.element_size()
    for i in range(0, t.numel() if first else 0, t.numel() // count + 1):
        at = 0
        for length, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
            i, index = divmod(i, length)
            at += index * stride
        yield first + at * size


def check(code: int, library: str = "cpu") -> None:
    """Raise NativeError with the library's text unless `code` is PK_OK."""
    if code:
        lib = _get(library)
        raise NativeError(lib if isinstance(lib, str) else _text(lib))


def level() -> str:
    """The instruction set level in use: scalar, avx2, avx512 or avx512bf16."""
    return str(cpu().pk_cpu_level().decode())


def levels() -> tuple[str, ...]:
    """Every level that this CPU and build have, rising."""
    return tuple(cpu().pk_cpu_levels().decode().split(","))


def set_level(name: str | None) -> None:
    """Use level `name` from now on (None: the best one). Process-wide; for tests and benches, not while kernels run."""
    check(cpu().pk_cpu_set_level(name.encode() if name else None))


def openmp() -> str:
    """Path of the OpenMP runtime that the library runs on (torch's); "" where there is none and it runs serially."""
    return str(cpu().pk_cpu_openmp().decode())


def lora_args_size() -> int:
    """sizeof(pk_lora_args) of the built library: ops/lora_linear/native.py packs the same struct."""
    return int(cpu().pk_lora_args_size())


def attention_args_size() -> int:
    """sizeof(pk_attention_args) of the built library: ops/attention/native.py packs the same struct."""
    return int(cpu().pk_attention_args_size())
