"""Rows of gated (the activation, bound by memory) and of gated_mlp (a whole MLP with LoRA, forward + backward)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import Projection, gated, gated_mlp, lora_linear, use_backend
from peft_kernels.ops.gated import Activation, forward_op
from peft_kernels.ops.gated import activation as activation_of

from .. import subjects
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed
from ..results import Claim, Row
from . import reason

OP = "gated"
SIZES = [(576, 1536), (2048, 8192)]
M = [16, 512]
RANK = 16
# by name: in torch, and whether up is multiplied: Llama's, Gemma's, GPT-2's, BERT's
ACTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "silu": (F.silu, True),
    "gelu_tanh": (lambda g: F.gelu(g, approximate="tanh"), True),
    "gelu_new": (lambda g: F.gelu(g, approximate="tanh"), False),
    "gelu": (F.gelu, False),
}


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for k, f in args.shapes or SIZES[: 1 if args.quick else None]:
        for m in args.m or (M[:1] if args.quick else M):
            for dtype in args.dtype:
                yield from (activation(act, f, m, dtype, args) for act in ACTS)
                yield mlp(k, f, m, dtype, args)


def _by_parts(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    return lora_linear(F.silu(lora_linear(x, *gate)) * lora_linear(x, *up), *down)


def _grad(y: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor, backend: str | None) -> Callable[[], object]:
    def call() -> object:
        if backend is None:
            return torch.autograd.grad(y(), leaves, dy)
        with use_backend(backend):
            return torch.autograd.grad(y(), leaves, dy)

    return call


def activation(act: str, f: int, m: int, dtype: str, args: argparse.Namespace) -> Row:
    g, t = torch.Generator().manual_seed(3), subjects.DTYPES[dtype]
    gate, up = (torch.randn(m, f, generator=g).to(t).requires_grad_() for _ in range(2))
    dh = torch.randn(m, f, generator=g).to(t)
    (eager, has_up), candidates, refused = ACTS[act], [], {}
    leaves = [gate, up] if has_up else [gate]
    given = (*leaves, *[None] * (2 - len(leaves)))
    for backend in args.backends or ["native", "reference"]:
        why = reason(forward_op, backend, (*given, *activation_of("gated", act, None, 0.0, 0.0)))
        if why is not None:
            refused[backend] = why
        else:
            candidates.append(Candidate(backend, [_grad(lambda: gated(*given, act), leaves, dh, backend)]))

    def in_torch() -> Tensor:
        return eager(gate) * up if has_up else eager(gate)

    candidates.append(Candidate("torch", [_grad(in_torch, leaves, dh, None)]))
    claims = [Claim("a user's", [c.name], ["torch"]) for c in candidates if c.name in ("native", "triton")]
    case = {"op": OP, "what": "activation", "act": act, "up": has_up, "F": f, "M": m, "dtype": dtype,
            "refused": refused}
    # read gate, up, write h; read dh, gate, up, write dgate, dup
    passes = 8.0 if has_up else 5.0
    title = f"{act}{' * up' if has_up else ''} forward+backward {m}x{f} {dtype}"
    return Row(title, case, {}, claims, 20.0 * m * f, passes * m * f * gate.element_size(),
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

    candidates, sample = [], (x, x, *Activation())
    for backend in [b for b in args.backends or ["native", "reference"] if reason(forward_op, b, sample) is None]:
        for label, function in ((backend, gated_mlp), (f"{backend}, by parts", _by_parts)):
            candidates.append(Candidate(label, [call(function, parts, backend) for parts in models]))
    names = [c.name for c in candidates]
    claims = [Claim("by parts", [b], [f"{b}, by parts"]) for b in ("native", "triton") if b in names]
    case = {"op": OP, "what": "mlp", "K": k, "F": f, "M": m, "r": RANK, "dtype": dtype, "dropout": args.dropout}
    return Row(f"MLP forward+backward {k}x{f} M={m} {dtype}", case, {}, claims,
               12.0 * m * k * f + 18.0 * m * RANK * (k + f), 3.0 * k * f, candidates=candidates)  # fmt: skip
