"""The softmax of scores that are never all there, slice by slice, on a CPU: a native call in place of ten of torch's.

As in flash attention, a running maximum and a running sum turn slices of a row's scores into the exact softmax.
"""

from __future__ import annotations

from torch import Tensor

from . import native

__all__ = ["add", "begin", "reason"]


def reason(scores: Tensor) -> str | None:
    """Why scores of this dtype on this device cannot be added here; None where they can."""
    return native.reason(scores)


def begin(targets: Tensor) -> Tensor:
    """State of rows before their first slice, [3, rows] float32: each row's largest score m, the sum of its exp(score -
    m), and its target's score. targets: [rows] int64, columns of the whole rows."""
    state = targets.new_zeros((3, *targets.shape), dtype=native.STATE)
    state[0].fill_(float("-inf"))
    return state


def add(state: Tensor, scores: Tensor, targets: Tensor, start: int, scale: float = 1.0) -> Tensor:
    """Add the columns from `start` on to a state of `begin`, in place.

    scores: [rows, n] float32, bfloat16 or float16, contiguous; they become exp(scale * score - m), and 0 at the target.
    Returns [rows] float32: what sums over earlier slices' scores have to be multiplied by. Raises ValueError on other
    tensors.
    """
    return native.add(state, scores, targets, start, scale)
