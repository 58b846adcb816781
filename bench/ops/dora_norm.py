"""Rows of dora_norm: the norms of W + sBA from dense and NF4 weights, beside the dense product that PEFT forms."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peft_kernels import QuantWeight, dequantize_4bit, dora_norm, use_backend
from peft_kernels.ops.dora_norm import norm_op
from peft_kernels.ops.lora_linear import flat_weight

from .. import subjects
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed
from ..results import Claim, Row
from . import default_backends, reason

OP = "dora_norm"
SHAPES = [(576, 576), (2048, 2048), (4096, 4096)]
RANK = 16


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for k, n in args.shapes or SHAPES[: 2 if args.quick else None]:
        for base in ("f32", "nf4"):
            yield row(k, n, base, args)


def _dense(w: Tensor | QuantWeight, a: Tensor, b: Tensor) -> Tensor:
    """As PEFT computes them."""
    whole = dequantize_4bit(w, torch.float32) if isinstance(w, QuantWeight) else w
    return torch.linalg.vector_norm(whole + 2.0 * (b @ a), dim=1)


def row(k: int, n: int, base: str, args: argparse.Namespace) -> Row:
    device = args.device
    count = copies_needed(n * k * (4 if base == "f32" else 1), last_cache_bytes(device), 4 if args.quick else 16)
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(s, generator=g).mul(0.02).to(device) for s in ((RANK, k), (n, RANK)))
    weights: list[Tensor | QuantWeight] = [*subjects.quant_copies(n, k, count, device=device)]
    if base == "f32":
        weights = [dequantize_4bit(q, torch.float32) for q in weights if isinstance(q, QuantWeight)]

    def call(w: Tensor | QuantWeight, backend: str) -> Callable[[], object]:
        def run() -> object:
            with use_backend(backend):
                return dora_norm(w, a, b, 2.0)

        return run

    candidates, refused = [], {}
    for backend in args.backends or default_backends(device):
        why = reason(norm_op, backend, (*flat_weight(OP, weights[0])[0], a, b, 2.0, None))
        if why is not None:
            refused[backend] = why
        else:
            candidates.append(Candidate(backend, [call(w, backend) for w in weights]))
    candidates.append(Candidate("W + sBA", [lambda w=w: _dense(w, a, b) for w in weights]))  # type: ignore[misc]
    claims = [Claim("W + sBA", [c.name], ["W + sBA"]) for c in candidates if c.name in ("native", "triton", "cuda")]
    case = {"op": OP, "what": "norms", "K": k, "N": n, "r": RANK, "base": base, "refused": refused}
    return Row(f"norms {base} {k}x{n}", case, {}, claims, 2.0 * n * k * (RANK + 1),
               n * k * (4.0 if base == "f32" else 0.5), candidates=candidates)  # fmt: skip
