"""The checked table of layers: 4-bit forward, and QLoRA forward + backward, beside bitsandbytes and PEFT; and weights
of other formats beside NF4.

bitsandbytes has two ways on a CPU, and both are run: in eval mode (AVX512-BF16 CPUs) Linear4bit repacks its weight once
and multiplies in bf16 whatever the dtype of x; else it decodes the whole weight and calls torch's matmul.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from .. import subjects
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed, warm_everything
from ..results import Claim, Row

# (in, out): 576x576 and 576x1536 are SmolLM2's
SHAPES = [(4096, 4096), (576, 576), (576, 1536), (1536, 576), (2048, 8192)]
FORWARD_M = [1, 4, 16, 64, 128, 256, 512]
TRAIN_M = [16, 64, 256, 512]
FORMATS = ("q4_0", "q4_1", "q4_k", "q6_k", "q8_0", "mxfp4", "int4", "int8", "uint8")
FORMAT_M = [1, 8, 512]


def forward_target(m: int) -> float:
    return 1.5 if m <= 1 else 1.2 if m <= 4 else 1.8 if m <= 16 else 2.2


def any_dtype_target(m: int) -> float:
    return 1.3 if m <= 128 else 1.0


def train_target(m: int, dtype: str) -> float:
    return (3.5 if m <= 64 else 2.2) if dtype == "bf16" else (2.0 if m <= 64 else 1.15)


def forward_row(k: int, n: int, m: int, args: argparse.Namespace) -> Row:
    count = copies_needed(n * k // 2, last_cache_bytes(), 24 if args.quick else 128)
    dense_count = copies_needed(n * k * 4, last_cache_bytes(), count)
    weights = subjects.quant_copies(n, k, count)
    candidates = []
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(2)).to(dtype)
        ours = [subjects.our_layer(q) for q in weights]
        packed = [subjects.bnb_layer(q, dtype).eval() for q in weights]
        decoded = [subjects.bnb_layer(q, dtype).train() for q in weights]
        dense = [subjects.dense_layer(q, dtype) for q in weights[:dense_count]]
        for label, layers in ((f"ours {name}", ours), (f"bnb eval {name}", packed), (f"bnb train {name}", decoded),
                              (f"torch dense {name}", dense)):  # fmt: skip
            candidates.append(Candidate(label, [subjects.forward_call(layer, x) for layer in layers]))
    warm_everything([c for c in candidates if c.name.startswith("bnb eval")])
    bnb = ["bnb eval bf16", "bnb eval f32", "bnb train bf16", "bnb train f32"]
    claims = [Claim(f"eval, {d}", [f"ours {d}"], [f"bnb eval {d}"], forward_target(m)) for d in ("bf16", "f32")]
    claims.append(Claim("its fastest", ["ours bf16", "ours f32"], bnb, any_dtype_target(m)))
    return Row(f"forward {k}x{n} M={m}", {"suite": "layers", "what": "forward", "K": k, "N": n, "M": m}, {}, claims,
               2.0 * m * n * k, n * k * 0.5 + m * (n + k) * 4, candidates=candidates)  # fmt: skip


def train_row(k: int, n: int, m: int, dropout: float, args: argparse.Namespace) -> Row:
    import fastpeft
    import peft

    count = copies_needed(n * k // 2, last_cache_bytes(), 8 if args.quick else 32)
    weights = subjects.quant_copies(n, k, count)
    candidates = []
    for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        g = torch.Generator().manual_seed(2)
        x, dy = torch.randn(m, k, generator=g).to(dtype), torch.randn(m, n, generator=g).to(dtype)
        theirs = subjects.with_adapter(peft, [subjects.bnb_layer(q, dtype) for q in weights], 16, dropout, True)
        ours = subjects.with_adapter(fastpeft, [subjects.our_layer(q) for q in weights], 16, dropout, True)
        candidates.append(Candidate(f"ours {name}", [subjects.step_call(layer, x, dy) for layer in ours]))
        candidates.append(Candidate(f"PEFT+bnb {name}", [subjects.step_call(layer, x, dy) for layer in theirs]))
    claims = [Claim(f"train, {d}", [f"ours {d}"], [f"PEFT+bnb {d}"], train_target(m, d)) for d in ("bf16", "f32")]
    case = {"suite": "layers", "what": "forward+backward", "K": k, "N": n, "M": m, "r": 16, "dropout": dropout}
    # y and dx, then the adapter's five thin products
    return Row(f"train {k}x{n} M={m} p={dropout:g}", case, {}, claims, 4.0 * m * n * k + 6.0 * m * 16 * (n + k),
               2 * n * k * 0.5 + 2 * m * (n + k) * 4, candidates=candidates)  # fmt: skip


def level_row(k: int, n: int, m: int, args: argparse.Namespace) -> Row | None:
    """The levels of the native library beside each other, float32, so that AVX2's distance to AVX-512 is seen."""
    from peft_kernels import native

    levels = [] if native.available() else [v for v in native.levels() if v in ("avx2", "avx512")]
    if len(levels) < 2:
        return None
    count = copies_needed(n * k // 2, last_cache_bytes(), 16)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(2))
    ours = [subjects.our_layer(q) for q in subjects.quant_copies(n, k, count)]
    calls = [subjects.forward_call(layer, x) for layer in ours]
    candidates = [Candidate(v, calls, enter=lambda v=v: native.set_level(v)) for v in levels]  # type: ignore[misc]
    return Row(f"levels {k}x{n} M={m} f32", {"suite": "layers", "what": "levels", "K": k, "N": n, "M": m}, {},
               [Claim("share of the speed of avx512, 1/2.5 = 0.4 asked", ["avx2"], ["avx512"], 0.4)],
               2.0 * m * n * k, n * k * 0.5 + m * (n + k) * 4, candidates=candidates,
               after=lambda: native.set_level(None))  # fmt: skip


def format_row(name: str, k: int, n: int, m: int, train: bool, args: argparse.Namespace) -> Row:
    """A layer whose weight has the format `name` beside one in NF4 with plain scales: forward, or with LoRA of r=16
    forward and backward."""
    import fastpeft

    from peft_kernels.testing import random_quant_weight

    count = copies_needed(n * k // 2, last_cache_bytes(), 8 if args.quick else 32)
    weights = {"NF4": subjects.quant_copies(n, k, count, nested=False),
               "ours": subjects.copies_of(random_quant_weight(n, k, quant_type=name), count)}  # fmt: skip
    candidates = []
    for dtype_name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32)):
        g = torch.Generator().manual_seed(2)
        x, dy = torch.randn(m, k, generator=g).to(dtype), torch.randn(m, n, generator=g).to(dtype)
        for label, copies in weights.items():
            layers = [subjects.our_layer(q) for q in copies]
            if train:
                layers = subjects.with_adapter(fastpeft, layers, 16, 0.0, True)
                calls = [subjects.step_call(layer, x, dy) for layer in layers]
            else:
                calls = [subjects.forward_call(layer, x) for layer in layers]
            candidates.append(Candidate(f"{label} {dtype_name}", calls))
    what = "forward+backward" if train else "forward"
    case = {"suite": "layers", "what": f"{name} {what}", "K": k, "N": n, "M": m}
    claims = [Claim(f"NF4's speed = 1, {d}", [f"ours {d}"], [f"NF4 {d}"], 1 / 1.15 if train else None)
              for d in ("bf16", "f32")]  # fmt: skip
    return Row(f"formats {name} {k}x{n} M={m} {what}", case, {}, claims, (4.0 if train else 2.0) * m * n * k,
               weights["ours"][0].nbytes + m * (n + k) * 4, candidates=candidates)  # fmt: skip


def rows(args: argparse.Namespace) -> Iterator[Row]:
    shapes = args.shapes or ([(576, 1536), (4096, 4096)] if args.quick else SHAPES)
    forward = args.m or ([1, 16, 128] if args.quick else FORWARD_M)
    train = args.m or ([64, 512] if args.quick else TRAIN_M)
    for k, n in shapes:
        for m in forward:
            if "forward" in args.only:
                yield forward_row(k, n, m, args)
        for m in train:
            for dropout in (0.0, 0.05):
                if "train" in args.only:
                    yield train_row(k, n, m, dropout, args)
    for name in FORMATS if "formats" in args.only else ():
        k, n = args.shapes[0] if args.shapes else (2048, 2048)
        for m in args.m or FORMAT_M:
            yield format_row(name, k, n, m, False, args)
        for m in args.m or FORMAT_M[-1:]:
            yield format_row(name, k, n, m, True, args)
    for k, n in shapes[:2]:
        for m in (1, 16, 256):
            if "levels" in args.only and (row := level_row(k, n, m, args)) is not None:
                yield row
