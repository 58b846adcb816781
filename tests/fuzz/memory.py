"""Memory that faults beside what was asked for: pages that cannot be read before it and behind it (Linux)."""

from __future__ import annotations

import ctypes
import mmap
from ctypes import c_int, c_long, c_size_t, c_void_p

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype, _libc.mmap.argtypes = c_void_p, [c_void_p, c_size_t, c_int, c_int, c_int, c_long]
_libc.mprotect.restype, _libc.mprotect.argtypes = c_int, [c_void_p, c_size_t, c_int]
_libc.munmap.restype, _libc.munmap.argtypes = c_int, [c_void_p, c_size_t]
_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE


class Guarded:
    """Tensors between pages that fault; `close` gives their memory back, when nothing holds them any more."""

    def __init__(self) -> None:
        self._regions: list[tuple[int, int]] = []

    def empty(self, numel: int, dtype: torch.dtype, behind: bool) -> Tensor:
        """A flat tensor that ends at a page that faults (behind), or begins right after one."""
        size = numel * dtype.itemsize
        inner = -(-max(size, 1) // PAGE) * PAGE
        start = _libc.mmap(None, inner + 2 * PAGE, _NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if start in (None, c_void_p(-1).value) or _libc.mprotect(start + PAGE, inner, _READ_WRITE):
            raise OSError(ctypes.get_errno(), "no memory for a case")
        self._regions.append((start, inner + 2 * PAGE))
        if not size:
            return torch.empty(0, dtype=dtype)
        first = start + PAGE + (inner - size if behind else 0)
        return torch.frombuffer((ctypes.c_char * size).from_address(first), dtype=dtype)

    def close(self) -> None:
        for start, size in self._regions:
            _libc.munmap(start, size)
        self._regions.clear()
