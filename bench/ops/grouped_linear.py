"""Rows of grouped_linear: the experts of a layer, dense, with LoRA, beside torch's grouped product and eager code."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peft_kernels import grouped_linear, use_backend
from peft_kernels.ops.grouped_linear import forward_op

from .. import subjects
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed
from ..results import Claim, Row
from . import reason

OP = "grouped_linear"
SIZES = [(768, 1024), (2048, 1536)]
GROUPS, CHOSEN, RANK = 32, 4, 16  # experts, of which a token has so many
M = [1, 512]  # tokens


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for k, n in args.shapes or SIZES[: 1 if args.quick else None]:
        for m in args.m or (M[:1] if args.quick else M):
            for dtype in args.dtype:
                yield from (row(k, n, m, dtype, lora, args) for lora in (False, True))


def _loop(x: Tensor, w: Tensor, offsets: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """Eager code, an expert after another."""
    y = x.new_zeros((x.shape[0], w.shape[1]))
    ends = offsets.tolist()
    for e, (first, end) in enumerate(itertools.pairwise(ends)):
        if end == first:
            continue
        part = torch.nn.functional.linear(x[first:end], w[e])
        if a is not None and b is not None:
            part = part + (x[first:end].to(a.dtype) @ a[e].t() @ b[e].t()).to(x.dtype)
        y[first:end] = part
    return y


def _merged(x: Tensor, w: Tensor, offsets: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """torch's grouped product, of merged weights where there are adapters, as PEFT computes them."""
    if a is not None and b is not None:
        w = (w + torch.bmm(b, a)).to(w.dtype)
    return torch._grouped_mm(x, w.mT, offs=offsets[1:].to(torch.int32))


def row(k: int, n: int, m: int, dtype: str, lora: bool, args: argparse.Namespace) -> Row:
    g, t = torch.Generator().manual_seed(3), subjects.DTYPES[dtype]
    rows_, size = m * CHOSEN, GROUPS * n * k * (4 if dtype == "float32" else 2)
    count = copies_needed(size, last_cache_bytes(), 4)
    weights = [(torch.randn(GROUPS, n, k, generator=g) * k**-0.5).to(t) for _ in range(count)]
    chosen = torch.stack([torch.randperm(GROUPS, generator=g)[:CHOSEN] for _ in range(m)]).flatten().sort().values
    offsets = torch.searchsorted(chosen, torch.arange(GROUPS + 1))
    x, dy = (torch.randn(rows_, size, generator=g).to(t) for size in (k, n))
    x.requires_grad_(m > 1)
    a = (torch.randn(GROUPS, RANK, k, generator=g) * 0.02).requires_grad_(m > 1) if lora else None
    b = (torch.randn(GROUPS, n, RANK, generator=g) * 0.02).requires_grad_(m > 1) if lora else None
    leaves = [v for v in (x, a, b) if v is not None]

    def call(function: Callable[..., Tensor], w: Tensor, backend: str | None) -> Callable[[], object]:
        def run() -> object:
            y = function(x, w, offsets, a, b)
            return torch.autograd.grad(y, leaves, dy) if m > 1 else y

        def forced() -> object:
            with use_backend(backend):
                return run()

        return run if backend is None else forced

    candidates, refused = [], {}
    flat = (x.detach(), weights[0], *[None] * 4, 0, 64, 256, offsets, n, None, None, 1.0, None)
    for backend in args.backends or ["native"]:
        why = reason(forward_op, backend, flat)
        if why is None:
            candidates.append(Candidate(backend, [call(grouped_linear, w, backend) for w in weights]))
        else:
            refused[backend] = why
    candidates += [Candidate("loop", [call(_loop, w, None) for w in weights]),
                   Candidate("grouped_mm", [call(_merged, w, None) for w in weights])]  # fmt: skip
    claims = [Claim("eager", [c.name], ["loop", "grouped_mm"]) for c in candidates if c.name in ("native", "triton")]
    used = len({*chosen.tolist()})
    passes, what = (2, "forward+backward") if m > 1 else (1, "forward")
    case = {"op": OP, "K": k, "N": n, "M": m, "experts": GROUPS, "chosen": CHOSEN, "r": RANK if lora else 0,
            "dtype": dtype, "refused": refused}  # fmt: skip
    return Row(f"{what} {GROUPS} x {k}x{n} M={m}x{CHOSEN}{' LoRA' if lora else ''} {dtype}", case, {}, claims,
               passes * 2.0 * rows_ * n * k, passes * float(size) * used / GROUPS, candidates=candidates)  # fmt: skip
