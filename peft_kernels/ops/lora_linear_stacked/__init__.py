"""lora_linear_stacked: several `lora_linear`s of one x (q, k and v; gate and up), which is read and converted once.

`y_i = x W_i^T + bias_i + scaling_i * (drop_i(x) A_i^T) B_i^T`. Projections differ freely: dense or 4-bit weights,
sizes, ranks, with an adapter or without; each has its own dropout mask, as PEFT's layers have. The gradient of x is the
sum over the projections, added in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import philox
from ...checks import arg_error, as_autocast, rows_of
from ...dispatch import Op, forward_mode
from ...formats import QuantWeight
from .. import lora_linear as single

_WEIGHTS = (
    "Tensor[] weight, Tensor?[] absmax, Tensor?[] nested_absmax, Tensor?[] nested_code, Tensor?[] offset, "
    "int[] quant_type, int[] blocksize, int[] nested_blocksize"
)
_FIELDS = 15  # of a projection in the operator: 8 of the weight, out_features, a, b, scaling, bias, dropout_p, seed
A, B = 9, 10
_WEIGHT, _SCALING, _BIAS, _DROPOUT, _SEED = 0, 11, 12, 13, 14

Lists = tuple[list[Any], ...]


class Projection(NamedTuple):
    """One linear layer with its adapter, as `lora_linear` takes it: `lora_linear(x, *projection)`."""

    weight: Tensor | QuantWeight
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None


def each(lists: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """The operator's lists, a projection a tuple."""
    return list(zip(*lists, strict=True))


def _check_lengths(op: str, lists: Sequence[Sequence[Any]]) -> None:
    lengths = {len(values) for values in lists}
    if len(lengths) != 1 or lengths == {0}:
        raise arg_error(op, "lists", "of one length, one entry per projection, at least one", sorted(lengths))


def _check(x: Tensor, *lists: list[Any]) -> None:
    _check_lengths("lora_linear_stacked", lists)
    for values in each(lists):
        single.forward_op.check(x, *values)


def _fake(x: Tensor, *lists: list[Any]) -> list[Tensor]:
    pairs = [single.forward_op.fake(x, *values) for values in each(lists)]
    return [y for y, _ in pairs] + [s for _, s in pairs]


def _reference(x: Tensor, *lists: list[Any]) -> list[Tensor]:
    pairs = [single.forward_op.reference(x, *values) for values in each(lists)]
    return [y for y, _ in pairs] + [s for _, s in pairs]


def _flops(x: Tensor, *lists: list[Any]) -> int:
    assert single.forward_op.flops is not None
    return sum(single.forward_op.flops(x, *values) for values in each(lists))


forward_op = Op(
    name="lora_linear_stacked",
    schema=(
        f"(Tensor x, {_WEIGHTS}, SymInt[] out_features, Tensor?[] a, Tensor?[] b, float[] scaling, Tensor?[] bias, "
        "float[] dropout_p, Tensor?[] seed) -> Tensor[]"  # every y, then every s
    ),
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="x[M,K] weight[N,K] out_features=N a[R,K] b[N,R] bias[N]",
    flops=_flops,
)


def _singles(x: Tensor, lists: Sequence[list[Any]], need_dx: bool, need_ab: list[bool]) -> list[tuple[Any, ...]]:
    """The arguments of lora_linear_backward, per projection."""
    return [(values[0], x, *values[1:], need_dx, ab) for values, ab in zip(each(lists), need_ab, strict=True)]


def _check_backward(x: Tensor, *args: Any) -> None:
    *lists, need_dx, need_ab = args
    _check_lengths("lora_linear_stacked_backward", [*lists, need_ab])
    for call in _singles(x, lists, need_dx, need_ab):
        single.backward_op.check(*call)


def _fake_backward(x: Tensor, *args: Any) -> list[Tensor]:
    *lists, need_dx, need_ab = args
    grads = [single.backward_op.fake(*call) for call in _singles(x, lists, False, need_ab)]
    dx = x.new_empty(x.shape if need_dx else (0,))
    return [dx, *(da for _, da, _ in grads), *(db for _, _, db in grads)]


