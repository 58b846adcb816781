"""The loss curve as a picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from ... import atomic_file
from .metrics import read_metrics

_TRAIN, _HELD_OUT, _RATE, INK = "#4c72b0", "#c44e52", "#9a9a9a", "#333333"
_MANY = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#64b5cd")


def smooth(values: list[float]) -> list[float]:
    """Running mean with forgetting, corrected for its start; it looks back over about a tenth of the curve."""
    share = 1 - 1 / max(2.0, min(50.0, len(values) / 10))
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = share * mean + (1 - share) * value
        weight = share * weight + (1 - share)
        result.append(mean / weight)
    return result


def plot_losses(metrics: Path, picture: Path, title: str = "Training loss") -> None:
    """Draw training and held-out loss over the steps, with the learning rate below; of several adapters, in colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs: dict[str, list[dict[str, Any]]] = {}
    for line in read_metrics(metrics):
        runs.setdefault(line.get("adapter", ""), []).append(line)
    figure = Figure(figsize=(8, 5.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    if set(runs) <= {""}:
        lines = runs.get("", [])
        points = _draw(top, bottom, "training (smoothed)", "held out", lines, (_TRAIN, _HELD_OUT, _RATE))
        _annotate(top, points)
        if len(points) > 1 and points[0][1] > 0:
            before, after = points[0][1], points[-1][1]
            title += f": held-out loss {before:.2f} → {after:.2f} ({100 * (after / before - 1):+.0f} %)"
    else:
        title += " (smoothed; dashed: held out)"
        for (name, lines), colour in zip(runs.items(), itertools.cycle(_MANY)):
            held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
            label = f"{name}: {held_out[0]:.2f} → {held_out[-1]:.2f}" if held_out else name
            _draw(top, bottom, label, None, lines, (colour, colour, colour))
    top.set_title(title, loc="left", color=INK, fontsize=12)
    top.set_ylabel("loss per learned token")
    top.legend(frameon=False, loc="upper right")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (top, bottom):
        plain_axes(axes)
    save_picture(figure, picture)


def save_picture(figure: Any, picture: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, format="png")


def _draw(
    top: Any, bottom: Any, training: str, held_out: str | None, lines: list[dict[str, Any]], colours: tuple[str, ...]
) -> list[tuple[int, float]]:
    """One adapter's curves under these labels; its held-out losses as (step, loss)."""
    train = [line for line in lines if "loss" in line]
    losses = [line["loss"] for line in train]
    steps = [line["step"] for line in train]
    top.plot(steps, losses, color=colours[0], alpha=0.28, linewidth=1)
    top.plot(steps, smooth(losses), color=colours[0], linewidth=2, label=training)
    bottom.plot(steps, [line["lr"] for line in train], color=colours[2], linewidth=1.5)
    points = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    if points:
        top.plot(*zip(*points, strict=True), color=colours[1], linewidth=1.4, linestyle="--", marker="o", markersize=6,
                 label=held_out)  # fmt: skip
    return points


def _annotate(top: Any, points: list[tuple[int, float]]) -> None:
    """Write the first and the last held-out loss beside the curve."""
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
    for i, (dx, dy, side) in {0: (12, 7, "left"), len(points) - 1: (0, -17, "right")}.items() if points else ():
        top.annotate(
            f"{points[i][1]:.2f}", points[i], xytext=(dx, dy), textcoords="offset points", ha=side, color=_HELD_OUT,
            fontweight="bold", bbox=box, zorder=5,
        )  # fmt: skip


def plain_axes(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.tick_params(colors=INK)
    axes.margins(x=0.02, y=0.1)
