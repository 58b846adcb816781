"""The README's picture from a run of the quickstart: `fastpeft quickstart --json > run.json`, then
`python tools/quickstart_picture.py run.json docs/img/quickstart.png`.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

INK, MUTED, GRID, LOSS, HELD_OUT = "#1f2328", "#6e7781", "#d8dee4", "#9db7d5", "#c2410c"
COLUMNS = ((0.00, 30, "asked"), (0.285, 42, "before"), (0.65, 42, "after"))


def draw(summary: dict[str, Any], metrics: list[dict[str, Any]], target: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "text.parse_math": False})
    figure = plt.figure(figsize=(10, 7.4), dpi=130)
    before, after = summary["held_out_before"], summary["held_out_after"]
    figure.suptitle(
        f"SmolLM2-135M in 4 bit, LoRA r=16, {summary['steps']} steps: held-out loss "
        f"{before:.2f} to {after:.2f} ({summary['held_out_change_percent']:+.0f} %)",
        x=0.03, y=0.975, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    axes = figure.add_axes((0.07, 0.69, 0.90, 0.225))
    steps = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    held = [(m["step"], m["held_out_loss"]) for m in metrics if m.get("held_out_loss") is not None]
    axes.plot(*zip(*steps, strict=True), color=LOSS, linewidth=1.2, label="training loss")
    axes.plot(*zip(*held, strict=True), color=HELD_OUT, marker="o", markersize=4, linewidth=1.6, label="held-out loss")
    axes.set_xlabel("step", color=MUTED)
    axes.grid(color=GRID, linewidth=0.6)
    axes.tick_params(colors=MUTED, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.legend(frameon=False, loc="upper right")

    table = figure.add_axes((0.03, 0.02, 0.95, 0.57))
    table.axis("off")
    table.set_xlim(0, 1)
    table.set_ylim(0, 1)
    for x, _, title in COLUMNS:
        table.text(x, 1.0, title, va="top", fontweight="bold", color=MUTED)
    y = 0.945
    row = 0.9 / len(summary["answers"])
    for answer in summary["answers"]:
        table.plot([0, 1], [y + 0.005, y + 0.005], color=GRID, linewidth=0.8)
        asked = re.search(r"`([^`]+)`", answer["prompt"])
        texts = (asked.group(1) if asked else answer["prompt"], answer["before"], answer["after"])
        for (x, width, title), text in zip(COLUMNS, texts, strict=True):
            lines = textwrap.wrap(" ".join(text.split()), width, max_lines=4, placeholder=" …")
            style = {"family": "DejaVu Sans Mono", "fontsize": 8} if title == "asked" else {"fontsize": 8.5}
            color = MUTED if title == "before" else INK
            table.text(x, y - 0.012, "\n".join(lines), va="top", color=color, linespacing=1.25, **style)
        y -= row
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    summary = json.loads(source.read_text(encoding="utf-8"))
    metrics = (Path(summary["output"]) / "metrics.jsonl").read_text(encoding="utf-8")
    draw(summary, [json.loads(line) for line in metrics.splitlines()], target)


if __name__ == "__main__":
    main()
