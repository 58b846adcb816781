"""Triton backend of cayley: the host side. A block a program, in registers; products in float32 ("ieee")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, empty_like

from ...triton_lib import host
from . import series

MOST = 64  # a block and what it is multiplied with lie in the registers of a program


def _options(q: Tensor, terms: int) -> dict[str, int]:
    size = q.shape[-1]
    block = max(16, 1 << (size - 1).bit_length())
    return {"SIZE": size, "N": len(series(terms)) if terms else 0, "B": block, "num_warps": 4, "num_stages": 1}


def _last(terms: int) -> tuple[float, float]:
    """The weights of the powers between the first and the last, and of the last."""
    weights = series(terms) if terms else [1.0]
    return (weights[1] if len(weights) > 2 else 0.0), weights[-1]


def forward(q: Tensor, terms: int) -> Tensor:
    """R."""
    from .triton_kernels import cayley_kernel

    q = q.contiguous()
    r = empty_like(q)
    host.launch(cayley_kernel, (len(q),), q, r, *_last(terms), **_options(q, terms))
    return r


def backward(dr: Tensor, q: Tensor, r: Tensor, terms: int) -> Tensor:
    """dQ."""
    from .triton_kernels import cayley_backward_kernel

    dr, q, r = dr.contiguous(), q.contiguous(), r.contiguous()
    dq = empty_like(q)
    host.launch(cayley_backward_kernel, (len(q),), dr, q, r, dq, *_last(terms), **_options(q, terms))
    return dq


def _refusal(q: Tensor, *_: Any) -> str | None:
    return f"blocks of more than {MOST}" if q.shape[-1] > MOST else host.wrong_mode(q)


BACKENDS = host.backends({"cayley": forward, "cayley_backward": backward}, _refusal, dtypes=frozenset({torch.float32}))
