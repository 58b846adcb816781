"""Rows of swiglu (the activation, bound by memory) and of swiglu_mlp (a whole MLP with LoRA, forward + backward)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peft_kernels import Projection, lora_linear, swiglu, swiglu_mlp, use_backend
from peft_kernels.ops.swiglu import forward_op

from .. import subjects
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed
from ..results import Claim, Row
from . import reason

OP = "swiglu"
SIZES = [(576, 1536), (2048, 8192)]
M = [16, 512]
RANK = 16


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for k, f in args.shapes or SIZES[: 1 if args.quick else None]:
        for m in args.m or (M[:1] if args.quick else M):
            for dtype in args.dtype:
                yield from (activation(f, m, dtype, args), mlp(k, f, m, dtype, args))


def _eager(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def _by_parts(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    return lora_linear(_eager(lora_linear(x, *gate), lora_linear(x, *up)), *down)


def _grad(y: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor, backend: str | None) -> Callable[[], object]:
    def call() -> object:
        if backend is None:
            return torch.autograd.grad(y(), leaves, dy)
        with use_backend(backend):
            return torch.autograd.grad(y(), leaves, dy)

    return call


def activation(f: int, m: int, dtype: str, args: argparse.Namespace) -> Row:
    g, t = torch.Generator().manual_seed(3), subjects.DTYPES[dtype]
    gate, up = (torch.randn(m, f, generator=g).to(t).requires_grad_() for _ in range(2))
    dh = torch.randn(m, f, generator=g).to(t)
    candidates, refused = [], {}
    for backend in args.backends or ["native", "reference"]:
        why = reason(forward_op, backend, (gate, up))
        if why is not None:
            refused[backend] = why
        else:
            candidates.append(Candidate(backend, [_grad(lambda: swiglu(gate, up), [gate, up], dh, backend)]))
    candidates.append(Candidate("torch", [_grad(lambda: _eager(gate, up), [gate, up], dh, None)]))
    claims = [Claim("a user's", [c.name], ["torch"]) for c in candidates if c.name in ("native", "triton")]
    case = {"op": OP, "what": "activation", "F": f, "M": m, "dtype": dtype, "refused": refused}
    # read gate, up, write h; read dh, gate, up, write dgate, dup
    return Row(f"forward+backward {m}x{f} {dtype}", case, {}, claims, 20.0 * m * f, 8.0 * m * f * gate.element_size(),
               candidates=candidates)  # fmt: skip


def mlp(k: int, f: int, m: int, dtype: str, args: argparse.Namespace) -> Row:
    count = copies_needed(3 * k * f // 2, last_cache_bytes(), 8)
    g, t = torch.Generator().manual_seed(3), subjects.DTYPES[dtype]
    x, dy = torch.randn(m, k, generator=g).to(t).requires_grad_(), torch.randn(m, k, generator=g).to(t)

    def small(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * 0.02).requires_grad_()

    sizes = ((f, k), (f, k), (k, f))
    copies = [subjects.quant_copies(n, inner, count) for n, inner in sizes]
    models = [[Projection(q[i], small(RANK, inner), small(n, RANK), 2.0, None, args.dropout)
               for (n, inner), q in zip(sizes, copies, strict=True)] for i in range(count)]  # fmt: skip

    def call(function: Callable[..., Tensor], parts: list[Projection], backend: str) -> Callable[[], object]:
        leaves = [x, *(t for p in parts for t in (p.a, p.b) if t is not None)]
        return _grad(lambda: function(x, *parts), leaves, dy, backend)

    candidates = []
    for backend in [b for b in args.backends or ["native", "reference"] if reason(forward_op, b, (x, x)) is None]:
        for label, function in ((backend, swiglu_mlp), (f"{backend}, by parts", _by_parts)):
            candidates.append(Candidate(label, [call(function, parts, backend) for parts in models]))
    names = [c.name for c in candidates]
    claims = [Claim("by parts", [b], [f"{b}, by parts"]) for b in ("native", "triton") if b in names]
    case = {"op": OP, "what": "mlp", "K": k, "F": f, "M": m, "r": RANK, "dtype": dtype, "dropout": args.dropout}
    return Row(f"MLP forward+backward {k}x{f} M={m} {dtype}", case, {}, claims,
               12.0 * m * k * f + 18.0 * m * RANK * (k + f), 3.0 * k * f, candidates=candidates)  # fmt: skip
