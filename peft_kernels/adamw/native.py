"""AdamW by the native CPU library."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from ctypes import c_double, c_void_p, cast, pointer
from operator import is_

import torch
from torch import Tensor

from .. import native
from ..checks import check_memory
from ..native import addresses

_F32 = torch.float32
_POINTER, _SIZE, _CONTIGUOUS = Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous
_STORAGE, _OFFSET, _HELD = Tensor.untyped_storage, Tensor.storage_offset, torch.UntypedStorage.nbytes


def reason(parameters: Iterable[Tensor]) -> str | None:
    """Why the library cannot update these; None where it can."""
    for p in parameters:
        if not _all_plain([p]):
            return f"takes contiguous float32 tensors of a CPU, not {p.dtype} on {p.device}"
    return native.available()


class Kept:
    """Parameters and their state as the library takes them, from one step to the next.

    It holds while they are the same objects of the same sizes, contiguous, with their memory where it was: hundreds of
    small tensors that no cache holds take as long to look at as to update.
    """

    def __init__(self) -> None:
        self._columns: Sequence[Sequence[Tensor]] = ((), (), (), ())
        self._places: list[int] = []
        self._sizes: list[int] = []
        self._numbers = array("q")
        self._seen: tuple[Sequence[Tensor], list[int]] = ((), [])

    def squared_norm(self, gradients: Sequence[Tensor]) -> float:
        """The square of `adamw.norm`; `update` need not look at these gradients again."""
        dense = _dense(gradients)
        at = addresses(dense)
        self._seen = (gradients, at) if dense is gradients else ((), [])
        square = c_double()
        numbers = _columns(len(dense), {1: at, 5: map(_SIZE, dense)})
        code = native.cpu().pk_cpu_squared_norm(
            numbers.tobytes(), len(dense), cast(pointer(square), c_void_p), torch.get_num_threads()
        )
        native.check(code)
        return square.value

    def update(
        self, p: Sequence[Tensor], given: Sequence[Tensor], m: Sequence[Tensor], v: Sequence[Tensor],
        step: Sequence[Tensor], settings: tuple[float, ...],
    ) -> None:  # fmt: skip
        columns, (seen, at), self._seen = (p, m, v, step), self._seen, ((), [])
        if not p:
            return
        if not (all(map(_alike, columns, self._columns)) and _places(columns) == self._places):
            self._columns = ((), (), (), ())  # until these are looked at
            sizes = _checked(*columns)
            self._sizes, self._places = sizes, _places(columns)
            self._numbers = _columns(len(p), {i: map(_POINTER, t) for i, t in zip((0, 2, 3, 4), columns, strict=True)})
            self._numbers[5::6] = array("q", sizes)
            self._columns = columns
        g = given if _alike(given, seen) and addresses(given) == at else _dense(given)  # copies live until the return
        if [*map(_SIZE, g)] != self._sizes:
            raise ValueError(_SIZES)
        self._numbers[1::6] = array("q", addresses(g))
        packed = struct.pack("=6d", *settings)
        native.check(native.cpu().pk_cpu_adamw(self._numbers.tobytes(), len(p), packed, torch.get_num_threads()))
        torch.autograd.graph.increment_version(p)  # a backward pass with the old values is refused


_SIZES = "adamw.update: a parameter, its gradient and moments of one size, and a step of one expected"


def _alike(these: Sequence[Tensor], those: Sequence[Tensor]) -> bool:
    return len(these) == len(those) and all(map(is_, these, those))


def _places(columns: Sequence[Sequence[Tensor]]) -> list[int]:
    """Where tensors are and of what size, whether they are contiguous; whole columns at a time, as a loop over
    hundreds of small tensors takes as long as the update."""
    found: list[int] = []
    for column in columns:
        found += [*map(_POINTER, column), *map(_SIZE, column), *map(_CONTIGUOUS, column)]
    return found


def _checked(p: Sequence[Tensor], m: Sequence[Tensor], v: Sequence[Tensor], step: Sequence[Tensor]) -> list[int]:
    """Their sizes. Raises ValueError unless the library may read and write all of them."""
    sizes = [*map(_SIZE, p)]
    if any([*map(_SIZE, column)] != sizes for column in (m, v)) or any(n != 1 for n in map(_SIZE, step)):
        raise ValueError(_SIZES)
    if not _all_plain((*p, *m, *v, *step)):
        raise ValueError("adamw.update: contiguous float32 tensors of a CPU expected")
    for name, column in (("parameter", p), ("exp_avg", m), ("exp_avg_sq", v), ("step", step)):
        _in_memory("adamw.update", name, column)
    return sizes


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
