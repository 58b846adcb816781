"""The loss curve as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .metrics import read_metrics

_TRAIN, _HELD_OUT, _RATE, _INK = "#4c72b0", "#c44e52", "#9a9a9a", "#333333"


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
    """Draw training and held-out loss over the steps, with the learning rate below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    train = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "held_out_loss" in line]
    figure = Figure(figsize=(8, 5.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    steps = [line["step"] for line in train]
    losses = [line["loss"] for line in train]
    top.plot(steps, losses, color=_TRAIN, alpha=0.28, linewidth=1)
    top.plot(steps, smooth(losses), color=_TRAIN, linewidth=2, label="training (smoothed)")
    if held_out:
        xs, ys = [line["step"] for line in held_out], [line["held_out_loss"] for line in held_out]
        top.plot(xs, ys, color=_HELD_OUT, linewidth=1.4, linestyle="--", marker="o", markersize=6, label="held out")
        box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
        for i, (dx, dy, side) in {0: (12, 7, "left"), len(xs) - 1: (0, -17, "right")}.items():
            top.annotate(
                f"{ys[i]:.2f}", (xs[i], ys[i]), xytext=(dx, dy), textcoords="offset points", ha=side, color=_HELD_OUT,
                fontweight="bold", bbox=box, zorder=5,
            )  # fmt: skip
        if len(ys) > 1 and ys[0] > 0:
            title += f": held-out loss {ys[0]:.2f} → {ys[-1]:.2f} ({100 * (ys[-1] / ys[0] - 1):+.0f} %)"
    top.set_title(title, loc="left", color=_INK, fontsize=12)
    top.set_ylabel("loss per learned token")
    top.legend(frameon=False, loc="upper right")
    bottom.plot(steps, [line["lr"] for line in train], color=_RATE, linewidth=1.5)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (top, bottom):
        _plain(axes)
    temporary = picture.with_name(picture.name + ".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(picture)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.tick_params(colors=_INK)
    axes.margins(x=0.02, y=0.1)
