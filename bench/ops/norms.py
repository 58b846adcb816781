"""Rows of rms_norm and layer_norm: forward alone, as in decoding, and forward + backward, with a frozen weight and with
one that is trained. Bound by memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peft_kernels import layer_norm, rms_norm
from peft_kernels.dispatch import Op
from peft_kernels.ops.norms import layer_op, rms_op

from .. import subjects
from ..measure import Candidate
from ..results import Claim, Row
from . import on_backends

OP = "norms"
SIZES = [576, 4096]
M = [1, 512]
EPS = 1e-5
Norm = Callable[[Tensor, Tensor], Tensor]


def _llama(x: Tensor, weight: Tensor) -> Tensor:
    """transformers' LlamaRMSNorm."""
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _torch(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)


# by name: the operator, ours, others'
NORMS: dict[str, tuple[Op, Norm, dict[str, Norm]]] = {
    "rms_norm": (rms_op, lambda x, w: rms_norm(x, w, EPS), {"torch": _torch, "transformers": _llama}),
    "layer_norm": (
        layer_op, lambda x, w: layer_norm(x, w, w, EPS),
        {"torch": lambda x, w: torch.nn.functional.layer_norm(x, w.shape, w, w, EPS)},
    ),
}  # fmt: skip


def rows(args: argparse.Namespace) -> Iterator[Row]:
    sizes = [k for k, _ in args.shapes] if args.shapes else SIZES[: 1 if args.quick else None]
    for name in NORMS:
        for n in sizes:
            for m in args.m or (M[:1] if args.quick else M):
                for dtype in args.dtype:
                    yield from (row(name, n, m, dtype, what, args) for what in ("forward", "frozen", "trained"))


def row(name: str, n: int, m: int, dtype: str, what: str, args: argparse.Namespace) -> Row:
    g, t = torch.Generator().manual_seed(3), subjects.DTYPES[dtype]
    x, dy = (torch.randn(m, n, generator=g).to(t) for _ in range(2))
    weight = torch.rand(n, generator=g).to(t)
    leaves = {"forward": [], "frozen": [x], "trained": [x, weight]}[what]
    for leaf in leaves:
        leaf.requires_grad_()
    op, ours, others = NORMS[name]

    def call(norm: Norm) -> Callable[[], object]:
        def once() -> object:
            y = norm(x, weight)
            return torch.autograd.grad(y, leaves, dy) if leaves else y

        return once

    backends = args.backends or ["native", "reference"]
    given = (x, weight, EPS, 0.0) if name == "rms_norm" else (x, weight, weight, EPS)
    candidates, refused = on_backends(op, backends, given, call(ours))
    candidates += [Candidate(other, [call(norm)]) for other, norm in others.items()]
    fused = [c.name for c in candidates if c.name in ("native", "triton")]
    claims = [Claim("a user's", [one], [*others]) for one in fused]
    case = {"op": OP, "norm": name, "what": what, "N": n, "M": m, "dtype": dtype, "refused": refused}
    # read x, write y; read dy and x, write dx
    passes, flops = (5, 12.0) if leaves else (2, 4.0)
    return Row(f"{name} {what} {m}x{n} {dtype}", case, {}, claims, flops * m * n,
               float(passes * m * n * x.element_size()), candidates=candidates)  # fmt: skip
