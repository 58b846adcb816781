"""The CUDA backend of dora_norm and squared_row_norms: 4-bit weights, read and decoded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...cuda_rt import backend, parts, queue
from ...formats import contiguous
from ..lora_linear.cuda import refuse_weight, with_tail
from ..lora_linear.native import pack

_ROWS, _COLUMNS = 32, 256  # of W that a block takes at once: csrc/cuda/dora_norm.cu


def _sums(weight: tuple[Any, ...], n: int, k: int, a: Tensor | None, b: Tensor | None, scaling: float) -> Tensor:
    """|W + scaling b a|^2 of each row, float64 [N]."""
    tensors = contiguous(*weight[:5])
    device = weight[0].device
    if n == 0 or k == 0:
        return torch.zeros((n,), dtype=torch.float64, device=device)
    if a is None or b is None or a.shape[0] == 0:
        a = b = None
    else:
        a, b = a.contiguous(), b.contiguous()
    count = parts(-(-k // _COLUMNS), -(-n // _ROWS))
    out = torch.empty((count, n), dtype=torch.float64, device=device)
    x = torch.empty((0, k), dtype=torch.bfloat16, device=device)  # no rows: only its width is read
    packed = pack(0, x, *tensors, *weight[5:], n, a, b, scaling, None, 0.0, None)  # type: ignore[arg-type]
    queue("pk_cuda_squared_row_norms", weight[0], with_tail(packed, weight[5]), out.data_ptr(), count)
    return out[0] if count == 1 else out.sum(0)


def squared_row_norms(*args: Any) -> Tensor:
    """|W|^2 of each row, float64 [N]."""
    *weight, n, k = args
    return _sums(tuple(weight), n, k, None, None, 1.0)


def dora_norm(*args: Any) -> Tensor:
    """|W + scaling b a| of each row, float32 [N]."""
    *weight, a, b, scaling, _ = args
    return _sums(tuple(weight), b.shape[0], a.shape[1], a, b, scaling).sqrt().float()


def _when_squares(*args: Any) -> str | None:
    return refuse_weight(*args[:8], args[9], None, None, None)


def _when(*args: Any) -> str | None:
    return refuse_weight(*args[:8], args[8].shape[1], *args[8:10], None)


BACKENDS = {
    "squared_row_norms": backend(squared_row_norms, dtypes=frozenset({torch.uint8}), when=_when_squares),
    "dora_norm": backend(dora_norm, dtypes=frozenset({torch.uint8}), when=_when),
}
