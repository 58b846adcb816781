"""Mixed batches: 64 rows over 1, 8, 16 and 64 LoRA adapters (r=16), beside the base alone and PEFT's mixed batch.

`1` to `64`: our layer, whose rows were assigned before; `base`: the layer without adapters. `model N` and `PEFT N`: a
model of that one layer, called with `adapter_names`. f32: a dense float32 layer; NF4: our layer, and bitsandbytes'
under PEFT, in evaluation. Rows of one adapter are an ordinary call. decode: SmolLM2 with 16 adapters on all seven
projections, 16 rows, a token of each in a step; the modes are those of qlora.py.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import subjects
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed, warm_everything
from ..results import Claim, Row
from .whole import WholeModel, extras, measure

# (in, out): SmolLM2's, and a wide one
SHAPES = [(576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 2048)]
ADAPTERS = (1, 8, 16, 64)
RANK, ROWS = 16, 64
DECODE = WholeModel("decode, a token of 16 rows with 16 adapters", "decode-mixed",
                    ["ours-f32-fast", "ours-bf16-fast", "ours-f32", "ours-bf16", "bnb-f32", "bnb-bf16",
                     "dense-f32"])  # fmt: skip
WHOLE_MODELS = [DECODE]


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.lin = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin(x)
        return y


def _model(package: Any, layer: nn.Module, adapters: int) -> Any:
    """A model of one layer with adapters a0, a1, ... whose B are not zero."""
    config = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["lin"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = package.get_peft_model(OneLayer(layer), package.LoraConfig(**config), "a0")
        for i in range(1, adapters):
            model.add_adapter(f"a{i}", package.LoraConfig(**config))
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)
    return model.eval().requires_grad_(False)


def _names(adapters: int, rows: int) -> list[str]:
    return [f"a{i % adapters}" for i in range(rows)]


def _call(model: Any, x: Tensor, names: list[str]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return model(x, adapter_names=names)

    return call


def layer_row(k: int, n: int, m: int, base: str, args: argparse.Namespace) -> Row:
    import fastpeft
    import peft

    x = torch.randn(m, k, generator=torch.Generator().manual_seed(2))
    nbytes = n * k * 4 if base == "f32" else n * k // 2
    most = 4 if args.quick else 8

    def layers(adapters: int, ours: bool) -> list[nn.Module]:
        size = nbytes + adapters * RANK * (n + k) * 4
        copies = subjects.quant_copies(n, k, copies_needed(size, last_cache_bytes(), most if adapters else 64))
        if base == "f32":
            return [subjects.dense_layer(q, torch.float32) for q in copies]
        return [subjects.our_layer(q) if ours else subjects.bnb_layer(q, torch.float32) for q in copies]

    candidates = [Candidate("base", [subjects.forward_call(layer, x) for layer in layers(0, True)])]
    for count in ADAPTERS:
        models, names = [_model(fastpeft, layer, count) for layer in layers(count, True)], _names(count, m)
        for model in models:
            model.get_base_model().lin.set_rows(names)
        own = [subjects.forward_call(model.get_base_model().lin, x) for model in models]
        candidates.append(Candidate(str(count), own))
    for count in ADAPTERS[2:]:
        for label, package in (("model", fastpeft), ("PEFT", peft)):
            models = [_model(package, layer, count) for layer in layers(count, package is fastpeft)]
            candidates.append(Candidate(f"{label} {count}", [_call(each, x, _names(count, m)) for each in models]))
    # PEFT's layers repack at the first call; ours pack adapters then, and at the fourth learn to look at them at once
    warm_everything(candidates, 5)
    wide = n * k >= 2048 * 2048
    against = {16: None if wide else 5.0, 64: (2.0 if base == "f32" else 4.0) if wide else 10.0}
    claims = [Claim("64 adapters of one's speed", ["64"], ["1"], 1 / 1.5),
              Claim("8 adapters of the base's speed", ["8"], ["base"], 1 / 1.15 if wide else None),
              *(Claim(f"PEFT, {c} adapters", [f"model {c}"], [f"PEFT {c}"], against[c]) for c in (16, 64))]  # fmt: skip
    case = {"suite": "multi", "what": "forward", "K": k, "N": n, "M": m, "r": RANK, "base": base}
    return Row(f"mixed {base} {k}x{n} M={m}", case, {}, claims, 2.0 * m * (n * k + RANK * (n + k)),
               candidates=candidates)  # fmt: skip


def decode_row(args: argparse.Namespace) -> Row:
    modes: Sequence[str] = args.modes or DECODE.modes
    stats, last = measure(DECODE.what, list(modes), 3 if args.quick else args.step_rounds, args)
    ours, theirs = [m for m in modes if m.startswith("ours")], [m for m in modes if not m.startswith("ours")]
    claims = [
        Claim("PEFT's fastest", ours, theirs, 3.0),
        Claim("its fastest, plain generate()", [m for m in ours if not m.endswith("-fast")], theirs),
    ]
    row = Row(DECODE.title, {"suite": "multi", "what": "decode", "r": RANK}, stats,
              claims, extra=extras(last, ["peak_mib", "cpu_s"]))  # fmt: skip
    row.extra["tokens/s"] = {m: round(16 / s.median, 1) for m, s in stats.items()}
    for name in modes:
        plain = name.removesuffix("-fast")
        if name != plain and name in last and plain in last:
            same = sum(a == b for a, b in zip(last[name]["ids"], last[plain]["ids"], strict=True))
            row.notes.append(f"decode: {same} of {len(last[plain]['ids'])} tokens of {name} are those of {plain}")
    return row


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for k, n in args.shapes or ([(576, 576), (2048, 2048)] if args.quick else SHAPES):
        for base in ("f32", "NF4"):
            for m in args.m or [ROWS]:
                if "forward" in args.only:
                    yield layer_row(k, n, m, base, args)
    if "decode" in args.only:
        yield decode_row(args)
