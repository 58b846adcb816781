"""Training 4 LoRA adapters (r=16) on SmolLM2 in NF4: all in one step, beside one run after another.

once: a step of all four, a row each, by fastpeft's training loop. after: the same loop with one adapter, four steps:
what four runs one after another take for a step of each. one: a step of one adapter with all four rows. PEFT on
bitsandbytes NF4 trains one after another, too, with its model's own loss. A step is forward, loss, backward, clipping
and AdamW of every adapter, the loss that of every token; its bound is that of qlora.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..results import Claim, Limit, Row
from .whole import OF_BOUND, WholeModel, extras, measure

ONE = "ours-bf16-one"
MODES = ["ours-bf16-once", "ours-bf16-after", "ours-f32-once", "ours-f32-after", "bnb-bf16-after", "bnb-f32-after"]
ADAPTERS = 4
TARGETS = {8: 2.0, 64: 1.0}  # by tokens of an adapter's row: how much faster at once is to be
OF_ONE = {64: 1.15}  # how many times the step of one adapter at once may take


def whole_model(tokens: int) -> WholeModel:
    return WholeModel(f"a step of {ADAPTERS} adapters, {tokens} tokens each", "train-adapters", MODES,
                      {"rows": ADAPTERS, "length": tokens})  # fmt: skip


WHOLE_MODELS = [whole_model(tokens) for tokens in TARGETS]


def step_row(tokens: int, args: argparse.Namespace) -> Row:
    row = whole_model(tokens)
    modes = args.modes or [*row.modes, ONE]
    rounds = 3 if args.quick else args.step_rounds
    stats, last = measure(row.what, list(modes), rounds, args, **row.more)
    once = [m for m in modes if m.endswith("-once")]
    theirs = [m for m in modes if m.startswith("bnb")]
    pairs = [(m, m.replace("-once", "-after")) for m in once]
    claims = [
        *(Claim(f"at once, {a.split('-')[1]}", [a], [b], TARGETS.get(tokens)) for a, b in pairs if b in modes),
        Claim("PEFT + bitsandbytes, one after another", once, theirs),
    ]
    case = {"suite": "multi-train", "what": "step", "adapters": ADAPTERS, "tokens": tokens, "r": 16}
    found = Row(row.title, case, stats, claims, extra=extras(last, [*OF_BOUND, "peak_mib", "cpu_s", "loss"]))
    once = ONE.replace("-one", "-once")
    if tokens in OF_ONE and {ONE, once} <= set(stats):
        ratio = stats[once].median / stats[ONE].median
        found.limits.append(Limit("times a step of one adapter with all tokens", once, ratio, OF_ONE[tokens]))
    return found


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for tokens in args.m or list(TARGETS):
        yield step_row(tokens, args)
