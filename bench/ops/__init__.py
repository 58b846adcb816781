"""One file per op: its rows, each with our backends, the eager reference, and what a user would otherwise run."""

from __future__ import annotations

from typing import Any

from peft_kernels.dispatch import Op


def default_backends(device: str) -> list[str]:
    """What a bench compares where nothing is named."""
    return ["native", "reference"] if device == "cpu" else ["cuda", "triton", "reference"]


def reason(op: Op, backend: str, args: tuple[Any, ...]) -> str | None:
    """Why `backend` cannot serve `args`, or None. A refused backend is named in the results, never replaced."""
    loaded = op.load(backend)
    if isinstance(loaded, str):
        return loaded
    return None if backend == "reference" else loaded.reason(args, forced=True)
