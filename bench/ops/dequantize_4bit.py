"""Rows of dequantize_4bit: decoding a whole weight, bound by memory. Theirs: bitsandbytes' dequantize_4bit."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from peft_kernels import QuantWeight, dequantize_4bit, use_backend
from peft_kernels.dispatch import ops

from .. import subjects
from ..gpu import others
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed
from ..results import Claim, Row
from . import default_backends, reason

OP = "dequantize_4bit"
SHAPES = [(576, 1536), (4096, 4096), (2048, 8192)]


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for k, n in args.shapes or (SHAPES[:1] if args.quick else SHAPES):
        for dtype in args.dtype:
            for nested in (False, True):
                yield row(k, n, dtype, nested, args)


def row(k: int, n: int, dtype: str, nested: bool, args: argparse.Namespace) -> Row:
    out = subjects.DTYPES[dtype]
    nbytes = n * k * 0.5 + n * k * out.itemsize
    weights = subjects.quant_copies(n, k, copies_needed(int(nbytes), last_cache_bytes(args.device), 64), nested,
                                    device=args.device)  # fmt: skip
    flat = weights[0].flatten()
    refused: dict[str, str] = {}
    candidates = []
    for backend in args.backends or default_backends(args.device):
        why = reason(ops()[OP], backend, (*flat, (n, k), out))
        if why is not None:
            refused[backend] = why
            continue

        def call(q: QuantWeight, backend: str = backend) -> Callable[[], object]:
            def forced() -> object:
                with use_backend(backend):
                    return dequantize_4bit(q, out)

            return forced

        candidates.append(Candidate(backend, [call(q) for q in weights]))
    ours = [c.name for c in candidates if c.name != "reference"]

    def bitsandbytes() -> others.Calls:
        import bitsandbytes.functional as bnb

        layers = [subjects.bnb_layer(q, out) for q in weights]
        return [lambda w=layer.weight: bnb.dequantize_4bit(w.data, w.quant_state) for layer in layers]

    def unsloth() -> others.Calls:
        from unsloth.kernels import fast_dequantize

        layers = [subjects.bnb_layer(q, out) for q in weights]
        return [lambda w=layer.weight: fast_dequantize(w, w.quant_state) for layer in layers]

    theirs = others.optional(refused, "bitsandbytes", "bitsandbytes", bitsandbytes)
    if args.device != "cpu":
        theirs += others.optional(refused, "unsloth", "unsloth", unsloth)
    candidates += theirs
    claims = [Claim("a user's", [name], [c.name for c in theirs]) for name in ours]
    claims += [Claim("eager", [name], ["reference"]) for name in ours]
    case = {"op": OP, "K": k, "N": n, "dtype": dtype, "nested": nested, "refused": refused}
    return Row(f"{k}x{n} {dtype}{' nested' if nested else ''}", case, {}, claims, float(n * k), nbytes,
               candidates=candidates)  # fmt: skip
