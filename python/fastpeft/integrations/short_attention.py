"""Attention over short sequences and rotary embeddings, for training on a CPU, in plain torch.

At the lengths that adapters are trained on, torch's bfloat16 flash attention on a CPU takes twice as long, forward and
backward, as the plain products. Nothing is kept for the backward but the inputs (probabilities are computed again): no
more memory than torch's. Rotary embeddings take three passes forward and three backward instead of five and nine, and
leave their results where the next product reads them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_SCORES = 1 << 24  # batch x heads x queries x keys that may stand at once: 64 MiB of float32


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


class _ShortAttention(torch.autograd.Function):
    """q [B, H, T, D], k and v [B, G, S, D] with H a multiple of G; keep: bool, True where a query sees a key."""

    @staticmethod
    def _probabilities(q: Tensor, k: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        batch, heads, t, d = q.shape
        groups, s = k.shape[1], k.shape[2]
        # the queries of a group of heads lie one below the other: one product per key head, no repeated keys
        rows, keys = q.reshape(batch * groups, -1, d), k.reshape(batch * groups, s, d)
        scores = torch.bmm(rows, keys.transpose(1, 2)).to(_wide(q)).mul_(scale)
        # to add -inf takes a sixth of the time of masked_fill_ with a mask that is broadcast
        hidden = torch.zeros(keep.shape, dtype=scores.dtype, device=q.device).masked_fill_(~keep, -torch.inf)
        scores.view(batch, heads, t, s).add_(hidden)
        return rows, keys, torch.softmax(scores, dim=-1)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
        _, keys, p = _ShortAttention._probabilities(q, k, keep, scale)
        ctx.save_for_backward(q, k, v, keep)
        ctx.scale = scale
        return torch.bmm(p.to(q.dtype), v.reshape(keys.shape)).view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, keep = ctx.saved_tensors
        rows, keys, p = _ShortAttention._probabilities(q, k, keep, ctx.scale)
        values, dy = v.reshape(keys.shape), grad_outputs[0].reshape(rows.shape)
        dv = torch.bmm(p.to(q.dtype).transpose(1, 2), dy)
        dp = torch.bmm(dy, values.transpose(1, 2)).to(p.dtype)
        # ds = p (dp - sum(p dp)), in place; float32 until it is a factor again
        ds = dp.sub_(torch.linalg.vecdot(p, dp).unsqueeze(-1)).mul_(p).mul_(ctx.scale).to(q.dtype)
        dq, dk = torch.bmm(ds, keys), torch.bmm(ds.transpose(1, 2), rows)
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), None, None


def short_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T where keep) v: [B, H, T, D] from q [B, H, T, D], k and v [B, G, S, D].

    keep: bool, broadcastable to [B, H, T, S]; each query must see at least one key. The softmax is at least float32.
    """
    result: Tensor = _ShortAttention.apply(q, k, v, keep, scale)  # type: ignore[no-untyped-call]
    return result


class _Rotary(torch.autograd.Function):
    """x [B, T, H, D]; cos, sin [B, T, D] -> [B, H, T, D], both contiguous."""

    @staticmethod
    def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # the halves change places; sin carries the signs. The heads' new place costs nothing: roll copies anyway.
        turned = torch.roll(x.transpose(1, 2), x.shape[-1] // 2, dims=-1).contiguous()
        return turned.mul_(sin).addcmul_(x.transpose(1, 2), cos)

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _Rotary._turn(x, cos.unsqueeze(1), torch.cat((-first, second), dim=-1).unsqueeze(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)  # the transposed matrix
        signed = torch.cat((second, -first), dim=-1)
        return _Rotary._turn(grad_outputs[0], cos.unsqueeze(2), signed.unsqueeze(2)), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, T, D] from x [B, T, H, D]: x cos + rotate_half(x) sin, as transformers' Llama has it. cos, sin: [B, T, D]
    or [1, T, D], of x's dtype, without gradients.
    """
    result: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return result
