"""lora_shrink and lora_expand: the two halves of a LoRA update that is added to a y which something else computed.

    low[i][m] = scale * x[m] A_i[j]^T                 lora_shrink     with j = the adapter of row m, -1: none
    y[m, columns of slice i] += low[i][m] B_i[j]^T    lora_expand

A slice is a projection of x with columns of y of its own, as q, k and v of a layer. Each half is one launch for all
slices of a layer on a GPU. Names and shapes are those of Punica (arXiv 2310.18547) and vLLM, whose stacks hold an
adapter in every slot: A_i [S, r, K] and B_i [S, N_i, r], zero beyond an adapter's rank. `RowGroups` says which row has
which adapter; it is made once for all layers of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import arg_error, check_floating, check_memory
from ...dispatch import Op
from ...row_groups import RowGroups
from ..lora_linear import acc_dtype
from ..multi_lora_linear import MAX_RANK

_GROUPS = "Tensor adapters, Tensor order, Tensor bounds"
STEP = 128  # a part of a sum over K has a multiple of so many columns
_PARTS = 16  # at most: the other half adds them up in every tile
_PROGRAMS = 128  # side by side are enough to read A at the memory's pace


def _check_groups(op: str, m: int, slots: int, adapters: Tensor, order: Tensor, bounds: Tensor) -> None:
    for name, t, dtype in (("adapters", adapters, torch.int64), ("order", order, torch.int32),
                           ("bounds", bounds, torch.int32)):  # fmt: skip
        if t.dtype is not dtype:
            raise arg_error(op, name, f"{dtype}", t.dtype, TypeError)
    if tuple(adapters.shape) != (m,):
        raise arg_error(op, "adapters", f"[{m}], one index per row of x", tuple(adapters.shape))
    if order.dim() != 1 or order.shape[0] < m:
        raise arg_error(op, "order", f"of at least {m} rows, of `RowGroups`", tuple(order.shape))
    if tuple(bounds.shape) != (slots + 2,):
        raise arg_error(op, "bounds", f"[{slots + 2}], of `RowGroups` of {slots} slots", tuple(bounds.shape))


def check_rows(op: str, adapters: Tensor, slots: int) -> None:
    """Raise ValueError on an index that is not there; on a GPU, where looking would wait for it, it is no adapter."""
    wrong = adapters[(adapters < -1) | (adapters >= slots)]
    if wrong.numel():
        raise arg_error(op, "adapters", f"-1 (none) or an index below {slots}", int(wrong[0]))


def _check_shrink(
    x: Tensor, a: Sequence[Tensor], adapters: Tensor, order: Tensor, bounds: Tensor, scale: float, parts: int
) -> None:
    op = "lora_shrink"
    check_floating(op, x=x)
    if x.dim() != 2:
        raise arg_error(op, "x", "[M, K]", tuple(x.shape))
    if not a:
        raise arg_error(op, "a", "at least one slice", "none")
    for i, t in enumerate(a):
        check_floating(op, **{f"a[{i}]": t})
        if t.dim() != 3 or t.shape[2] != x.shape[1]:
            raise arg_error(op, f"a[{i}]", f"[S, r, {x.shape[1]}]", tuple(t.shape))
        if t.shape != a[0].shape or t.dtype != a[0].dtype:
            raise arg_error(op, f"a[{i}]", f"{a[0].dtype} {tuple(a[0].shape)} like a[0]", (t.dtype, tuple(t.shape)))
    if a[0].shape[1] > MAX_RANK * 16:
        raise arg_error(op, "a", f"of at most {MAX_RANK * 16} rows each", a[0].shape[1])
    if not 1 <= parts <= max(1, -(-x.shape[1] // STEP)):
        raise arg_error(op, "parts", f"between 1 and the {STEP}s of K", parts)
    _check_groups(op, x.shape[0], a[0].shape[0], adapters, order, bounds)


def part_steps(k: int, parts: int) -> int:
    """Columns of x that a part of the sum has, but the last."""
    return -(-k // (parts * STEP)) * STEP


def _fake_shrink(
    x: Tensor, a: Sequence[Tensor], adapters: Tensor, order: Tensor, bounds: Tensor, scale: float, parts: int
) -> Tensor:
    return x.new_empty((len(a), parts, x.shape[0], a[0].shape[1]), dtype=acc_dtype(x.dtype))


def shrink_reference(
    x: Tensor, a: Sequence[Tensor], adapters: Tensor, order: Tensor, bounds: Tensor, scale: float, parts: int
) -> Tensor:
    """[slices, parts, M, r], zero in rows without an adapter."""
    acc, slots = acc_dtype(x.dtype), a[0].shape[0]
    if x.device.type == "cpu":
        check_rows("lora_shrink", adapters, slots)
    out, step = x.new_zeros((len(a), parts, x.shape[0], a[0].shape[1]), dtype=acc), part_steps(x.shape[1], parts)
    for j in adapters.unique().tolist():
        if not 0 <= j < slots:
            continue
        rows = (adapters == j).nonzero()[:, 0]
        for i, t in enumerate(a):
            for p in range(parts):
                of = slice(p * step, (p + 1) * step)
                out[i, p, rows] = scale * (x[rows, of].to(acc) @ t[j, :, of].to(acc).t())
    return out


shrink_op = Op(
    name="lora_shrink",
    schema=f"(Tensor x, Tensor[] a, {_GROUPS}, float scale, int parts) -> Tensor",
    check=_check_shrink,
    fake=_fake_shrink,
    reference=shrink_reference,
    folder=__name__,
    sizes="x[M,K] a[S,R,K] adapters[M] order[M] bounds[S]",
    flops=lambda x, a, *_: 2 * x.shape[0] * x.shape[1] * len(a) * a[0].shape[1],
)


def _check_expand(
    y: Tensor, low: Sequence[Tensor], b: Sequence[Tensor], adapters: Tensor, order: Tensor, bounds: Tensor,
    offsets: Sequence[int], add: bool,
) -> None:  # fmt: skip
    op = "lora_expand"
    check_floating(op, y=y)
    if y.dim() != 2:
        raise arg_error(op, "y", "[M, N]", tuple(y.shape))
    if any(n > 1 and not stride for n, stride in zip(y.shape, y.stride(), strict=True)):
        raise arg_error(op, "y", "written to, so each element is its own", f"strides {y.stride()}")
    if not len(low) == len(b) == len(offsets) or not b:
        raise arg_error(op, "low, b and offsets", "of as many slices, at least one", (len(low), len(b), len(offsets)))
    m, slots = y.shape[0], b[0].shape[0]
    for i, (part, t, offset) in enumerate(zip(low, b, offsets, strict=True)):
        check_floating(op, **{f"low[{i}]": part, f"b[{i}]": t})
        if t.dim() != 3 or t.shape[0] != slots or t.shape[2] != b[0].shape[2] or t.dtype != b[0].dtype:
            raise arg_error(op, f"b[{i}]", f"{b[0].dtype} [{slots}, N, {b[0].shape[-1]}] like b[0]",
                            (t.dtype, tuple(t.shape)))  # fmt: skip
        alike = part.shape == low[0].shape and part.dtype == low[0].dtype
        if part.dim() != 3 or part.shape[1:] != (m, t.shape[2]) or not alike:
            raise arg_error(op, f"low[{i}]", f"{low[0].dtype} [parts, {m}, {t.shape[2]}] like low[0]",
                            (part.dtype, tuple(part.shape)))  # fmt: skip
        if not 0 <= offset <= y.shape[1]:
            raise arg_error(op, f"offsets[{i}]", f"a column of y's {y.shape[1]}", offset)
    _check_groups(op, m, slots, adapters, order, bounds)


def expand_reference(
    y: Tensor, low: Sequence[Tensor], b: Sequence[Tensor], adapters: Tensor, order: Tensor, bounds: Tensor,
    offsets: Sequence[int], add: bool,
) -> None:  # fmt: skip
    """y in place; each value is rounded once."""
    acc, slots = torch.promote_types(acc_dtype(y.dtype), acc_dtype(low[0].dtype)), b[0].shape[0]
    if y.device.type == "cpu":
        check_rows("lora_expand", adapters, slots)
    for j in adapters.unique().tolist():
        if not 0 <= j < slots:
            continue
        rows = (adapters == j).nonzero()[:, 0]
        for s, t, offset in zip(low, b, offsets, strict=True):
            columns = y[:, offset : offset + t.shape[1]]
            part = s[:, rows].to(acc).sum(0) @ t[j, : columns.shape[1]].to(acc).t()
            columns[rows] = (columns[rows].to(acc) + part if add else part).to(y.dtype)


expand_op = Op(
    name="lora_expand",
    schema=f"(Tensor(a!) y, Tensor[] low, Tensor[] b, {_GROUPS}, int[] offsets, bool add) -> ()",
    check=_check_expand,
    fake=lambda *_: None,
    reference=expand_reference,
    folder=__name__,
    sizes="y[M,W] low[A,M,R] b[S,N,R] adapters[M] order[M] bounds[S] offsets=O",
    flops=lambda y, low, b, *_: 2 * y.shape[0] * sum(t.shape[1] * t.shape[2] for t in b),
)


def _parts(x: Tensor, a: Tensor, slices: int) -> int:
    """Parts of the sums over K, by the shapes alone: few rows are few tiles, and A is read by more side by side."""
    if x.device.type != "cuda":
        return 1
    slots, r, k = a.shape
    tiles = (x.shape[0] // 16 + min(slots, x.shape[0])) * slices * -(-r // 64)
    return max(1, min(_PARTS, _PROGRAMS // max(1, tiles), k // (2 * STEP)))


def _contiguous(op: str, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    for i, t in enumerate(tensors):
        if not t.is_contiguous():  # it is copied; what is not, the operator looks at
            check_memory(op, **{f"{name}[{i}]": t})
    return [t.contiguous() for t in tensors]


def lora_shrink(x: Tensor, a: Sequence[Tensor], groups: RowGroups, scale: float = 1.0) -> Tensor:
    """scale * x[m] A_i[j]^T for the adapter j of row m: float32 [slices, parts, M, r] (of float64: float64).

    x: [M, K]. a: of each slice [S, r, K], alike, any floating dtype. Rows without an adapter are zero. The sums over K
    may be left in parts, as `lora_expand` takes them: `.sum(1)` is the value. Without gradients. Raises ValueError or
    TypeError on bad arguments.
    """
    (x,), a = _contiguous("lora_shrink", "x", [x]), _contiguous("lora_shrink", "a", a)
    known = len(a) > 0 and a[0].dim() == 3 and x.dim() == 2  # else the operator says what is wrong
    parts = _parts(x, a[0], len(a)) if known else 1
    return shrink_op.op(x, a, *groups.rows(x.shape[0]), float(scale), parts)  # type: ignore[no-any-return]


def lora_expand(
    y: Tensor, low: Sequence[Tensor], b: Sequence[Tensor], groups: RowGroups, offsets: Sequence[int], add: bool = True
) -> None:
    """y[m, offset_i : offset_i + N_i] += low_i[m] B_i[j]^T for the adapter j of row m, in place; without add: =.

    y: [M, N]. low: of each slice [parts, M, r], any floating dtype, summed over its parts: entries of `lora_shrink`'s
    result. b: of each slice [S, N_i, r]. Columns beyond y's are left out. Rows without an adapter stay. A value of y is
    rounded once. Slices that share columns of y are not allowed. Raises ValueError or TypeError on bad arguments.
    """
    low, b = _contiguous("lora_expand", "low", low), _contiguous("lora_expand", "b", b)
    expand_op.op(y, low, b, *groups.rows(y.shape[0]), list(offsets), add)
