"""AdamW by the native CPU library."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from ctypes import c_double, c_void_p, cast, pointer

import torch
from torch import Tensor

from .. import native
from ..checks import check_memory

_F32 = torch.float32
_POINTER, _SIZE, _CONTIGUOUS = Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous
_STORAGE, _OFFSET, _HELD = Tensor.untyped_storage, Tensor.storage_offset, torch.UntypedStorage.nbytes


def reason(parameters: Iterable[Tensor]) -> str | None:
    """Why the library cannot update these; None where it can."""
    for p in parameters:
        if not _all_plain([p]):
            return f"takes contiguous float32 tensors of a CPU, not {p.dtype} on {p.device}"
    return native.available()


def squared_norm(gradients: Sequence[Tensor]) -> float:
    kept = _dense(gradients)
    numbers = _columns(len(kept), {1: map(_POINTER, kept), 5: map(_SIZE, kept)})
    square = c_double()
    code = native.cpu().pk_cpu_squared_norm(
        numbers.tobytes(), len(kept), cast(pointer(square), c_void_p), torch.get_num_threads()
    )
    native.check(code)
    return square.value


def update(tensors: Sequence[tuple[Tensor, ...]], settings: tuple[float, ...]) -> None:
    if not tensors:
        return
    # whole columns at a time: there are hundreds of small tensors, and a loop over them takes as long as the update
    p, given, m, v, step = zip(*tensors, strict=True)
    g = _dense(given)  # copies live until the call returns
    sizes = [*map(_SIZE, p)]
    if any([*map(_SIZE, column)] != sizes for column in (g, m, v)) or any(n != 1 for n in map(_SIZE, step)):
        raise ValueError("adamw.update: a parameter, its gradient and moments of one size, and a step of one expected")
    if not _all_plain((*p, *m, *v, *step)):
        raise ValueError("adamw.update: contiguous float32 tensors of a CPU expected")
    for name, column in (("parameter", p), ("exp_avg", m), ("exp_avg_sq", v), ("step", step)):
        _in_memory("adamw.update", name, column)
    numbers = _columns(len(p), {i: map(_POINTER, column) for i, column in enumerate((p, g, m, v, step))})
    numbers[5::6] = array("q", sizes)
    packed = struct.pack("=6d", *settings)
    native.check(native.cpu().pk_cpu_adamw(numbers.tobytes(), len(p), packed, torch.get_num_threads()))
    torch.autograd.graph.increment_version(p)  # a backward pass with the old values is refused


def _columns(count: int, columns: dict[int, Iterable[int]]) -> array[int]:
    """pk_adamw of each tensor, from some of the fields."""
    numbers = array("q", bytes(48 * count))
    for i, column in columns.items():
        numbers[i::6] = array("q", column)
    return numbers


def _all_plain(tensors: Sequence[Tensor]) -> bool:
    strided = all(t.layout is torch.strided and t.is_cpu for t in tensors)
    return strided and all(map(_CONTIGUOUS, tensors)) and all(t.dtype is _F32 for t in tensors)


def _in_memory(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """ValueError where a storage was freed or cut."""
    held = [*map(_HELD, map(_STORAGE, tensors))]
    if held != [4 * n for n in map(_SIZE, tensors)] or any(map(_OFFSET, tensors)) or not all(map(_CONTIGUOUS, tensors)):
        for i, t in enumerate(tensors):  # views into more than themselves, at least one
            check_memory(op, **{f"{name} {i}": t})


def _dense(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    if _all_plain(gradients):
        _in_memory("adamw", "gradient", gradients)
        return gradients
    for g in gradients:
        if g.dtype is not _F32 or not g.is_cpu or g.layout is not torch.strided:
            got = f"{g.dtype} on {g.device}, {g.layout}"
            raise ValueError(f"adamw: dense float32 gradients on a CPU expected, got {got}")
    _in_memory("adamw", "gradient", gradients)
    return [g.contiguous() for g in gradients]
