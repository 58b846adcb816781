"""The native CPU backend of cayley."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from . import series

_CPU, _F32 = frozenset({"cpu"}), frozenset({torch.float32})


def weights(terms: int) -> Tensor:
    return torch.tensor(series(terms) if terms else [], dtype=torch.float32)


def forward(q: Tensor, terms: int) -> Tensor:
    """R."""
    q, w = q.contiguous(), weights(terms)
    r = torch.empty_like(q)
    native.check(native.cpu().pk_cpu_cayley(
        q.data_ptr(), q.shape[0], q.shape[1], w.data_ptr(), len(w), r.data_ptr(), torch.get_num_threads()
    ))  # fmt: skip
    return r


def backward(dr: Tensor, q: Tensor, r: Tensor, terms: int) -> Tensor:
    """dQ."""
    dr, q, r, w = dr.contiguous(), q.contiguous(), r.contiguous(), weights(terms)
    dq = torch.empty_like(q)
    native.check(native.cpu().pk_cpu_cayley_backward(
        q.data_ptr(), r.data_ptr(), dr.data_ptr(), q.shape[0], q.shape[1], w.data_ptr(), len(w),
        dq.data_ptr(), torch.get_num_threads(),
    ))  # fmt: skip
    return dq


BACKENDS: dict[str, Backend] = {
    "cayley": Backend("native", forward, _CPU, _F32, available=native.available),
    "cayley_backward": Backend("native", backward, _CPU, _F32, available=native.available),
}
