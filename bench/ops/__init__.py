"""One file per op: its rows, each with our backends, the eager reference, and what a user would otherwise run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft_kernels import use_backend
from peft_kernels.dispatch import Op

from ..measure import Candidate


def default_backends(device: str) -> list[str]:
    """The comparison where nothing is named."""
    return ["native", "reference"] if device == "cpu" else ["cuda", "triton", "reference"]


def reason(op: Op, backend: str, args: tuple[Any, ...]) -> str | None:
    """Why `backend` cannot serve `args`, or None. A refused backend is named in the results, never replaced."""
    loaded = op.load(backend)
    if isinstance(loaded, str):
        return loaded
    return None if backend == "reference" else loaded.reason(args, forced=True)


def on_backends(
    op: Op, backends: Sequence[str], args: tuple[Any, ...], call: Callable[[], object]
) -> tuple[list[Candidate], dict[str, str]]:
    """(`call` with each backend that serves `args` forced, why each of the others does not)."""
    candidates: list[Candidate] = []
    refused = {b: why for b in backends if (why := reason(op, b, args)) is not None}
    for backend in backends:

        def forced(backend: str = backend) -> object:
            with use_backend(backend):
                return call()

        if backend not in refused:
            candidates.append(Candidate(backend, [forced]))
    return candidates, refused
