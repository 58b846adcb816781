"""How fast one batch decodes while more and more adapters take part in it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = 64
COUNTS = (1, 2, 4, 8, 16, 32, 64)
Report = Callable[[str, int, int], None]


def measure(
    base: Any, folders: Mapping[str, Path], report: Report, counts: Sequence[int], rows: int, rounds: int = 3
) -> dict[str, Any]:
    """Tokens per second of decoding ``rows`` sequences that belong to 1, 2, 4, ... adapters, and to none.

    base: the plain model, without adapters. folders: trained adapters; a batch of more adapters than these gets copies,
    each in a slot of its own, so that nothing is shared. Two ways: one batch in which every row has its adapter, and
    one adapter after another, each with its rows. The middle of all steps of all rounds counts.
    """
    from ... import AdapterPool

    names = [f"{name}-{i}" for i in range(-(-max(counts) // len(folders))) for name in folders][: max(counts)]
    with AdapterPool(base, max_resident=len(names), target_modules="all-linear") as pool:
        for name in names:
            pool.add(name, folders[name.rpartition("-")[0]])
        jobs = [("base", 0), *(("one batch", k) for k in counts), *(("one after another", k) for k in counts)]
        seconds: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
        total, done = rounds * len(jobs), 0
        for _ in range(rounds):  # in turns, so that a slow spell of the machine hits all alike
            for job in jobs:
                seconds[job] += _steps(pool, names, *job, rows)
                done += 1
                report("measuring throughput", done, total)
    per_s = {job: rows / statistics.median(took) for job, took in seconds.items()}
    return {
        "rows": rows,
        "base": per_s["base", 0],
        "adapters": list(counts),
        "one_batch": [per_s["one batch", k] for k in counts],
        "one_after_another": [per_s["one after another", k] for k in counts],
    }


def _steps(pool: Any, names: Sequence[str], way: str, count: int, rows: int) -> list[float]:
    """Seconds of a token of all rows, for each of a few tokens."""
    if way == "base":
        return _decode(pool.model, rows, 4)
    if way == "one batch":
        with pool.using([names[i % count] for i in range(rows)]):
            return _decode(pool.model, rows, 4)
    share, total = rows // count, [0.0, 0.0]
    for name in names[:count]:
        with pool.using([name] * share):
            total = [t + s for t, s in zip(total, _decode(pool.model, share, len(total)), strict=True)]
    return total


def _decode(model: Any, rows: int, tokens: int) -> list[float]:
    """Greedy decoding from one token on; the first step, which makes the cache, does not count."""
    import torch

    took, cache = [], None
    ids = torch.full((rows, 1), model.config.eos_token_id or 0, device=model.device)
    with torch.inference_mode():
        for _ in range(tokens + 1):
            start = time.perf_counter()
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids.sum().item()  # waits for the device
            took.append(time.perf_counter() - start)
    return took[1:]


def plot(result: dict[str, Any], picture: Path, title: str) -> None:
    """Tokens per second against the number of adapters in the batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..training.plot import INK, plain_axes, save_picture

    figure = Figure(figsize=(8, 4.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    x = range(len(result["adapters"]))
    axes.axhline(result["base"], color="#9a9a9a", linestyle="--", linewidth=1.2)
    axes.annotate("base, no adapters", (0, result["base"]), xytext=(0, 5), textcoords="offset points", color="#777777")
    for key, label, colour in (
        ("one_batch", f"one batch of {result['rows']} rows, each with its adapter", "#4c72b0"),
        ("one_after_another", "one adapter after another", "#c44e52"),
    ):
        axes.plot(x, result[key], color=colour, marker="o", linewidth=2, label=label)
        axes.annotate(f"{result[key][-1]:.0f}", (x[-1], result[key][-1]), xytext=(0, 7), textcoords="offset points",
                      ha="center", color=colour, fontweight="bold")  # fmt: skip
    axes.set_xticks(list(x), [str(k) for k in result["adapters"]])
    axes.set_ylim(0, 1.15 * max(result["base"], *result["one_batch"], *result["one_after_another"]))
    axes.set_xlabel("adapters in the batch")
    axes.set_ylabel("tokens per second")
    axes.set_title(title, loc="left", color=INK, fontsize=12)
    axes.legend(frameon=False, loc="lower left")
    plain_axes(axes)
    axes.set_xlim(-0.3, len(x) - 0.7)
    save_picture(figure, picture)
