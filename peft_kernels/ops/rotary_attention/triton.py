"""Triton backend of rotary_attention: the host side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...triton_lib import host

MOST = 256  # features of a head: both halves of a tile lie in the registers of a program
OTHERS = 16  # of what it goes through at a time: `mma.sync` holds both factors in registers, and more would spill


def _common(
    q: Tensor, k: Tensor, cos: Tensor, keep: Tensor | None, scale: float, keys: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The numbers and the constants of a kernel. keys: its programs have keys, not queries."""
    _, tokens, heads, d = q.shape
    shape = tuning.Shape(tokens, d, d, 0, q.element_size() * 8)
    c = tuning.choose("attention", tuning.arch_of(q.device), shape)  # BM: queries, or keys, that a program has
    bm, bn = (OTHERS, c.BM) if keys else (c.BM, OTHERS)
    numbers = (tokens, heads, k.shape[2], d, tokens * d if cos.shape[0] > 1 else 0,
               tokens * tokens if keep is not None and keep.shape[0] > 1 else 0, scale)  # fmt: skip
    options = {"MASKED": keep is not None, "PRECISION": "ieee", "BM": bm, "BN": bn,
               "BD": max(16, 1 << (d // 2 - 1).bit_length()), "num_warps": c.num_warps,
               "num_stages": c.num_stages}  # fmt: skip
    return numbers, options


def forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(y, lse)."""
    from .triton_kernels import forward_kernel

    q, k, v, cos, sin = (t.contiguous() for t in (q, k, v, cos, sin))
    batch, tokens, heads, _ = q.shape
    y, lse = torch.empty_like(q), q.new_empty((batch, heads, tokens), dtype=torch.float32)
    numbers, options = _common(q, k, cos, keep, scale)
    mask = cos if keep is None else keep.contiguous().view(torch.uint8)
    grid = (-(-tokens // options["BM"]), heads, batch)
    host.launch(forward_kernel, grid, q, k, v, cos, sin, mask, y, lse, *numbers, **options)
    return y, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    from .triton_kernels import keys_kernel, queries_kernel

    dy, q, k, v, cos, sin, lse = (t.contiguous() for t in (dy, q, k, v, cos, sin, lse))
    batch, tokens, heads, _ = q.shape
    dq, dk, dv, along = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    numbers, options = _common(q, k, cos, keep, scale)
    given = (dy, q, k, v, cos, sin, cos if keep is None else keep.contiguous().view(torch.uint8), lse)
    tiles = -(-tokens // options["BM"])
    host.launch(queries_kernel, (tiles, heads, batch), *given, dq, along, *numbers, **options)
    numbers, options = _common(q, k, cos, keep, scale, keys=True)
    tiles = -(-tokens // options["BN"])
    host.launch(keys_kernel, (tiles, k.shape[2], batch), *given, along, dk, dv, *numbers, **options)
    return dq, dk, dv


def _refusal(*args: Any) -> str | None:
    q = args[1] if args[3].dim() == 4 else args[0]  # the backward begins with dy
    if q[:1].numel() >= 2**31:
        return "2^31 elements in a row of the batch: offsets within one are 32 bits wide"
    if max(q.shape[0], q.shape[2]) > host.MOST_BLOCKS:
        return f"more than {host.MOST_BLOCKS} heads, or rows of the batch: each has blocks of a launch to itself"
    return f"heads of more than {MOST} features" if q.shape[3] > MOST else host.wrong_mode(q)


BACKENDS = host.backends({"rotary_attention": forward, "rotary_attention_backward": backward}, _refusal)
