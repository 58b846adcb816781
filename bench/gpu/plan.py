"""The parts of a run, in their order, and how much of its time each may take."""

from __future__ import annotations

from pathlib import Path

MINUTES = 45.0  # of a whole run, unless `--budget` says otherwise
# part -> its weight: a part may take that share of the run. What judges the kernels comes first, what sets the tables
# next, what explains them last.
PLAN: dict[str, float] = {
    "build": 300,
    "provenance": 60,
    "ceilings": 60,
    "tests": 420,
    "sanitizer": 420,
    "lora_linear": 300,
    "panels": 120,
    "decode": 90,
    "dora_linear": 90,
    "multi_lora_linear": 120,
    "lora_mixture": 120,
    "lora_linear_stacked": 90,
    "rotations": 60,
    "gated": 40,
    "rms_norm": 40,
    "llama": 150,
    "qlora": 120,
    "tune": 180,
    "ncu": 150,
    "others": 60,
    "tables": 20,
    "after": 20,
    "example": 1,
}
AGAIN = {"tables"}  # parts that are done anew in each call: what they say depends on the rows of others


def share_s(part: str, minutes: float) -> float:
    """Seconds that a part may take of a run of so many minutes."""
    return 60 * minutes * PLAN[part] / sum(PLAN.values())


def parts(folder: Path = Path(__file__).parent / "parts") -> list[str]:
    """The parts that there are, in the plan's order."""
    return [part for part in PLAN if (folder / f"{part}.py").exists()]
