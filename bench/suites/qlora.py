"""The whole model: a training step and decoding of one sequence, ours beside PEFT's, and a step beside its bound.

Modes, each a process (worker.py), in turns:
  ours-*      fastpeft on its NF4 layers; `-own` with fastpeft's training loss instead of the model's;
              `-fast` with fastpeft.families.switch on top, else transformers' model code as it is
  bnb-*       PEFT on bitsandbytes NF4 with double quantisation: in train mode for the step, in eval mode for decoding
  dense-*     PEFT on torch's dense layers
  *-ckpt      with gradient checkpointing of each decoder layer; `-some`: of all but every third
bf16 and f32 are the dtypes of the model and of the computing; adapters are float32 in all of them, r = 16 on all seven
projections. The loss is over every token, the optimizer torch's fused AdamW, which Trainer takes as well.

The bound of a step is its FLOPs (bounds.py) at the peak of products that the mode's own process measures before each
step. Parts (`--only`): step, products (a table of the step's products, products.py), decode; and, where they are named,
those of training.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..results import Claim, Row
from . import training
from .whole import STEP_EXTRAS, WholeModel, extras, limit_memory, measure

STEP = WholeModel("step, 4 x 128 tokens", "step", ["ours-bf16-own", "ours-bf16", "ours-f32-own", "bnb-bf16", "bnb-f32",
                                                   "dense-bf16", "dense-f32"])  # fmt: skip
DECODE = WholeModel("decode, a token", "decode", ["ours-bf16-fast", "ours-f32-fast", "ours-bf16", "ours-f32",
                                                  "bnb-bf16", "bnb-f32", "dense-f32"])  # fmt: skip
WHOLE_MODELS = [STEP, DECODE]


def step_row(args: argparse.Namespace) -> Row:
    modes = [m for m in args.modes or STEP.modes if not m.endswith("-fast")]
    stats, last = measure(STEP.what, modes, 3 if args.quick else args.step_rounds, args)
    ours = [m for m in modes if m.startswith("ours")]
    claims = [
        Claim("bf16 compute", ours, ["bnb-bf16"], 2.0),
        Claim("its fastest", ours, ["bnb-bf16", "bnb-f32"], 1.2),
        Claim("dense", ours, ["dense-bf16", "dense-f32"]),
        Claim("same loss code, bf16", ["ours-bf16"], ["bnb-bf16"]),
    ]
    case = {"suite": "qlora", "what": "step", "tokens": 512, "dropout": args.dropout, "r": 16}
    row = Row(
        STEP.title,
        case,
        stats,
        claims,
        extra=extras(last, STEP_EXTRAS),
    )
    limit_memory(row)
    return row


def decode_row(args: argparse.Namespace) -> Row:
    modes = [m for m in args.modes or DECODE.modes if not m.endswith("-own")]
    stats, last = measure(DECODE.what, modes, 3 if args.quick else args.step_rounds, args)
    ours = [m for m in modes if m.startswith("ours")]
    theirs = ["bnb-bf16", "bnb-f32"]
    claims = [
        Claim("its fastest", ours, theirs, 2.0),
        Claim("its fastest, plain generate()", [m for m in ours if not m.endswith("-fast")], theirs),
        Claim("dense", ours, ["dense-f32"]),
    ]
    row = Row(DECODE.title, {"suite": "qlora", "what": "decode", "r": 16}, stats, claims,
              extra=extras(last, ["peak_mib", "cpu_s"]))  # fmt: skip
    row.extra["tokens/s"] = {m: round(1 / s.median, 1) for m, s in stats.items()}
    for name in ("ours-f32-fast", "ours-bf16-fast"):
        plain = name.removesuffix("-fast")
        if name in last and plain in last:
            same = sum(a == b for a, b in zip(last[name]["ids"], last[plain]["ids"], strict=True))
            row.notes.append(f"decode: {same} of {last[plain]['tokens']} tokens of {name} are those of {plain}")
    limit_memory(row)
    return row


def rows(args: argparse.Namespace) -> Iterator[Row]:
    if "step" in args.only:
        yield step_row(args)
    yield from training.rows(args)
    if "decode" in args.only:
        yield decode_row(args)
