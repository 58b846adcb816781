"""Rows of quantize_4bit: a whole weight to 4 bits. Theirs: bitsandbytes' quantize_4bit."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peft_kernels import quantize_4bit, use_backend
from peft_kernels.dispatch import ops

from .. import subjects
from ..gpu import others
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed
from ..results import Claim, Row
from . import default_backends, reason

OP = "quantize_4bit"
SHAPES = [(576, 1536), (4096, 4096)]


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for k, n in args.shapes or (SHAPES[:1] if args.quick else SHAPES):
        for dtype in args.dtype:
            for nested in (False, True):
                yield row(k, n, dtype, nested, args)


def row(k: int, n: int, dtype: str, nested: bool, args: argparse.Namespace) -> Row:
    w = (torch.randn(n, k, generator=torch.Generator().manual_seed(4)) * 0.02).to(args.device, subjects.DTYPES[dtype])
    nbytes = w.numel() * w.element_size() + n * k * 0.5
    weights = [w.clone() for _ in range(copies_needed(int(nbytes), last_cache_bytes(args.device), 64))]
    refused: dict[str, str] = {}
    candidates = []
    for backend in args.backends or default_backends(args.device):
        why = reason(ops()[OP], backend, (w, 1, 64, nested, 256))
        if why is not None:
            refused[backend] = why
            continue

        def call(t: Tensor, backend: str = backend) -> Callable[[], object]:
            def forced() -> object:
                with use_backend(backend):
                    return quantize_4bit(t, "nf4", nested=nested)

            return forced

        candidates.append(Candidate(backend, [call(t) for t in weights]))

    ours = [c.name for c in candidates if c.name != "reference"]

    def bitsandbytes() -> others.Calls:
        import bitsandbytes.functional as bnb

        return [lambda t=t: bnb.quantize_4bit(t, blocksize=64, compress_statistics=nested, quant_type="nf4")
                for t in weights]  # fmt: skip

    theirs = others.optional(refused, "bitsandbytes", "bitsandbytes", bitsandbytes)
    candidates += theirs
    claims = [Claim("a user's", [name], [c.name for c in theirs]) for name in ours]
    claims += [Claim("eager", [name], ["reference"]) for name in ours]
    case = {"op": OP, "K": k, "N": n, "dtype": dtype, "nested": nested, "refused": refused}
    return Row(f"{k}x{n} {dtype}{' nested' if nested else ''}", case, {}, claims, float(n * k), nbytes,
               candidates=candidates)  # fmt: skip
