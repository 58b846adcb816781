"""Many small matrices transposed in one call: a stack of adapters holds lora_B transposed, and so are its gradients.

Nothing is computed: the bits are those of `Tensor.copy_`, which is a call for each matrix and reads across the grain.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native


def copy_transposed(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """`to.copy_(source.t())` for each (to, source), without gradients. A source must not overlap any `to`.

    Two dimensions, any dtypes, devices and strides; dense CPU tensors of one dtype of 2 or 4 bytes are one call of the
    native library, where that is built. Raises RuntimeError where shapes do not fit, as `copy_` does.
    """
    if not pairs:
        return
    dtype = pairs[0][0].dtype
    size = dtype.itemsize
    numbers: list[int] = []
    for to, source in pairs:
        rows, cols = source.shape
        plain = (
            to.shape == (cols, rows) and to.dtype is source.dtype is dtype and to.device.type == "cpu"
            and source.device.type == "cpu" and to.layout is source.layout is torch.strided
            and _by_rows(to) and _by_rows(source) and not (source.is_neg() or source.is_conj() or to.is_neg())
        )  # fmt: skip
        if not plain:
            break
        numbers += (source.data_ptr(), to.data_ptr(), rows, cols, _step(source), _step(to))
    if len(numbers) < 6 * len(pairs) or size not in (2, 4) or native.available() is not None:
        with torch.no_grad():
            torch._foreach_copy_([to for to, _ in pairs], [source.t() for _, source in pairs])
        return
    packed = struct.pack(f"={len(numbers)}q", *numbers)
    native.check(native.cpu().pk_cpu_transpose(packed, len(pairs), size, torch.get_num_threads()))


def _by_rows(t: Tensor) -> bool:
    """Whether a row's elements follow one another, and rows do not overlap."""
    return t.is_contiguous() or (t.stride(1) == 1 and t.stride(0) >= t.shape[1])


def _step(t: Tensor) -> int:
    return t.stride(0) if t.shape[0] > 1 else max(t.shape[1], 1)
