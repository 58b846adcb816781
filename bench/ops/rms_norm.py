"""Rows of rms_norm with a frozen weight: forward alone, as in decoding, and forward + backward. Bound by memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peft_kernels import rms_norm
from peft_kernels.ops.rms_norm import forward_op

from .. import subjects
from ..measure import Candidate
from ..results import Claim, Row
from . import on_backends

OP = "rms_norm"
SIZES = [576, 4096]
M = [1, 512]
EPS = 1e-5


def rows(args: argparse.Namespace) -> Iterator[Row]:
    sizes = [k for k, _ in args.shapes] if args.shapes else SIZES[: 1 if args.quick else None]
    for n in sizes:
        for m in args.m or (M[:1] if args.quick else M):
            for dtype in args.dtype:
                yield from (row(n, m, dtype, trains, args) for trains in (False, True))


def _llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """transformers' LlamaRMSNorm."""
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def row(n: int, m: int, dtype: str, trains: bool, args: argparse.Namespace) -> Row:
    g, t = torch.Generator().manual_seed(3), subjects.DTYPES[dtype]
    x, dy = (torch.randn(m, n, generator=g).to(t) for _ in range(2))
    weight = torch.rand(n, generator=g).to(t)
    x.requires_grad_(trains)

    def call(norm: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[], object]:
        def once() -> object:
            y = norm(x, weight, EPS)
            return torch.autograd.grad(y, x, dy) if trains else y

        return once

    backends = args.backends or ["native", "reference"]
    candidates, refused = on_backends(forward_op, backends, (x, weight, EPS), call(rms_norm))
    candidates += [Candidate("torch", [call(_torch)]), Candidate("transformers", [call(_llama)])]
    fused = [c.name for c in candidates if c.name in ("native", "triton")]
    claims = [Claim("a user's", [name], ["torch", "transformers"]) for name in fused]
    what = "forward+backward" if trains else "forward"
    case = {"op": OP, "what": what, "N": n, "M": m, "dtype": dtype, "refused": refused}
    # read x, write y; read dy and x, write dx
    passes, flops = (5, 12.0) if trains else (2, 4.0)
    return Row(f"{what} {m}x{n} {dtype}", case, {}, claims, flops * m * n, float(passes * m * n * x.element_size()),
               candidates=candidates)  # fmt: skip
