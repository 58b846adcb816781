"""AdamW by the native CPU library."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from ctypes import c_double, c_void_p, cast, pointer

import torch
from torch import Tensor

from .. import native

_F32 = torch.float32


def reason(parameters: Iterable[Tensor]) -> str | None:
    """Why the library cannot update these; None where it can."""
    for p in parameters:
        if not _plain(p):
            return f"takes contiguous float32 tensors of a CPU, not {p.dtype} on {p.device} with strides {p.stride()}"
    return native.available()


def _plain(t: Tensor) -> bool:
    return t.dtype is _F32 and t.device.type == "cpu" and t.layout is torch.strided and t.is_contiguous()


def squared_norm(gradients: Sequence[Tensor]) -> float:
    kept = [_gradient(g) for g in gradients]
    numbers = array("q", [n for g in kept for n in (0, g.data_ptr(), 0, 0, 0, g.numel())])
    square = c_double()
    code = native.cpu().pk_cpu_squared_norm(
        numbers.tobytes(), len(kept), cast(pointer(square), c_void_p), torch.get_num_threads()
    )
    native.check(code)
    return square.value


def update(tensors: Sequence[tuple[Tensor, ...]], settings: tuple[float, ...]) -> None:
    numbers: list[int] = []
    kept: list[Tensor] = []  # copies must live until the call returns
    for p, given, m, v, step in tensors:
        g = given if given.is_contiguous() and given.dtype is _F32 else _gradient(given)
        kept.append(g)
        n = p.numel()
        if not (n == g.numel() == m.numel() == v.numel() and step.numel() == 1):
            raise ValueError(f"adamw.update: tensors of one size expected, got {[t.numel() for t in (p, g, m, v)]}")
        if not (_plain(p) and _plain(m) and _plain(v) and _plain(step)):
            raise ValueError("adamw.update: contiguous float32 tensors of a CPU expected")
        numbers += (p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), step.data_ptr(), n)
    packed = struct.pack(f"={len(numbers)}q", *numbers)
    code = native.cpu().pk_cpu_adamw(packed, len(tensors), struct.pack("=6d", *settings), torch.get_num_threads())
    native.check(code)


def _gradient(g: Tensor) -> Tensor:
    if g.dtype is not _F32 or g.device.type != "cpu" or g.layout is not torch.strided:
        raise ValueError(f"adamw: dense float32 gradients on a CPU expected, got {g.dtype} on {g.device}, {g.layout}")
    return g.contiguous()