def _reference_backward(x: Tensor, *args: Any) -> list[Tensor]:
    *lists, need_dx, need_ab = args
    grads = [single.backward_op.reference(*call) for call in _singles(x, lists, need_dx, need_ab)]
    dx = x.new_empty((0,))
    if need_dx:
        wide = torch.promote_types(x.dtype, torch.float32)
        dx = torch.stack([part.to(wide) for part, _, _ in grads]).sum(0).to(x.dtype)
    return [dx, *(da for _, da, _ in grads), *(db for _, _, db in grads)]


def _flops_backward(x: Tensor, *args: Any) -> int:
    *lists, need_dx, need_ab = args
    assert single.backward_op.flops is not None
    return sum(single.backward_op.flops(*call) for call in _singles(x, lists, need_dx, need_ab))


backward_op = Op(
    name="lora_linear_stacked_backward",
    schema=(
        f"(Tensor x, Tensor[] dy, {_WEIGHTS}, Tensor?[] a, Tensor?[] b, Tensor?[] s, float[] scaling, "
        "float[] dropout_p, Tensor?[] seed, bool need_dx, bool[] need_ab) -> Tensor[]"  # dx, every da, every db
    ),
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="x[M,K] dy[M,N] weight[N,K] a[R,K] b[N,R] s[M,R]",
    flops=_flops_backward,
)


def lists_of(flat: Sequence[Any], n: int) -> Lists:
    """The operator's lists from their concatenation."""
    return tuple(list(flat[i * n : (i + 1) * n]) for i in range(_FIELDS))


def saved_of(x: Tensor | None, lists: Lists, ss: Sequence[Tensor]) -> list[Tensor | None]:
    """Tensors that the backward needs of a stack: x, then per list the tensors of each projection."""
    adapted = [s if a is not None else None for s, a in zip(ss, lists[A], strict=True)]
    return [x, *(t for i in (0, 1, 2, 3, 4, A, B, _SEED) for t in lists[i]), *adapted]


def needs_x(lists: Lists) -> bool:
    """True if the backward reads x: a frozen layer without an adapter needs its shape only."""
    return any(a is not None for a in lists[A]) or any(w.requires_grad for w in lists[_WEIGHT])


def numbers_of(lists: Lists) -> Lists:
    """Values that the backward needs of a stack besides tensors: `gradients` takes it back."""
    bias = [None if t is None else t.dtype for t in lists[_BIAS]]
    return (*lists[5:8], lists[_SCALING], lists[_DROPOUT], bias)


