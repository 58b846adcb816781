"""Steps of the suite qlora beside what the machine could do at best. All parts but the first run by name alone.

products        SmolLM2, 4 x 128 tokens: a step in turns with each of its products alone, its bound, and their sum
llama-1b        a step of a random Llama of 1.07 billion parameters, 2 x 256 tokens; llama-products: the table of it
long            steps of rows of 2,048 and of 4,096 tokens (`--m`), without and with gradient checkpointing
long-products   the table of each of those rows
longest         a row of 16,384 tokens with gradient checkpointing: memory
checkpointing   what gradient checkpointing costs, and what is kept for the backward: 4 x 128 tokens, or a row of `--m`
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..measure import Stats
from ..results import Claim, Limit, Row
from . import whole
from .products import BACKWARD, DAB, DX, FORWARD, Product

OWN, CKPT, SOME, THEIRS = "ours-bf16-own", "ours-bf16-own-ckpt", "ours-bf16-own-some", "bnb-bf16"
MIB_OF_GB = 1e9 / 2**20
LONGEST = 16_384
MEMORY = {4096: {OWN: 3.6, CKPT: 1.8}, LONGEST: {CKPT: 6.0}}  # GB of a process at most, by tokens of its row
CKPT_TIME, CKPT_KEPT = 1.35, 0.45  # of a step without
PRODUCTS_MORE, PRODUCTS_MOST = 1.2, 1.25  # where products take more of the bound, so many times their time will do


@dataclass(frozen=True)
class Case:
    """A model, its batch, and how many times the bound a step may take. by_products: or its products, as above."""

    model: str
    rows: int
    length: int
    most: float
    by_products: bool = False

    @property
    def title(self) -> str:
        return f"{self.model}, {self.rows} x {self.length:,} tokens"

    @property
    def more(self) -> dict[str, int]:
        """Fields of a worker's task. A step runs once before it is timed, the longest on 128 tokens: it is for memory.

        What a first step takes from the system, a page at a time, was 0.5 million pages with 4,096 tokens."""
        warm = {"warm": 128} if self.length >= LONGEST else {}
        return {"rows": self.rows, "length": self.length, **warm}


SMALL = Case("SmolLM2-135M", 4, 128, 1.5, by_products=True)
LARGE = Case("Llama 1.07B", 2, 256, 1.35, by_products=True)


def long_case(tokens: int) -> Case:
    return Case("SmolLM2-135M", 1, tokens, 1.6)


@contextmanager
def large_model() -> Iterator[Path]:
    """The folder of a random model: 16 layers of hidden size 2048, 32 heads of 64 over 8, a tied vocabulary."""
    from transformers import LlamaConfig

    from .families_models import save

    config = LlamaConfig(hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, vocab_size=49_152,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
                         max_position_embeddings=2048)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        save(config, "AutoModelForCausalLM", Path(folder))
        yield Path(folder)


def facts(what: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    return {"suite": "qlora", "what": what, "model": case.model, "rows": case.rows, "length": case.length,
            "tokens": case.rows * case.length, "dropout": args.dropout, "r": 16}  # fmt: skip


def rounds_of(args: argparse.Namespace) -> int:
    return 3 if args.quick else int(args.step_rounds)


def step_row(
    name: str, case: Case, modes: Sequence[str], rounds: int, args: argparse.Namespace, folder: Path | None = None,
    kept: bool = False,
) -> Row:  # fmt: skip
    """A step in each mode. name: begins the title. kept: also what is kept for the backward."""
    modes = list(args.modes or modes)
    stats, last = whole.measure("step", modes, rounds, args, folder, kept=kept, **case.more)
    claims = [Claim("PEFT + bitsandbytes", [m], [m.replace(OWN, THEIRS)]) for m in modes if m.startswith("ours")]
    extra = whole.extras(last, [*whole.STEP_EXTRAS, "saved_mib", "held_mib"])
    row = Row(f"{name}, {case.title}", facts(name, case, args), stats, claims, extra=extra)
    for mode, most in MEMORY.get(case.length, {}).items():
        if mode in last:
            row.limits.append(Limit("peak GB", mode, last[mode]["peak_mib"] / MIB_OF_GB, most))
    return row


def limit_bound(row: Row, case: Case, mode: str = OWN) -> Row:
    """The row with what is asked of a step beside its bound."""
    bound = row.extra.get("bound_s", {}).get(mode)
    if bound and mode in row.stats:
        row.limits.append(Limit("times the bound", mode, row.stats[mode].median / bound, case.most))
    return row


def checkpointing_row(case: Case, args: argparse.Namespace) -> Row:
    """With gradient checkpointing beside without, ours and PEFT's; what is asked is of that which spares layers."""
    modes = [OWN, SOME, CKPT, THEIRS, THEIRS + "-ckpt"]
    row = step_row("checkpointing", case, modes, rounds_of(args), args, kept=True)
    if OWN in row.stats and SOME in row.stats:
        time, saved = row.stats[SOME].median / row.stats[OWN].median, row.extra["saved_mib"]
        row.limits.append(Limit("times a step without", SOME, time, CKPT_TIME))
        row.limits.append(Limit("of the activations without", SOME, saved[SOME] / saved[OWN], CKPT_KEPT))
    return row


