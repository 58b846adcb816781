"""The softmax by slices, by the native CPU library."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..checks import PLAIN, check_memory, in_memory
from ..dispatch import dispatch_observed

STATE = torch.float32
_SCORES, _TARGETS = frozenset((torch.float32, torch.bfloat16, torch.float16)), frozenset((torch.int64,))


def reason(scores: Tensor) -> str | None:
    """Why the library cannot add such scores; None where it can."""
    if scores.dtype not in _SCORES or not scores.is_cpu:
        return f"takes float32, bfloat16 and float16 of a CPU, not {scores.dtype} on {scores.device}"
    if dispatch_observed() or type(scores) not in PLAIN or not in_memory(scores):
        return "takes tensors in memory, as no graph that is traced has them"
    return native.available()


def add(state: Tensor, scores: Tensor, targets: Tensor, start: int, scale: float) -> Tensor:
    rows = targets.shape[0] if targets.dim() == 1 else -1
    if scores.dim() != 2 or scores.shape[0] != rows or not scores.shape[1] or state.shape != (3, rows):
        raise ValueError(f"softmax_slice.add: a state [3, rows], scores [rows, n] and targets [rows] expected, got "
                         f"{list(state.shape)}, {list(scores.shape)} and {list(targets.shape)}")  # fmt: skip
    for name, t, dtypes in (("state", state, {STATE}), ("scores", scores, _SCORES), ("targets", targets, _TARGETS)):
        if t.dtype not in dtypes or not t.is_cpu or t.layout is not torch.strided or not t.is_contiguous():
            raise ValueError(f"softmax_slice.add: {name} contiguous on a CPU expected, state float32, scores of a "
                             f"floating-point dtype and targets int64, got {t.dtype} on {t.device}")  # fmt: skip
        check_memory("softmax_slice.add", **{name: t})
    rescale = torch.empty(rows, dtype=STATE)
    native.check(native.cpu().pk_cpu_softmax_slice(
        scores.data_ptr(), native.DTYPES[scores.dtype], rows, scores.shape[1], targets.data_ptr(), start, scale,
        state.data_ptr(), scores.data_ptr(), state.data_ptr(), rescale.data_ptr(), torch.get_num_threads(),
    ))  # fmt: skip
    torch.autograd.graph.increment_version((state, scores))
    return rescale
