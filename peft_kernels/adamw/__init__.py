"""AdamW (arXiv 1711.05101) over many float32 tensors of a CPU: a native call on all threads, in one pass over memory.

An adapter is hundreds of small tensors, each below what torch gives a second thread to, and its fused update takes them
one after another. The gradients are multiplied by a factor on their way, so that clipping is not a pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from . import native
from .native import Kept

__all__ = ["Kept", "norm", "reason", "update"]

State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def reason(parameters: Sequence[Tensor]) -> str | None:
    """Why these parameters cannot be updated here; None where they can."""
    return native.reason(parameters)


def norm(gradients: Sequence[Tensor], kept: Kept | None = None) -> float:
    """The Euclidean norm over all of them, summed in the same order whatever the threads. float32 CPU tensors. kept: of
    the update that takes them next."""
    return math.sqrt((kept or Kept()).squared_norm(gradients))


def update(
    tensors: Sequence[State], lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    scale: float = 1.0, kept: Kept | None = None,
) -> None:  # fmt: skip
    """A step in place for each (parameter, gradient, exp_avg, exp_avg_sq, step) of a list; step, a float32 number,
    becomes one more, and `scale` multiplies the gradient, which stays as it is.

    All of them are float32 on a CPU and, but for the gradient, contiguous: what is not is a ValueError. kept: what the
    last update of the same tensors found, so that they need not be looked at in full.
    """
    if tensors:
        p, g, m, v, step = zip(*tensors, strict=True)
        (kept or Kept()).update(p, g, m, v, step, (lr, *betas, eps, weight_decay, scale))
