"""The native CPU backend of multi_lora_linear: lora_linear's kernels, which group the rows by adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from ..lora_linear.native import available, pack, refusal
from . import check_values


def _when_forward(x: Tensor, *args: Any) -> str | None:
    return refusal(*args[:6], args[9], args[10], args[16])


def _when_backward(dy: Tensor, x: Tensor, *args: Any) -> str | None:
    return refusal(*args[:6], args[8], args[9], None)


def _check(code: int, op: str, a: Tensor, plan: tuple[Any, ...], disjoint: bool) -> None:
    if code:  # the library has looked at the values; what it objects to is said in the words of the op
        adapters, starts, ranks, _, max_rank = plan
        check_values(op, a.shape[0], adapters, starts, ranks, max_rank, disjoint)
        native.check(code)


def forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int, a: Tensor,
    b: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int, bias: Tensor | None,
    dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [M, N], s [M, max_rank])."""
    x, a, b, m = x.contiguous(), a.contiguous(), b.contiguous(), x.shape[0]
    absmax, bias = (None if t is None else t.contiguous() for t in (absmax, bias))
    plan = (*(t.contiguous() for t in (adapters, starts, ranks, scaling)), max_rank)
    y, s = x.new_empty((m, out_features)), x.new_empty((m, max_rank), dtype=torch.float32)
    packed = pack(torch.get_num_threads(), x, weight.contiguous(), absmax, nested_absmax, nested_code, offset,
                  quant_type, blocksize, nested_blocksize, out_features, a, b, 1.0, bias, dropout_p, seed, y=y, s=s,
                  plan=plan)  # fmt: skip
    _check(native.cpu().pk_cpu_lora_linear(packed, 1), "multi_lora_linear", a, plan, False)
    return y, s


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, s: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    dropout_p: float, seed: Tensor | None, need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [M, K], da [P, K], db [P, N]); empty where not needed."""
    dx = x.new_empty(x.shape if need_dx else (0,))
    da, db = (t.new_empty(t.shape if need_ab else (0,)) for t in (a, b))
    if not x.shape[0]:
        return dx, da.zero_(), db.zero_()
    dy, x, a, b, s = (t.contiguous() for t in (dy, x, a, b, s))
    plan = (*(t.contiguous() for t in (adapters, starts, ranks, scaling)), max_rank)
    packed = pack(torch.get_num_threads(), x, weight.contiguous(), None if absmax is None else absmax.contiguous(),
                  nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, dy.shape[1], a, b, 1.0,
                  None, dropout_p, seed, s=s, dy=dy, dx=dx if need_dx else None, da=da if need_ab else None,
                  db=db if need_ab else None, plan=plan)  # fmt: skip
    _check(native.cpu().pk_cpu_lora_linear_backward(packed, 1), "multi_lora_linear_backward", a, plan, need_ab)
    return dx, da, db


_CPU = frozenset({"cpu"})
BACKENDS: dict[str, Backend] = {
    "multi_lora_linear": Backend("native", forward, _CPU, available=available, when=_when_forward),
    "multi_lora_linear_backward": Backend("native", backward, _CPU, available=available, when=_when_backward),
}
