"""The CUDA backend of lora_linear_stacked: few rows of x on 4-bit weights, in two launches for all projections.

One launch makes every s, another every y (`csrc/cuda/lora_stack.cuh`); weights of another quantisation than the first's
have a launch of their own. The forward alone: the backward, and whatever is refused here, is Triton's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...cuda_rt import backend
from ..lora_linear import cuda as single
from . import each

ROWS = 64  # PK_STACK_ROWS of csrc/cuda/lora.cuh
MOST = 4  # PK_CUDA_STACK of csrc/pk_abi.h: projections


def _when(x: Tensor, *lists: list[Any]) -> str | None:
    if len(lists[0]) > MOST:
        return f"does not serve more than {MOST} projections at once"
    why = single.refuse_rows(ROWS, x)
    for i, values in enumerate(each(lists)):
        weight = (*values[:8], x.shape[1], *values[9:11], values[12])
        if why is None and (why := single.refuse_weight(*weight)) is not None:
            why = f"{why} (projection {i})"
    return why


def forward(x: Tensor, *lists: list[Any]) -> list[Tensor]:
    """Every y [M, N_i], then every s [M, r_i]; s is empty without an adapter."""
    x = x.contiguous()
    calls, kept, ys, ss = [], [], [], []  # kept: tensors that must live until the call returns
    for *values, seed in each(lists):
        own, y, s = single.forward_arguments(x, *values, single.seed_beside(seed, x))
        calls.append((single.pack(0, x, *own, y=y, s=s), own[5]))
        kept.append(own)
        ys.append(y)
        ss.append(s)
    single.queue_stack(calls, x, [own[0] for own in kept])
    return ys + ss


BACKENDS = {"lora_linear_stacked": backend(forward, dtypes=single.DTYPES, when=_when)}
