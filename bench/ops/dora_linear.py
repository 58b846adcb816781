"""Rows of dora_linear: forward + backward from NF4 weights, norms included, beside lora_linear of the same shape."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peft_kernels import QuantWeight, dora_linear, dora_norm, lora_linear, use_backend
from peft_kernels.ops.dora_linear import forward_op

from .. import subjects
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed
from ..results import Claim, Row
from . import default_backends, reason

OP = "dora_linear"
SHAPES = [(576, 576), (2048, 2048)]
M = [16, 128, 512]
RANK = 16


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for k, n in args.shapes or SHAPES[: 1 if args.quick else None]:
        for m in args.m or (M[:2] if args.quick else M):
            for dtype in args.dtype:
                yield row(k, n, m, dtype, args)


def row(k: int, n: int, m: int, dtype: str, args: argparse.Namespace) -> Row:
    device = args.device
    count = copies_needed(n * k // 2, last_cache_bytes(device), 8)
    g, t = torch.Generator().manual_seed(3), subjects.DTYPES[dtype]
    x, dy = (torch.randn(m, s, generator=g).to(device, t) for s in (k, n))
    a, b = (torch.randn(s, generator=g).mul(0.02).to(device) for s in ((RANK, k), (n, RANK)))
    weights = subjects.quant_copies(n, k, count, device=device)
    magnitude = dora_norm(weights[0], a, b, 2.0)
    leaves = [v.requires_grad_() for v in (x, a, b, magnitude)]

    def dora(w: QuantWeight) -> Tensor:
        norm = dora_norm(w, a.detach(), b.detach(), 2.0)
        return dora_linear(x, w, a, b, magnitude, norm, 2.0, None, args.dropout)

    def lora(w: QuantWeight) -> Tensor:
        return lora_linear(x, w, a, b, 2.0, None, args.dropout)

    def call(run: Callable[[QuantWeight], Tensor], w: QuantWeight, backend: str) -> Callable[[], object]:
        def step() -> object:
            with use_backend(backend):
                return torch.autograd.grad(run(w), leaves[: 4 if run is dora else 3], dy)

        return step

    seed = torch.tensor([1], device=device) if args.dropout else None
    plain = [v.detach() for v in leaves]
    call_args = (plain[0], *weights[0].flatten(), n, *plain[1:], 2.0, None, args.dropout, seed, True)
    candidates, refused = [], {}
    for backend in args.backends or default_backends(device):
        why = reason(forward_op, backend, call_args)
        if why is not None:
            refused[backend] = why
            continue
        for label, run in ((backend, dora), (f"{backend}, LoRA", lora)):
            candidates.append(Candidate(label, [call(run, w, backend) for w in weights]))
    names = [c.name for c in candidates]
    fast = [b for b in ("native", "triton", "cuda") if b in names]
    claims = [Claim("of LoRA's speed", [b], [f"{b}, LoRA"]) for b in fast]
    if "reference" in names:
        claims += [Claim("eager", [b], ["reference"]) for b in fast]
    case = {"op": OP, "what": "forward+backward", "K": k, "N": n, "M": m, "r": RANK, "dtype": dtype,
            "dropout": args.dropout, "refused": refused}  # fmt: skip
    return Row(f"forward+backward {k}x{n} M={m} {dtype}", case, {}, claims,
               4.0 * m * n * k + 6.0 * m * RANK * (n + k) + 2.0 * n * k * RANK,
               1.5 * n * k + 2.0 * m * (n + k) * x.element_size(), candidates=candidates)  # fmt: skip
