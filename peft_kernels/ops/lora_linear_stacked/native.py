"""The native CPU backend of lora_linear_stacked: one call, an array of the structs that lora_linear packs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from ...native import pointer
from ..lora_linear import native as single
from . import each

_MOST = 16  # PK_LORA_MOST of csrc/pk_abi.h


def _when(x: Tensor, lists: Sequence[Sequence[Any]]) -> str | None:
    if len(lists[0]) > _MOST:
        return f"does not serve more than {_MOST} projections at once"
    for values in each(lists):
        why = single.refusal(*values)
        if why is not None:
            return why
    return None


def _when_forward(x: Tensor, *lists: list[Any]) -> str | None:
    return _when(x, (lists[0], lists[5], *lists[9:11], lists[12]))


def _when_backward(x: Tensor, dy: list[Tensor], *args: Any) -> str | None:
    *lists, _, _ = args
    return _when(x, (lists[0], lists[5], *lists[8:10], [None] * len(dy)))


def forward(x: Tensor, *lists: list[Any]) -> list[Tensor]:
    """Every y [M, N_i], then every s [M, r_i]; s is empty without an adapter."""
    x = x.contiguous()
    threads = torch.get_num_threads()
    kept: list[Any] = []  # tensors that must live until the call returns
    packed, ys, ss = [], [], []
    for values in each(lists):
        own, y, s = single.forward_arguments(x, *values)
        kept.append(own)
        packed.append(single.pack(threads, x, *own, y=y, s=s))
        ys.append(y)
        ss.append(s)
    native.check(native.cpu().pk_cpu_lora_linear(b"".join(packed), len(packed)))
    return ys + ss


def backward(x: Tensor, *args: Any) -> list[Tensor]:
    """dx [M, K], every da [r_i, K], every db [N_i, r_i]; empty where not needed."""
    *lists, need_dx, need_ab = args
    x = x.contiguous()
    dx = x.new_empty(x.shape if need_dx else (0,))
    threads = torch.get_num_threads()
    kept: list[Any] = []
    packed, das, dbs = [], [], []
    for values, ab in zip(each(lists), need_ab, strict=True):
        own, dy, s, da, db = single.backward_arguments(*values, ab)
        kept.append((own, dy, s))
        packed.append(single.pack(threads, x, *own, s=s, dy=dy, dx=dx if need_dx else None,
                                  da=da if ab else None, db=db if ab else None))  # fmt: skip
        das.append(da)
        dbs.append(db)
    native.check(native.cpu().pk_cpu_lora_linear_backward(b"".join(packed), len(packed)))
    return [dx, *das, *dbs]


# ---- prepared calls: `lora_linear.native.fields` of each projection in the place of its tensors ---------------------
def infer(packed: Sequence[tuple[bytes, ...]], x: Tensor, sizes: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
    """`step` without s and seeds."""
    m = x.shape[0]
    ys = [x.new_empty((m, n)) for n, _ in sizes]
    s = x.new_empty((m * sum([r for _, r in sizes]),), dtype=torch.float32)
    at, args = s.data_ptr(), []
    for own, y, (_, r) in zip(packed, ys, sizes, strict=True):
        args.append(single.put(own, x, None, m, y.data_ptr(), at))
        at += 4 * m * r
    code = native.cpu().pk_cpu_lora_linear(b"".join(args), len(packed))
    if code:
        native.check(code)
    return ys


def step(
    packed: Sequence[tuple[bytes, ...]], x: Tensor, sizes: Sequence[tuple[int, int]], seeds: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """(every y [M, N_i], every s [M, r_i]); x [M, K] contiguous."""
    m = x.shape[0]
    ys = [x.new_empty((m, n)) for n, _ in sizes]
    ss = [x.new_empty((m, r), dtype=torch.float32) for _, r in sizes]
    each_one = zip(packed, ys, ss, seeds, strict=True)
    args = b"".join([single.put(own, x, seed, m, y.data_ptr(), s.data_ptr()) for own, y, s, seed in each_one])
    code = native.cpu().pk_cpu_lora_linear(args, len(packed))
    if code:
        native.check(code)
    return ys, ss


def step_backward(
    packed: Sequence[tuple[bytes, ...]], dys: Sequence[Tensor], x: Tensor, ss: Sequence[Tensor],
    seeds: Sequence[Tensor | None], factors: Sequence[Tensor], need_dx: bool, need_ab: Sequence[tuple[bool, bool]],
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """(dx [M, K], da and db of each projection with an adapter); None where not needed.

    factors: a and b of each projection with an adapter, in order; need_ab: of every projection.
    """
    m = x.shape[0]
    dx = torch.empty_like(x) if need_dx else None
    pairs = iter(factors)
    args, kept, grads = [], [], []
    for own, dy, s, seed, (need_a, need_b) in zip(packed, dys, ss, seeds, need_ab, strict=True):
        dy, da, db = dy.contiguous(), None, None
        if s.shape[1]:
            a, b = next(pairs), next(pairs)
            if need_a or need_b:
                da, db = torch.empty_like(a), torch.empty_like(b)
            grads += [da if need_a else None, db if need_b else None]
        kept.append((dy, da, db))
        args.append(single.put(own, x, seed, m, 0, s.data_ptr(), dy.data_ptr(), pointer(dx), pointer(da), pointer(db)))
    code = native.cpu().pk_cpu_lora_linear_backward(b"".join(args), len(packed))
    if code:
        native.check(code)
    return dx, grads


BACKENDS: dict[str, Backend] = {
    "lora_linear_stacked": single.backend(forward, _when_forward),
    "lora_linear_stacked_backward": single.backend(backward, _when_backward),
}
