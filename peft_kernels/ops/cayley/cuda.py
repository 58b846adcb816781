"""The CUDA backend of cayley."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...cuda_rt import backend, queue
from .native import weights

MOST = 64  # the size of a block: csrc/cuda/cayley.cu


def forward(q: Tensor, terms: int) -> Tensor:
    """R."""
    q, w = q.contiguous(), weights(terms)
    r = torch.empty_like(q)
    queue("pk_cuda_cayley", q, q.data_ptr(), *q.shape[:2], w.data_ptr(), len(w), r.data_ptr())
    return r


def backward(dr: Tensor, q: Tensor, r: Tensor, terms: int) -> Tensor:
    """dQ."""
    dr, q, r, w = dr.contiguous(), q.contiguous(), r.contiguous(), weights(terms)
    dq = torch.empty_like(q)
    queue("pk_cuda_cayley_backward", q, q.data_ptr(), r.data_ptr(), dr.data_ptr(), *q.shape[:2], w.data_ptr(), len(w),
          dq.data_ptr())  # fmt: skip
    return dq


def _refusal(*args: Any) -> str | None:
    return f"blocks of more than {MOST}" if args[0].shape[-1] > MOST else None


_F32 = frozenset({torch.float32})
BACKENDS = {
    "cayley": backend(forward, dtypes=_F32, when=_refusal),
    "cayley_backward": backend(backward, dtypes=_F32, when=_refusal),
}
