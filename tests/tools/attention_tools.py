"""Calls of attention for tests: shapes with options, their arguments, and what float64 allows them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from lora_tools import F32
from torch import Tensor

from peft_kernels.ops import attention as op
from peft_kernels.testing import assert_no_worse


@dataclass(frozen=True)
class Case:
    """B, T, S, H, G, D, Dv, and which options. turned: R; rows: of angles. spans, keep: random ones, in which some
    query sees nothing and some key is seen by none."""

    b: int
    t: int
    s: int
    h: int
    g: int
    d: int
    dv: int
    turned: int = 0
    rows: int = 1
    interleaved: bool = False
    causal: bool = True
    window: int = 0
    spans: bool = False
    keep: bool = False
    bias: bool = False
    slopes: bool = False
    softcap: float = 0.0
    sinks: bool = False
    p: float = 0.0  # of dropout


CASES = [
    Case(1, 1, 1, 1, 1, 2, 2, turned=2),
    Case(2, 5, 5, 2, 1, 6, 6, turned=6, rows=2, keep=True),
    Case(2, 49, 49, 6, 2, 16, 16, turned=16, keep=True, sinks=True),
    Case(1, 97, 97, 3, 3, 34, 34, turned=16, interleaved=True),
    Case(1, 130, 130, 2, 1, 80, 48, turned=48, rows=1, window=40, softcap=2.0),
    Case(2, 33, 70, 4, 2, 64, 64, slopes=True, spans=True),
    Case(2, 40, 61, 2, 2, 16, 130, causal=False, bias=True),
    Case(1, 90, 90, 2, 1, 32, 16, causal=False, window=21, spans=True, sinks=True),
    Case(1, 60, 20, 2, 1, 16, 16),  # the first queries come before all keys
]
DROPPED = [  # rows of scores that begin at a group of four words of the generator, and not; hidden keys; all options
    Case(1, 23, 23, 4, 2, 16, 16, turned=16, keep=True, sinks=True, p=0.1),
    Case(1, 90, 92, 2, 1, 32, 16, causal=False, window=71, spans=True, p=0.5),
    Case(2, 33, 70, 4, 2, 18, 34, bias=True, slopes=True, softcap=2.0, p=0.25),
    Case(3, 1, 73, 6, 2, 16, 16, causal=False, keep=True, p=0.1),
]
ONE = [  # one query, whose keys and values a kernel of its own reads where they lie
    Case(3, 1, 1100, 6, 2, 64, 64),
    Case(2, 1, 530, 5, 1, 34, 18, window=515, softcap=3.0, sinks=True),
    Case(2, 1, 70, 7, 1, 16, 40, spans=True, keep=True, bias=True, slopes=True),
    Case(2, 1, 1101, 6, 2, 16, 16, window=1000, p=0.3),
]
LONG = [  # several blocks of keys, forward and backward
    Case(1, 1060, 1060, 2, 1, 16, 16, turned=16, sinks=True),
    Case(1, 70, 1300, 2, 1, 16, 32, spans=True, softcap=2.0),
    Case(1, 70, 1301, 4, 1, 16, 32, spans=True, p=0.1),
]


def inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, list[Any]]:
    """dy, and the arguments of the raw operator. Angles as models have them but for their halves, which differ."""
    c, tables = case, [None] * 7
    q, k, v = (torch.randn(s, device=device).to(dtype) for s in ((c.b, c.t, c.h, c.d), (c.b, c.s, c.g, c.d),
                                                                (c.b, c.s, c.g, c.dv)))  # fmt: skip
    if c.turned:
        angles = torch.rand(c.rows, c.t, c.turned, device=device) * 2 * math.pi
        tables[:2] = angles.cos().to(dtype), angles.sin().to(dtype)
    if c.spans:
        spans = (torch.rand(c.b, c.t, 2, device=device) * (c.s + 1)).int().sort(-1).values
        spans[:, c.t // 2] = 3 if c.t > 1 else 0
        spans[..., 1].clamp_(max=c.s - 1 if c.t > 1 else c.s)
        tables[2] = spans
    if c.keep:
        keep = torch.rand(c.b, c.t, c.s, device=device) < 0.4
        if c.t > 1:
            keep[:, c.t // 2] = False
            keep[:, :, -1] = False
        tables[3] = keep
    if c.bias:
        tables[4] = torch.randn(1, c.h, c.t, c.s, device=device).to(dtype).expand(c.b, -1, -1, -1)
    if c.slopes:
        tables[5] = 2.0 ** -torch.arange(1.0, c.h + 1, device=device)
    if c.sinks:
        tables[6] = torch.randn(c.h, device=device)
    dy = torch.randn(c.b, c.t, c.h, c.dv, device=device).to(dtype)
    seed = torch.randint(-(2**62), 2**62, (1,)) if c.p else None
    return dy, [q, k, v, *tables, c.d**-0.5, c.interleaved, c.causal, c.window, c.softcap, c.p, seed]


def magnitudes(dy: Tensor, args: list[Any]) -> list[Tensor]:
    """The sums of absolute terms behind y, dq, dk and dv. A score's own rounding moves its exponential by as much, and
    so counts as often as the score's terms are large."""
    q, k, v, cos, sin, spans, keep, bias, slopes, sinks = (
        t.double() if t is not None and t.is_floating_point() else t for t in args[:10]
    )
    scale, interleaved, causal, window, softcap, p_drop, seed = args[10:]
    groups = k.shape[2]

    def terms(x: Tensor) -> Tensor:
        return abs_turned(x, x.abs()).transpose(1, 2)

    def abs_turned(x: Tensor, size: Tensor, back: bool = False) -> Tensor:
        if cos is None:
            return size
        part, r = size[..., : cos.shape[2]], cos.shape[2]
        of_x, of_y = cos.abs().unsqueeze(2), sin.abs().unsqueeze(2)
        other = op._partner(part * of_y if back else part, interleaved).abs()
        return torch.cat((part * of_x + (other if back else other * of_y), size[..., r:]), -1)

    turned_q, turned_k = (op._turned(t, cos, sin, interleaved) for t in (q, k))
    seen = op._seen(q.shape[1], k.shape[1], spans, keep, causal, window, q.device)
    grouped = turned_q.unflatten(1, (groups, -1))
    scores, _ = op._scores(grouped, turned_k.unsqueeze(2), seen, bias, slopes, scale, softcap)
    sink = () if sinks is None else (sinks.view(groups, -1, 1, 1).expand(*scores.shape[:4], 1),)
    p = torch.softmax(torch.cat((scores, *sink), -1), -1).nan_to_num(0.0)[..., : scores.shape[-1]]
    of_q, of_k = terms(q).unflatten(1, (groups, -1)), terms(k).unsqueeze(2)
    sizes = of_q @ of_k.transpose(-1, -2) * scale + torch.where(seen, scores, 0.0).nan_to_num(0.0, 0.0, 0.0).abs()
    if bias is not None:
        sizes = sizes + bias.unflatten(1, (groups, -1)).abs()
    kept = op._dropped(torch.ones_like(p), p_drop, seed)
    p = p * (1 + sizes + (p * sizes).sum(-1, keepdim=True))
    grad, values = dy.double().abs().transpose(1, 2).unflatten(1, (groups, -1)), v.abs().transpose(1, 2).unsqueeze(2)
    dp = grad @ values.transpose(-1, -2) * kept
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * scale
    return [
        (p * kept @ values).flatten(1, 2).transpose(1, 2),
        abs_turned(q, (ds @ of_k).flatten(1, 2).transpose(1, 2), True),
        abs_turned(k, (ds.transpose(-1, -2) @ of_q).sum(2).transpose(1, 2), True),
        ((p * kept).transpose(-1, -2) @ grad).sum(2).transpose(1, 2),
    ]


