"""Answers that follow from a run's rows and from nothing else: where one way of ours overtakes another, and the rows of
peft_kernels/tuned that the times ask for. Pure functions; the sheet prints them, tools/freeze_tuned.py writes them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

from peft_kernels.tuning import Config

Row = dict[str, Any]
Wrong = Callable[[str, str, str, str, int], str | None]  # op, backend, direction, dtype, rows -> why it is wrong
CLOCKS = ("graph_s", "eager_s")  # the first that both candidates have counts
PARTS = ("tune", "lora_linear", "panels")  # of a run, whose rows the tables come from
MARGIN = 0.02  # by so much another configuration has to be faster than the one that runs today
# which operator and direction a kernel of the tables is a part of
KERNELS = {"project": "forward", "forward": "forward", "outer": "backward", "backward": "backward"}
DEFAULTS = {f.name: f.default for f in fields(Config)}


def nothing_is_wrong(*_: Any) -> None:
    """The verdicts of a run whose tests are not asked."""


def pair(row: Row, first: str, second: str) -> tuple[float, float] | None:
    """Seconds of two candidates by one clock; None where no clock has both."""
    times = row.get("times", {})
    for clock in CLOCKS:
        found = [times.get(name, {}).get(clock) for name in (first, second)]
        if all(found):
            return found[0], found[1]
    return None


def crossing(times: dict[int, tuple[float, float]]) -> int | None:
    """The least number of rows from which on, at all that were measured, the first is the faster one; None: it is not
    at the largest. times: rows -> (seconds of the first, of the second)."""
    found = None
    for m in sorted(times, reverse=True):
        if times[m][0] >= times[m][1]:
            break
        found = m
    return found


def overtaking(names: Iterable[str]) -> list[tuple[str, str]]:
    """(first, second): pairs of our ways of which the first is expected to win with many rows."""
    found = list(dict.fromkeys(names))
    pairs = [(f"{b} panels", f"{b} fused") for b in ("triton", "native")]
    pairs += [(name, "cuda") for name in ("triton fused", "triton panels", "triton")]
    return [(a, b) for a, b in pairs if a in found and b in found]


def crossovers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each op, direction, dtype and shape, and each pair of our ways that its rows have: from how many rows the
    first beats the second ("from_m"; None: not up to the largest), and second / first at each number of rows."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("times") and row.get("m"):
            groups[tuple(str(row[k]) for k in ("op", "direction", "dtype", "shape"))].append(row)
    found = []
    for (op, direction, dtype, shape), members in groups.items():
        for first, second in overtaking(name for row in members for name in row["times"]):
            times = {row["m"]: both for row in members if (both := pair(row, first, second)) is not None}
            if times:
                ratios = {m: times[m][1] / times[m][0] for m in sorted(times)}
                found.append({"op": op, "direction": direction, "dtype": dtype, "shape": shape, "first": first,
                              "second": second, "from_m": crossing(times), "ratios": ratios})  # fmt: skip
    return found


def in_words(one: dict[str, Any]) -> str:
    """A line of the sheet for an entry of `crossovers`."""
    measured = ", ".join(f"M={m} {ratio:.2f}x" for m, ratio in one["ratios"].items())
    wins = f"from M = {one['from_m']} on" if one["from_m"] else f"not up to M = {max(one['ratios'])}"
    return (f"{one['op']} {one['direction']} {one['shape']}: {one['first']} is faster than {one['second']} {wins} "
            f"({measured})")  # fmt: skip


# ---- rows of the tuned tables ----------------------------------------------------------------------------------------
def proposed(rows: Sequence[Row], wrong: Wrong = nothing_is_wrong) -> dict[str, Any]:
    """{"arch", "kernels": {kernel: [row of a table]}, "panels": {from_M, from_M_dense} or {}, "refused": [why]}.

    A kernel that the tests found wrong, or of rows for which they did, gets no row. arch is None where nothing was
    tuned. Raises ValueError where rows are of several architectures.
    """
    timed = [(row["arch"], one) for row in rows for one in row.get("timed", ())]
    archs = {arch for arch, _ in timed}
    if len(archs) > 1:
        raise ValueError(f"rows of one architecture are expected, got {sorted(archs)}")
    groups: dict[tuple[Any, ...], dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
    refused: list[str] = []
    for _, one in timed:
        shape, dtype = one["shape"], "f32" if one["shape"]["bits"] == 32 else "bf16"
        why = wrong("lora_linear", "triton", KERNELS[one["kernel"]], dtype, shape["M"])
        if why is not None:
            refused.append(f"{one['kernel']}, up to {shape['M']} rows: {why}")
            continue
        key = (one["kernel"], shape["bits"], shape["plain"], shape["blocksize"], shape["r"])
        groups[key][shape["M"]].append(one["times"])
    kernels: dict[str, list[Row]] = defaultdict(list)
    for (kernel, *facts), by_m in sorted(groups.items()):
        kernels[kernel] += table_rows(facts, {m: best(by_m[m]) for m in sorted(by_m)})
    limits, whys = panels(rows, wrong)
    return {"arch": next(iter(archs), None), "kernels": dict(kernels), "panels": limits,
            "refused": list(dict.fromkeys(refused + whys))}  # fmt: skip


def best(shapes: Sequence[Sequence[dict[str, Any]]]) -> tuple[tuple[str, Any], ...]:
    """The configuration with the least geometric mean of its times over today's, of those timed for every shape;
    today's where none is faster by `MARGIN`. shapes: of each its [{"seconds", "config"}], today's first."""
    every = [{_key(one["config"]): one["seconds"] / times[0]["seconds"] for one in times} for times in shapes]
    common = [c for c in every[0] if all(c in one for one in every)]
    today = _key(shapes[0][0]["config"])
    means = {c: math.exp(sum(math.log(one[c]) for one in every) / len(every)) for c in common}
    fastest = min(means, key=lambda c: means[c])
    return today if today in means and means[today] <= means[fastest] * (1 + MARGIN) else fastest


def _key(config: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, config[name]) for name in DEFAULTS if name != "source")


def table_rows(facts: Sequence[Any], by_m: dict[int, tuple[tuple[str, Any], ...]]) -> list[Row]:
    """Rows of a table in order, neighbours of one configuration as one. facts: bits, plain, blocksize, r measured."""
    bits, plain, blocksize, r = facts
    found: list[Row] = []
    last = None
    for m, config in by_m.items():
        limits: Row = {"bits": bits, **({} if plain else {"plain": False}), "max_M": m, "max_r": r,
                       "min_blocksize": blocksize}  # fmt: skip
        values = {k: v for k, v in config if k == "BM" or v != DEFAULTS[k]}
        if config == last:
            found.pop()
        found.append({**limits, **values, "source": "measured"})
        last = config
    return found


def panels(rows: Sequence[Row], wrong: Wrong = nothing_is_wrong) -> tuple[dict[str, int], list[str]]:
    """(from_M and from_M_dense as the forced pairs have them, why one is not known).

    From the least number of rows where, summed over all shapes and directions measured there, the vendor's product over
    panels is faster, and stays so; one past the largest where it never is."""
    found: dict[str, int] = {}
    refused: list[str] = []
    for name, weight in (("from_M", "nf4"), ("from_M_dense", "dense")):
        groups: dict[tuple[str, str], dict[int, tuple[float, float]]] = defaultdict(dict)
        for row in rows:
            if row.get("op") != "lora_linear" or row.get("weight") != weight or row.get("dtype") == "f32":
                continue
            both = next((p for b in ("triton", "native") if (p := pair(row, f"{b} panels", f"{b} fused"))), None)
            if both is not None:
                why = wrong("lora_linear", "triton", row["direction"], row["dtype"], row["m"])
                if why is not None:
                    refused.append(f"{name}, {row['direction']} of {row['m']} rows: {why}")
                    continue
                groups[row["direction"], row["shape"]][row["m"]] = both
        everywhere = set.intersection(*(set(g) for g in groups.values())) if groups else set()
        if not everywhere:
            refused.append(f"{name}: no row has both ways for every shape and direction")
            continue
        sums = {m: (sum(g[m][0] for g in groups.values()), sum(g[m][1] for g in groups.values())) for m in everywhere}
        found[name] = crossing(sums) or max(sums) + 1
    return found, list(dict.fromkeys(refused))
