"""Rows of attention, heads of SmolLM2 and of Llama 3.2 1B: causal with rotary embeddings, forward and forward +
backward; packed rows of eight documents; with dropout, heads as BERT's; one query over a cache, as decoding has it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peft_kernels import attention
from peft_kernels.ops.attention import forward_op

from .. import subjects
from ..measure import Candidate
from ..results import Claim, Row
from . import on_backends

OP = "attention"
HEADS = [(9, 3), (32, 8)]  # of queries, and of keys and values
SHAPES = [(4, 128), (1, 512), (1, 2048), (1, 4096)]  # rows of a batch and tokens of each
CACHES = [(1, 1024), (8, 1024), (1, 4096)]  # rows of a batch and keys of each
PACKED = (1, 2048)
DOCUMENTS = 8
DROPPED = (4, 128, 12, 12)
P = 0.1
D = 64


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for heads, groups in HEADS[: 1 if args.quick else None]:
        for dtype in args.dtype:
            for batch, tokens in SHAPES[: 1 if args.quick else None]:
                yield from (row((batch, tokens, heads, groups), dtype, trains, args) for trains in (False, True))
            if not args.quick:
                yield row((*PACKED, heads, groups), dtype, True, args, packed=True)
                yield row((DOCUMENTS, PACKED[1] // DOCUMENTS, heads, groups), dtype, True, args)  # the same, apart
            for batch, keys in CACHES[: 1 if args.quick else None]:
                yield decoding((batch, keys, heads, groups), dtype, args)
    for dtype in args.dtype:
        yield from (row(DROPPED, dtype, trains, args, p=P) for trains in (False, True))


def _torch(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """transformers' Llama with its sdpa attention: [B, T, H D]."""

    def turned(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)

    out = torch.nn.functional.scaled_dot_product_attention(
        turned(q), turned(k), v.transpose(1, 2), attn_mask=mask, dropout_p=p, is_causal=mask is None, scale=D**-0.5,
        enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2).flatten(2).contiguous()


def _ours(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, spans: Tensor | None, p: float) -> Tensor:
    return attention(q, k, v, cos=cos, sin=sin, spans=spans, scale=D**-0.5, dropout_p=p).flatten(2)


def _documents(tokens: int) -> tuple[Tensor, Tensor]:
    """(spans, what torch takes for them) of DOCUMENTS in a row."""
    each = tokens // DOCUMENTS
    of = torch.arange(tokens) // each
    spans = torch.stack((of * each, (of + 1) * each), -1).int()[None]
    return spans, ((of[:, None] == of) & torch.ones(tokens, tokens, dtype=torch.bool).tril())[None, None]


def _row(name: str, case: dict[str, Any], given: tuple[Any, ...], calls: dict[str, Callable[[], object]],
         flops: float, size: float, args: argparse.Namespace) -> Row:  # fmt: skip
    candidates, refused = on_backends(forward_op, args.backends or ["native", "reference"], given, calls["ours"])
    candidates.append(Candidate("torch sdpa", [calls["torch"]]))
    claims = [Claim("a user's", [c.name], ["torch sdpa"]) for c in candidates if c.name in ("native", "triton")]
    return Row(name, {"op": OP, **case, "refused": refused}, {}, claims, flops, size, candidates=candidates)


def row(
    shape: tuple[int, int, int, int], dtype: str, trains: bool, args: argparse.Namespace, packed: bool = False,
    p: float = 0.0,
) -> Row:  # fmt: skip
    batch, tokens, heads, groups = shape
    g, t = torch.Generator().manual_seed(3), subjects.DTYPES[dtype]
    q, k, v = (torch.randn(batch, tokens, h, D, generator=g).to(t) for h in (heads, groups, groups))
    dy = torch.randn(batch, tokens, heads * D, generator=g).to(t)
    angles = torch.rand(1, tokens, D, generator=g) * 6
    cos, sin = angles.cos().to(t), angles.sin().to(t)
    spans, mask = _documents(tokens) if packed else (None, None)
    for leaf in (q, k, v):
        leaf.requires_grad_(trains)

    def call(attend: Callable[..., Tensor], seen: Tensor | None) -> Callable[[], object]:
        def once() -> object:
            y = attend(q, k, v, cos, sin, seen, p)
            return torch.autograd.grad(y, (q, k, v), dy) if trains else y

        return once

    what = ("packed " if packed else "dropout " if p else "") + ("forward+backward" if trains else "forward")
    case = {"what": what, "B": batch, "T": tokens, "H": heads, "G": groups, "dtype": dtype}
    # half of the scores; a product for them and one for y, and five in the backward
    pairs = batch * heads * tokens * tokens / (2 * DOCUMENTS if packed else 2)
    passes = (heads + groups) * 2 * (3 if trains else 1)
    given = (q, k, v, cos, sin, spans, *[None] * 4, 1.0, False, True, 0, 0.0, 0.0, None)
    return _row(f"{what} {batch} x {tokens}, {heads} heads {dtype}", case, given,
                {"ours": call(_ours, spans), "torch": call(_torch, mask)}, 2 * pairs * D * (7 if trains else 2),
                float(passes * batch * tokens * D * q.element_size()), args)  # fmt: skip


def decoding(shape: tuple[int, int, int, int], dtype: str, args: argparse.Namespace) -> Row:
    batch, keys, heads, groups = shape
    g, t = torch.Generator().manual_seed(3), subjects.DTYPES[dtype]
    q = torch.randn(batch, heads, 1, D, generator=g).to(t)
    k, v = (torch.randn(batch, groups, keys, D, generator=g).to(t) for _ in range(2))
    given = (*(x.transpose(1, 2) for x in (q, k, v)), *[None] * 7, D**-0.5, False, False, 0, 0.0, 0.0, None)

    def ours() -> object:
        with torch.no_grad():
            return attention(*given[:3], causal=False, scale=D**-0.5)

    def of_torch() -> object:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=D**-0.5, enable_gqa=True)

    case = {"what": "one query", "B": batch, "S": keys, "H": heads, "G": groups, "dtype": dtype}
    size = float(2 * batch * groups * keys * D * q.element_size())
    return _row(f"one query over {batch} x {keys}, {heads} heads {dtype}", case, given,
                {"ours": ours, "torch": of_torch}, 4.0 * batch * heads * keys * D, size, args)  # fmt: skip
