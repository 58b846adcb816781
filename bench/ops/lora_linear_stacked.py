"""Rows of lora_linear_stacked: q, k, v and gate, up of a model as one call, beside one call of lora_linear each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peft_kernels import Projection, lora_linear, lora_linear_stacked, use_backend
from peft_kernels.ops.lora_linear_stacked import flat_projections, forward_op, lists_of

from .. import subjects
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed
from ..results import Claim, Row
from . import reason

OP = "lora_linear_stacked"
STACKS = {"q,k,v": (576, (576, 192, 192)), "gate,up": (576, (1536, 1536)), "q,k,v 7B": (4096, (4096, 1024, 1024))}
M = [1, 16, 512]
RANK = 16


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for name in list(STACKS)[: 2 if args.quick else None]:
        for m in args.m or (M[:2] if args.quick else M):
            for dtype in args.dtype:
                for backward in (False, True):
                    yield row(name, m, dtype, backward, args)


def _call(
    x: Tensor, parts: list[Projection], dys: list[Tensor], stacked: bool, backward: bool, backend: str
) -> Callable[[], object]:
    leaves = [x, *(t for p in parts for t in (p.a, p.b) if t is not None)]

    def ys() -> object:
        return lora_linear_stacked(x, parts) if stacked else [lora_linear(x, *p) for p in parts]

    def call() -> object:
        with use_backend(backend):
            if backward:
                return torch.autograd.grad(ys(), leaves, dys)  # type: ignore[arg-type]
            with torch.no_grad():
                return ys()

    return call


def row(name: str, m: int, dtype: str, backward: bool, args: argparse.Namespace) -> Row:
    """Theirs: the same projections one after the other, which is what a model does without the stack."""
    k, features = STACKS[name]
    count = copies_needed(sum(features) * k // 2, last_cache_bytes(), 16 if args.quick else 64)
    g = torch.Generator().manual_seed(3)
    t = subjects.DTYPES[dtype]
    x = torch.randn(m, k, generator=g).to(t).requires_grad_()
    dys = [torch.randn(m, n, generator=g).to(t) for n in features]
    copies = [subjects.quant_copies(n, k, count) for n in features]

    def small(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * 0.02).requires_grad_()

    stacks = [[Projection(q[i], small(RANK, k), small(n, RANK), 2.0, None, args.dropout)
               for n, q in zip(features, copies, strict=True)] for i in range(count)]  # fmt: skip
    flat = flat_projections(OP, x, stacks[0], ["p"] * len(features), k)
    refused, candidates = {}, []
    for backend in args.backends or ["native", "reference"]:
        why = reason(forward_op, backend, (x, *lists_of(flat, len(features))))
        if why is not None:
            refused[backend] = why
            continue
        for label, stacked in ((backend, True), (f"{backend}, one by one", False)):
            calls = [_call(x, parts, dys, stacked, backward, backend) for parts in stacks]
            candidates.append(Candidate(label, calls))
    names = [c.name for c in candidates]
    claims = [Claim("one by one", [b], [f"{b}, one by one"]) for b in ("native", "triton") if b in names]
    if "reference, one by one" in names:
        claims += [Claim("eager", [b], ["reference, one by one"]) for b in ("native", "triton") if b in names]
    what, times, n = "forward+backward" if backward else "forward", 2 if backward else 1, sum(features)
    case = {"op": OP, "what": what, "K": k, "N": list(features), "M": m, "r": RANK, "dtype": dtype,
            "dropout": args.dropout, "refused": refused}  # fmt: skip
    flops = times * 2.0 * m * n * k + (3 if backward else 1) * 2.0 * m * RANK * (n + len(features) * k)
    return Row(f"{what} {name} M={m} {dtype}", case, {}, claims, flops,
               times * (n * k * 0.5 + m * (n + k) * x.element_size()), candidates=candidates)  # fmt: skip