def gradients(
    x: Tensor, dys: Sequence[Tensor | None], saved: Sequence[Tensor | None], numbers: Lists, need_dx: bool,
    need: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """(dx, the gradients of a stack's fields, flat as they were). need: which of those are wanted.

    saved: of `saved_of`, without x. A projection whose dy is None did not take part and has no gradients.
    """
    n = len(dys)
    weight, absmax, nested_absmax, nested_code, offset, a, b, seed, s = (
        list(saved[i * n : (i + 1) * n]) for i in range(9)
    )
    quant_type, blocksize, nested_blocksize, scaling, dropout_p, bias = numbers
    grads: list[Tensor | None] = [None] * (_FIELDS * n)
    used = [i for i in range(n) if dys[i] is not None]
    need_ab = [need[A * n + i] or need[B * n + i] for i in used]
    dx = None
    dy = [t.contiguous() for t in dys if t is not None]
    if used and (need_dx or any(need_ab)):
        lists = (weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, a, b, s,
                 scaling, dropout_p, seed)  # fmt: skip
        taken = [[values[i] for i in used] for values in lists]
        for i in (0, 8, 9):
            taken[i] = [None if t is None else t.detach() for t in taken[i]]
        found = backward_op.op(x, dy, *taken, need_dx, need_ab)
        dx = found[0] if need_dx else None
        for j, i in enumerate(used):
            grads[A * n + i] = found[1 + j] if need[A * n + i] else None
            grads[B * n + i] = found[1 + len(used) + j] if need[B * n + i] else None
    for i, t in zip(used, dy, strict=True):
        w = weight[i]
        if need[_WEIGHT * n + i]:
            assert w is not None
            grads[_WEIGHT * n + i] = (t.t() @ x).to(w.dtype)
        if need[_BIAS * n + i]:
            wide = torch.promote_types(t.dtype, torch.float32)
            grads[_BIAS * n + i] = t.sum(0, dtype=wide).to(bias[i])
    return dx, grads


class _Stacked(torch.autograd.Function):
    """(x [M, K], n, lists flat) -> (every y, every s); s are outputs only so that they can be saved."""

    @staticmethod
    def forward(*args: Any) -> Any:
        x, n, *flat = args
        return tuple(forward_op.op(x, *lists_of(flat, n)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, n, *flat = inputs
        lists = lists_of(flat, n)
        ctx.mark_non_differentiable(*output[n:])
        ctx.set_materialize_grads(False)
        ctx.n, ctx.x_shape, ctx.numbers = n, x.shape, numbers_of(lists)
        ctx.save_for_backward(*saved_of(x if needs_x(lists) else None, lists, output[n:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        n, need = ctx.n, ctx.needs_input_grad
        dy = dys[:n]
        first = next((t for t in dy if t is not None), None)
        if first is None:
            return (None,) * len(need)
        x, *saved = ctx.saved_tensors
        rows = x if x is not None else first.new_empty(ctx.x_shape)
        dx, grads = gradients(rows, dy, saved, ctx.numbers, need[0], need[2:])
        return dx, None, *grads


def flat_projections(
    op: str, x: Tensor, projections: Sequence[Projection], names: Sequence[str], k: int
) -> list[Any]:
    """The operator's lists, concatenated. Seeds that are needed and not given are drawn, in order."""
    fields: list[list[Any]] = []
    for name, projection in zip(names, projections, strict=True):
        weight, a, b, scaling, bias, p, seed = projection
        flat: tuple[Any, ...]
        if isinstance(weight, QuantWeight):
            shape, flat = weight.shape, weight.flatten()
        else:
            shape, flat = tuple(weight.shape), (weight, None, None, None, None, 0, 64, 256)
        if len(shape) != 2 or shape[1] != k:
            raise arg_error(op, name, f"a projection whose weight is [N, {k}]", shape)
        if p > 0.0 and seed is None and a is not None:
            seed = philox.draw_seed(x.device)
        fields.append([*flat, shape[0], a, b, scaling, bias, p, seed])
    return [values[i] for i in range(_FIELDS) for values in fields]


def wants_gradients(x: Tensor, flat: Sequence[Any]) -> bool:
    wanted = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *flat))
    return wanted or forward_mode()


def lora_linear_stacked(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """`lora_linear(x, *p)` for each projection, reading x once; differentiable in x, every a, b, bias and dense weight.

    x: [..., K] float32, bfloat16, float16 (float64 on the reference). projections: at least one, each over K inputs,
    their fields as in `lora_linear`. Returns one [..., N_i] in x.dtype per projection; sums are float32, also the sum
    over projections in the gradient of x, which is rounded once. Every projection has its own dropout and seed.
    Under autocast x is cast to autocast's dtype. Raises ValueError or TypeError on bad arguments.
    """
    if not projections:
        raise arg_error("lora_linear_stacked", "projections", "at least one Projection", 0)
    if x.dim() == 0:
        raise arg_error("lora_linear_stacked", "x", "[..., K]", tuple(x.shape))
    k, n = x.shape[-1], len(projections)
    names = [f"projections[{i}]" for i in range(n)]
    flat = flat_projections("lora_linear_stacked", x, projections, names, k)
    rows = rows_of("lora_linear_stacked", as_autocast("lora_linear_stacked", x), k)
    if wants_gradients(rows, flat):
        ys = single.apply_function(_Stacked, rows, n, *flat)[:n]
    else:
        ys = forward_op.op(rows, *lists_of(flat, n))[:n]
    return tuple(ys) if x.dim() == 2 else tuple(y.reshape(*x.shape[:-1], y.shape[1]) for y in ys)
