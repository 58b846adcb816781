"""Rows of rotary_attention: causal, heads of SmolLM2 and of Llama 3.2 1B, forward and forward + backward."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peft_kernels import rotary_attention
from peft_kernels.ops.rotary_attention import forward_op

from .. import subjects
from ..measure import Candidate
from ..results import Claim, Row
from . import on_backends

OP = "rotary_attention"
HEADS = [(9, 3), (32, 8)]  # of queries, and of keys and values
SHAPES = [(4, 128), (1, 512), (1, 2048)]  # rows of a batch and tokens of each
D = 64


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for heads, groups in HEADS[: 1 if args.quick else None]:
        for batch, tokens in SHAPES[: 1 if args.quick else None]:
            for dtype in args.dtype:
                yield from (row((batch, tokens, heads, groups), dtype, trains, args) for trains in (False, True))


def _torch(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' Llama with its sdpa attention: [B, T, H D]."""

    def turned(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)

    out = torch.nn.functional.scaled_dot_product_attention(
        turned(q), turned(k), v.transpose(1, 2), is_causal=True, scale=D**-0.5, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2).contiguous()


def _ours(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotary_attention(q, k, v, cos, sin, scale=D**-0.5).flatten(2)


def row(shape: tuple[int, int, int, int], dtype: str, trains: bool, args: argparse.Namespace) -> Row:
    batch, tokens, heads, groups = shape
    g, t = torch.Generator().manual_seed(3), subjects.DTYPES[dtype]
    q, k, v = (torch.randn(batch, tokens, h, D, generator=g).to(t) for h in (heads, groups, groups))
    dy = torch.randn(batch, tokens, heads * D, generator=g).to(t)
    angles = torch.rand(1, tokens, D, generator=g) * 6
    cos, sin = angles.cos().to(t), angles.sin().to(t)
    for leaf in (q, k, v):
        leaf.requires_grad_(trains)

    def call(attention: Callable[..., Tensor]) -> Callable[[], object]:
        def once() -> object:
            y = attention(q, k, v, cos, sin)
            return torch.autograd.grad(y, (q, k, v), dy) if trains else y

        return once

    backends = args.backends or ["native", "reference"]
    candidates, refused = on_backends(forward_op, backends, (q, k, v, cos, sin, None, 1.0), call(_ours))
    candidates.append(Candidate("torch sdpa", [call(_torch)]))
    claims = [Claim("a user's", [c.name], ["torch sdpa"]) for c in candidates if c.name in ("native", "triton")]
    what = "forward+backward" if trains else "forward"
    case = {
        "op": OP,
        "what": what,
        "B": batch,
        "T": tokens,
        "H": heads,
        "G": groups,
        "dtype": dtype,
        "refused": refused,
    }
    # half of the scores; a product for them and one for y, and five in the backward
    flops = float(2 * batch * heads * tokens * tokens * D) / 2 * (7 if trains else 2)
    passes = (heads + groups) * 2 * (3 if trains else 1)
    return Row(f"{what} {batch} x {tokens}, {heads} heads {dtype}", case, {}, claims, flops,
               float(passes * batch * tokens * D * q.element_size()), candidates=candidates)  # fmt: skip
