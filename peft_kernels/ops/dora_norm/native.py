"""The native CPU backend of dora_norm: rows of W + s b a are added up as they are decoded, so |W|^2 is not needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import FLOATS, Backend
from ...formats import contiguous
from ..lora_linear.native import backend, pack, refusal


def _squares(weight: tuple[Any, ...], n: int, a: Tensor | None, b: Tensor | None, scaling: float, k: int) -> Tensor:
    tensors = contiguous(*weight[:5])
    out = weight[0].new_empty((n,), dtype=torch.float64)
    if n == 0 or k == 0:
        return out.zero_()
    x = torch.empty((0, k))  # no rows: only its width is read
    if a is None or b is None or a.shape[0] == 0:
        a = b = None
    else:
        a, b = a.contiguous(), b.contiguous()
    packed = pack(torch.get_num_threads(), x, *tensors, *weight[5:], n, a, b, scaling, None, 0.0, None)  # type: ignore[arg-type]
    native.check(native.cpu().pk_cpu_squared_row_norms(packed, out.data_ptr()))
    return out


def squared_row_norms(*args: Any) -> Tensor:
    """[N] float64."""
    *weight, n, k = args
    return _squares(tuple(weight), n, None, None, 1.0, k)


def dora_norm(*args: Any) -> Tensor:
    """[N] float32."""
    *weight, a, b, scaling, _ = args
    return _squares(tuple(weight), b.shape[0], a, b, scaling, a.shape[1]).sqrt().to(torch.float32)


def _when_squares(*args: Any) -> str | None:
    return refusal(args[0], args[5], None, None, None) or _strided(args[0], args[5])


def _when(*args: Any) -> str | None:
    return refusal(args[0], args[5], *args[8:10], None) or _strided(args[0], args[5])


def _strided(weight: Tensor, quant_type: int) -> str | None:
    # the reference reads such a weight tile by tile, without a copy of it
    strided = quant_type == 0 and not weight.is_contiguous()
    return "does not serve a dense weight that is not contiguous" if strided else None


_DTYPES = FLOATS | {torch.uint8}
BACKENDS: dict[str, Backend] = {
    "squared_row_norms": backend(squared_row_norms, _when_squares, dtypes=_DTYPES),
    "dora_norm": backend(dora_norm, _when, dtypes=_DTYPES),
}  # fmt: skip