def products_row(case: Case, mode: str, args: argparse.Namespace, folder: Path | None = None) -> Row:
    """A step of a mode in turns with each of its products alone, in one process."""
    folder = folder or whole.model_folder(args)
    worker = whole.Worker(mode, "products", folder, args, **case.more)
    try:
        found = [Product(**each) for each in worker.receive()["products"]]
        replies = [worker.run() for _ in range(rounds_of(args))]
    finally:
        worker.close()
    return table(case, facts("products", case, args) | {"mode": mode}, found, replies)


def added(found: Sequence[Product], each: dict[str, Stats]) -> list[Product]:
    """The products that a step has: of a backward in one call and its two halves those that take less."""
    by_layers: dict[str, dict[str, Product]] = {}
    for product in found:
        by_layers.setdefault(product.layers, {})[product.part] = product
    chosen = []
    for parts in by_layers.values():
        ways = [[parts[part] for part in way if part in parts] for way in ((DX, DAB), (BACKWARD,))]
        chosen += [parts[FORWARD], *min(filter(None, ways), key=lambda way: sum(each[p.name].median for p in way))]
    return chosen


def table(case: Case, about: dict[str, Any], found: Sequence[Product], replies: Sequence[dict[str, Any]]) -> Row:
    """The row of replies of a worker: the step, its bound and its products, and each of these."""
    each = {p.name: Stats([reply["each"][p.name] for reply in replies]) for p in found}
    chosen = added(found, each)

    def of(products: Sequence[Product]) -> list[float]:
        """Seconds that products take in a step, in each round."""
        return [sum(p.count * reply["each"][p.name] for p in products) for reply in replies]

    steps = [reply["s"] for reply in replies]
    attention = of([p for p in chosen if p.layers == "attention"])
    step, alone = Stats(steps), Stats(of(chosen))
    bounds = [reply["bound_s"] for reply in replies if "bound_s" in reply]
    sums = {"step": step, **({"its bound": Stats(bounds)} if bounds else {}), "its products alone": alone,
             "step less attention": Stats([s - a for s, a in zip(steps, attention, strict=True)])}  # fmt: skip
    row = Row(f"products, {case.title}", about, {**sums, **each}, in_order=True)
    flops = sum(p.count * p.flops for p in chosen)
    gflops = {name: flops / stats.median / 1e9 for name, stats in sums.items() if name != "step less attention"}
    gflops |= {p.name: p.flops / each[p.name].median / 1e9 for p in found}
    shares = {name: stats.median / step.median for name, stats in sums.items()}
    shares |= {p.name: p.count * each[p.name].median / step.median for p in chosen}
    row.extra = {
        "M x N x K": {p.name: f"{p.m} x {p.n} x {p.k}" for p in found},
        "calls": {p.name: p.count for p in found},
        "GFLOP": {"step": round(flops / 1e9, 2), **{p.name: round(p.flops / 1e9, 4) for p in found}},
        "GFLOP/s": {name: round(rate, 1) for name, rate in gflops.items()},
        "of the step": {name: f"{share:.1%}" for name, share in shares.items()},
    }
    for name in ("step", "step less attention"):
        row.notes.append(f"{row.title}: {name}: {sums[name].median / about['tokens'] * 1e6:.0f} us a token")
    if bounds:
        bound = sums["its bound"].median
        other = None
        if case.by_products and alone.median > PRODUCTS_MORE * bound:
            other = Limit("times its products alone", "step", step.median / alone.median, PRODUCTS_MOST)
        row.limits.append(Limit("times the bound", "step", step.median / bound, case.most, other))
        row.extra["of the bound"] = {name: round(sums[name].median / bound, 2) for name in sums}
    return row


def rows(args: argparse.Namespace) -> Iterator[Row]:
    own = [mode for mode in args.modes or [OWN] if mode.startswith("ours") and mode.endswith("-own")]
    lengths = args.m or [2048, 4096]
    if "products" in args.only:
        yield from (products_row(SMALL, mode, args) for mode in own)
    if {"llama-1b", "llama-products"} & set(args.only):
        with large_model() as folder:
            if "llama-1b" in args.only:
                yield limit_bound(step_row("large", LARGE, [OWN, THEIRS], rounds_of(args), args, folder), LARGE)
            if "llama-products" in args.only:
                yield from (products_row(LARGE, mode, args, folder) for mode in own)
    for case in map(long_case, lengths):
        if "long" in args.only:
            yield limit_bound(step_row("long", case, [OWN, CKPT, THEIRS], rounds_of(args), args), case)
        if "long-products" in args.only:
            yield from (products_row(case, mode, args) for mode in own)
    if "longest" in args.only:
        yield step_row("long", long_case(LONGEST), [CKPT], 1, args)
    if "checkpointing" in args.only:
        for case in map(long_case, args.m) if args.m else [SMALL]:
            yield checkpointing_row(case, args)
