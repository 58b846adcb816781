"""DoRA beside our LoRA and PEFT's DoRA, in one run: forward + backward of a layer, r=16, and inference.

f32: a dense float32 layer; NF4: our layer, and bitsandbytes' under PEFT, which decodes all of W. Ratios to our LoRA are
time ratios turned round: 0.8 is 1.25 times LoRA's time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import nn

from .. import subjects
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed, warm_everything
from ..results import Claim, Row

SHAPES = [(576, 576), (2048, 2048), (4096, 4096)]
TOKENS = [128, 512]
DROPOUTS = [0.0, 0.05]
RANK = 16
# speed of DoRA against our LoRA's, and against PEFT's DoRA by base and tokens: as the issue asks
OF_LORA = {0.0: 1 / 1.25, 0.05: 1 / 2.1}
OF_PEFT = {(0.0, 128): {"f32": 2.5, "NF4": 4.0}, (0.0, 512): {"f32": 1.4, "NF4": 2.0},
           (0.05, 128): {"f32": 1.5, "NF4": 2.5}, (0.05, 512): {"f32": 1.2, "NF4": 1.5}}  # fmt: skip
OF_LORA_IN_INFERENCE = 1 / 1.05


def _layers(base: str, n: int, k: int, count: int, ours: bool) -> list[nn.Module]:
    copies = subjects.quant_copies(n, k, count)
    if base == "f32":
        return [subjects.dense_layer(q, torch.float32) for q in copies]
    return [subjects.our_layer(q) if ours else subjects.bnb_layer(q, torch.float32) for q in copies]


def _count(base: str, n: int, k: int, args: argparse.Namespace) -> int:
    return copies_needed(n * k * 4 if base == "f32" else n * k // 2, last_cache_bytes(), 4 if args.quick else 16)


def train_row(k: int, n: int, m: int, base: str, p: float, args: argparse.Namespace) -> Row:
    import fastpeft
    import peft

    g = torch.Generator().manual_seed(2)
    x, dy = torch.randn(m, k, generator=g), torch.randn(m, n, generator=g)
    candidates = []
    for name, package, dora in (("DoRA", fastpeft, True), ("LoRA", fastpeft, False), ("PEFT DoRA", peft, True)):
        layers = _layers(base, n, k, _count(base, n, k, args), package is fastpeft)
        adapted = subjects.with_adapter(package, layers, RANK, p, True, use_dora=dora)
        candidates.append(Candidate(name, [subjects.step_call(layer, x, dy) for layer in adapted]))
    claims = [Claim("of our LoRA's speed", ["DoRA"], ["LoRA"], OF_LORA.get(p)),
              Claim("PEFT's DoRA", ["DoRA"], ["PEFT DoRA"], OF_PEFT.get((p, m), {}).get(base))]  # fmt: skip
    case = {"suite": "dora", "what": "forward+backward", "K": k, "N": n, "M": m, "r": RANK, "base": base, "dropout": p}
    return Row(f"train {base} {k}x{n} M={m} p={p:g}", case, {}, claims,
               4.0 * m * n * k + 6.0 * m * RANK * (n + k) + 2.0 * n * k * RANK, candidates=candidates)  # fmt: skip


def inference_row(k: int, n: int, m: int, base: str, args: argparse.Namespace) -> Row:
    import fastpeft

    x = torch.randn(m, k, generator=torch.Generator().manual_seed(2))
    candidates = []
    # both over the same weights: one copy can be a fifth slower to read than another, by the pages that it lies in
    layers = _layers(base, n, k, _count(base, n, k, args), True)
    for name, dora in (("DoRA", True), ("LoRA", False)):
        adapted = subjects.with_adapter(fastpeft, layers, RANK, 0.0, False, use_dora=dora)
        candidates.append(Candidate(name, [subjects.forward_call(layer, x) for layer in adapted]))
    warm_everything(candidates)  # DoRA's first call computes norms: by its time, a sample would be a few calls
    claims = [Claim("of our LoRA's speed", ["DoRA"], ["LoRA"], OF_LORA_IN_INFERENCE)]
    case = {"suite": "dora", "what": "forward", "K": k, "N": n, "M": m, "r": RANK, "base": base}
    return Row(f"inference {base} {k}x{n} M={m}", case, {}, claims, 2.0 * m * (n * k + RANK * (n + k)),
               candidates=candidates)  # fmt: skip


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for k, n in args.shapes or SHAPES:
        for base in ("f32", "NF4"):
            for m in args.m or TOKENS:
                for p in DROPOUTS:
                    if "train" in args.only:
                        yield train_row(k, n, m, base, p, args)
            for m in args.m or (1, 128):
                if "forward" in args.only:
                    yield inference_row(k, n, m, base, args)
