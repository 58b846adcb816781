"""rotary: queries and keys turned by their positions, as `attention` turns them; for keys that go into a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check_angles, _check_shapes, directly


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """(q, k) with their first R features turned, contiguous, in their dtype; differentiable in q and k.

    q: [B, T, H, D]; k: [B, T, G, D], of one floating dtype, by any strides. cos, sin: [B or 1, T, R] of any floating
    dtype, R <= D even. Turned is x cos + x' sin, whose x' has (-b, a) of each pair (a, b): features i and R / 2 + i, or
    with `interleaved` 2 i and 2 i + 1. On a CPU without gradients it is one native call, computed in float32 and
    rounded once (that backend of "attention"); torch's formula elsewhere, in the dtypes as they come. Raises ValueError
    or TypeError on bad arguments.
    """
    _check_shapes(q, k, k)
    _check_angles(q, k, cos, sin)
    if directly(q, k, cos, sin):
        from .native import turned

        return turned(q, k, cos, sin, interleaved)
    heads, r = q.shape[2], cos.shape[2]
    both = torch.cat((q, k), dim=2)  # half of the calls, which a token waits for
    part = both if r == both.shape[3] else both[..., :r]
    turned_part = part * cos.unsqueeze(2)
    of_a, of_b = _pairs(sin.unsqueeze(2), interleaved)
    (a, b), (to_a, to_b) = _pairs(part, interleaved), _pairs(turned_part, interleaved)
    to_a.addcmul_(b, of_a, value=-1)
    to_b.addcmul_(a, of_b)
    done = turned_part.to(q.dtype)
    if part is not both:
        done = torch.cat((done, both[..., r:]), dim=-1)
    return done[:, :, :heads], done[:, :, heads:]


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first features of all pairs, and the second ones: views."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]