def run(which: str, dy: Tensor, args: list[Any]) -> list[Tensor]:
    """y, dq, dk, dv, lse."""
    y, lse = getattr(op.forward_op, which)(*args)
    return [y, *getattr(op.backward_op, which)(dy, *args[:3], y, lse, *args[3:9], *args[10:]), lse]


def doubled(args: list[Any]) -> list[Any]:
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]


def check(dy: Tensor, args: list[Any]) -> None:
    got, eager, exact = run("op", dy, args), run("reference", dy, args), run("reference", dy.double(), doubled(args))
    for mine, theirs, right, size in zip(got, eager, exact, magnitudes(dy, args), strict=False):
        assert mine.is_contiguous()
        # in 16 bits what is rounded before the products is far larger than they are: no allowance for sizes of scores
        assert_no_worse(mine, theirs, right, size if mine.dtype is F32 else right.abs().amax().expand(right.shape))
    blind = exact[4].isinf()
    assert torch.equal(got[4].isinf(), blind)
    rough = torch.finfo(args[0].dtype).eps / torch.finfo(got[4].dtype).eps  # scores are sums of products of that dtype
    assert_no_worse(got[4][~blind], eager[4][~blind], exact[4][~blind], (exact[4][~blind].abs() + 4) * rough)
    assert not got[0].transpose(1, 2)[blind].any()
    assert not got[1].transpose(1, 2)[blind].any()


def options_of(args: list[Any]) -> dict[str, Any]:
    names = ("cos", "sin", "spans", "keep", "bias", "slopes", "sinks", "scale", "interleaved", "causal", "window",
             "softcap", "dropout_p", "seed")  # fmt: skip
    return dict(zip(names, args[3:], strict=True))
