"""Orthogonal methods beside PEFT's, in one run: forward + backward of one frozen layer in training, as PEFT's defaults.

f32: a dense float32 layer; NF4: our layer, and bitsandbytes' under PEFT. frozen: the layer alone, gradient of x.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import subjects
from ..measure import Candidate
from ..results import Claim, Row
from .methods import Holder, step

# (config, options, base, tokens, width, speed against PEFT as the issue asks, against the frozen layer)
CASES: list[tuple[str, dict[str, Any], str, int, int, float, float | None]] = [
    ("BOFTConfig", {}, "f32", 512, 2048, 8.0, None),
    ("BOFTConfig", {}, "f32", 512, 4096, 15.0, None),
    ("BOFTConfig", {}, "f32", 4096, 2048, 2.0, None),
    ("HRAConfig", {}, "f32", 512, 2048, 8.0, None),
    ("HRAConfig", {}, "f32", 4096, 2048, 2.0, None),
    ("OFTConfig", {}, "f32", 512, 2048, 1.0, 1 / 1.1),
    ("OFTConfig", {}, "f32", 4096, 2048, 1.0, 1 / 1.1),
    ("OFTConfig", {}, "NF4", 512, 2048, 2.0, None),
    ("RoadConfig", {}, "f32", 512, 2048, 1.0, None),
]


def _base(kind: str, width: int, ours: bool) -> nn.Module:
    layer = subjects.quant_copies(width, width, 1)[0]
    if kind == "f32":
        return subjects.dense_layer(layer, torch.float32)
    return subjects.our_layer(layer) if ours else subjects.bnb_layer(layer, torch.float32)


def adapted(package: Any, config: str, options: dict[str, Any], base: nn.Module) -> nn.Module:
    """A model of the layer with an adapter that is not at its start, by `package` (fastpeft or peft)."""
    holder = Holder(base)
    holder.is_loaded_in_4bit = hasattr(base, "quant_state")  # PEFT asks the model, not the layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = package.get_peft_model(holder, getattr(package, config)(target_modules=["lin"], **options))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g).to(p) * 0.02)
    return model.train()  # type: ignore[no-any-return]


def row(config: str, options: dict[str, Any], kind: str, m: int, width: int, target: float, layer: float | None) -> Row:
    import fastpeft
    import peft

    g = torch.Generator().manual_seed(2)
    x, dy = torch.randn(m, width, generator=g).requires_grad_(), torch.randn(m, width, generator=g)
    candidates = [Candidate("frozen", [step(Holder(_base(kind, width, True)).requires_grad_(False), x, dy)])]
    for name, package in (("ours", fastpeft), ("PEFT", peft)):
        model = adapted(package, config, options, _base(kind, width, package is fastpeft))
        candidates.append(Candidate(name, [step(model, x, dy)]))
    claims = [Claim("PEFT", ["ours"], ["PEFT"], target), Claim("the layer", ["ours"], ["frozen"], layer)]
    name = config.removesuffix("Config")
    case = {"suite": "ortho", "method": name, "options": options, "base": kind, "M": m, "K": width, "N": width}
    return Row(f"{name} {kind} {width} M={m}", case, {}, claims, 4.0 * m * width * width, candidates=candidates)


def factors_row() -> Row:
    """BOFT with four factors beside one."""
    import fastpeft

    m, width = 512, 2048
    x, dy = torch.randn(m, width).requires_grad_(), torch.randn(m, width)
    candidates = []
    for factors in (1, 4):
        model = adapted(fastpeft, "BOFTConfig", {"boft_n_butterfly_factor": factors}, _base("f32", width, True))
        candidates.append(Candidate(f"m={factors}", [step(model, x, dy)]))
    claims = [Claim("one factor", ["m=4"], ["m=1"], 1 / 1.3)]
    case = {"suite": "ortho", "method": "BOFT factors", "M": m, "K": width, "N": width}
    return Row("BOFT f32 2048 M=512 m=4", case, {}, claims, 4.0 * m * width * width, candidates=candidates)


def rows(args: argparse.Namespace) -> Iterator[Row]:
    chosen = None if args.methods is None else {m.lower() for m in args.methods}
    for case in CASES:
        if chosen is None or case[0].removesuffix("Config").lower() in chosen:
            yield row(*case)
    if chosen is None or "boft" in chosen:
        yield factors_row()
