"""butterfly_linear: `y = gain * (butterfly_rotate(x) W^T) + bias`, W dense or 4-bit, forward and backward.

OFT (arXiv 2306.07280; on a 4-bit W QOFT, 2506.19847) and, with a gain, BOFT (2311.06243) as one operator: the rotation
is the prologue of the product, and the whole of a turned x is never written where a backend can do without it. The
backward computes it again from x, so that x is all that it keeps (and with a gain that is trained h = x O W^T).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, as_autocast, check_memory, rows_of
from ...dispatch import Op, forward_mode
from ...formats import QuantWeight
from .. import butterfly_rotate as turning
from .. import lora_linear as base


def _check_common(
    op: str, x: Tensor, rows: Tensor, blocks: Tensor, weight: tuple[Any, ...], n: int, gain: Tensor | None
) -> None:
    base.check_common(op, x, rows, *weight[:8], n, None, None, 0.0, None)
    turning.check_blocks(op, x, blocks)
    if gain is not None:
        base.check_gain(op, gain, n, x)


def _check(x: Tensor, blocks: Tensor, *rest: Any) -> None:
    *weight, n, gain, bias, need_h = rest
    _check_common("butterfly_linear", x, x, blocks, tuple(weight), n, gain)
    if need_h and gain is None:
        raise arg_error("butterfly_linear", "need_h", "False without a gain", need_h)
    base.check_bias("butterfly_linear", n, bias)


def _fake(x: Tensor, blocks: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n, need_h = rest[8], rest[-1]
    return x.new_empty((x.shape[0], n)), x.new_empty((x.shape[0], n) if need_h else (0,))


def _dense(weight: tuple[Any, ...], n: int, like: Tensor) -> Tensor:
    return base.dense_weight(*weight, n, like.shape[1], like.dtype)


def _reference(x: Tensor, blocks: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *weight, n, gain, bias, need_h = rest
    w = _dense(tuple(weight), n, x)
    turned, none = turning.forward_op.reference(x, blocks, False), x.new_empty((0,))
    if gain is None:
        return torch.nn.functional.linear(turned, w, None if bias is None else bias.to(x.dtype)), none
    h = turned @ w.t()
    y = gain * h.to(gain.dtype)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype), h if need_h else none


def _flops(x: Tensor, blocks: Tensor, *rest: Any) -> int:
    return 2 * x.numel() * (rest[8] + blocks.shape[-1] * blocks.shape[0])


forward_op = Op(
    name="butterfly_linear",
    schema=(
        f"(Tensor x, Tensor blocks, {base.WEIGHT}, SymInt out_features, Tensor? gain, Tensor? bias, bool need_h) -> "
        "(Tensor, Tensor)"  # y, h
    ),
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="x[M,K] blocks[F,G,B,B] weight[N,K] out_features=N gain[N] bias[N]",
    flops=_flops,
)


def _check_backward(dy: Tensor, x: Tensor, blocks: Tensor, *rest: Any) -> None:
    *weight, gain, h, _, _, need_gain = rest
    op = "butterfly_linear_backward"
    _check_common(op, x, dy, blocks, tuple(weight), base.columns(dy), gain)
    if need_gain:
        if gain is None:
            raise arg_error(op, "gain", "given when its gradient is asked for", "None")
        base.check_kept(op, "h", h, tuple(dy.shape), dy.dtype)


def _fake_backward(dy: Tensor, x: Tensor, blocks: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    gain, need_dx, need_dblocks, need_gain = rest[8], *rest[-3:]
    dgain = x.new_empty((0,), dtype=base.acc_dtype(x.dtype))
    if need_gain and gain is not None:
        dgain = torch.empty_like(gain, memory_format=torch.contiguous_format)
    dx, dblocks = x.new_empty(x.shape if need_dx else (0,)), blocks.new_empty(blocks.shape if need_dblocks else (0,))
    return dx, dblocks, dgain


def _reference_backward(dy: Tensor, x: Tensor, blocks: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *weight, gain, h, need_dx, need_dblocks, need_gain = rest
    acc = base.acc_dtype(x.dtype)
    dx, dblocks, dgain = x.new_empty((0,)), blocks.new_empty((0,)), x.new_empty((0,), dtype=acc)
    if need_dx or need_dblocks:
        dh = dy if gain is None else (gain * dy.to(acc)).to(dy.dtype)
        turned = dh @ base.dense_weight(*weight, dy.shape[1], x.shape[1], x.dtype)
        dx, dblocks = turning.backward_op.reference(turned, x, blocks, False, need_dx, need_dblocks)
    if need_gain:
        dgain = (dy.to(acc) * h.to(acc)).sum(0)
    return dx, dblocks, dgain


def _flops_backward(dy: Tensor, x: Tensor, blocks: Tensor, *rest: Any) -> int:
    need_dx, need_dblocks, _ = rest[-3:]
    if not (need_dx or need_dblocks):
        return 0
    assert turning.backward_op.flops is not None
    return 2 * dy.numel() * x.shape[1] + turning.backward_op.flops(dy, x, blocks, False, need_dx, need_dblocks)


backward_op = Op(
    name="butterfly_linear_backward",
    schema=(
        f"(Tensor dy, Tensor x, Tensor blocks, {base.WEIGHT}, Tensor? gain, Tensor? h, bool need_dx, "
        "bool need_dblocks, bool need_gain) -> (Tensor, Tensor, Tensor)"
    ),
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="dy[M,N] x[M,K] blocks[F,G,B,B] weight[N,K] gain[N] h[M,N]",
    flops=_flops_backward,
)


class _ButterflyLinear(torch.autograd.Function):
    """(x [M, K], blocks, weight..., N, gain, bias, need_h) -> (y [M, N], h); h is an output only to be saved."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return forward_op.op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, blocks, weight, absmax, nested_absmax, nested_code, offset, *ints = inputs[:10]
        _, gain, bias, need_h = inputs[10:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        need_x = blocks.requires_grad or weight.requires_grad
        ctx.x_shape = x.shape
        ctx.save_for_backward(x if need_x else None, blocks, weight, absmax, nested_absmax, nested_code, offset, gain,
                              output[1] if need_h else None)  # fmt: skip
        ctx.ints, ctx.bias_dtype = ints, None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _dh: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 14
        if dy is None:
            return tuple(grads)
        x, blocks, weight, absmax, nested_absmax, nested_code, offset, gain, h = ctx.saved_tensors
        need, dy = ctx.needs_input_grad, dy.contiguous()
        if need[0] or need[1] or need[11]:
            found = backward_op.op(
                dy, x if x is not None else dy.new_empty(ctx.x_shape), blocks.detach(), weight.detach(), absmax,
                nested_absmax, nested_code, offset, *ctx.ints, None if gain is None else gain.detach(), h,
                need[0], need[1], need[11],
            )  # fmt: skip
            for index, grad in zip((0, 1, 11), found, strict=True):
                grads[index] = grad if need[index] else None
        if need[2]:
            dh = dy if gain is None else (dy * gain).to(dy.dtype)
            turned = turning.forward_op.op(x, blocks.detach(), False)
            grads[2] = (dh.t() @ turned).to(weight.dtype)
        if need[12]:
            grads[12] = dy.sum(0, dtype=base.acc_dtype(dy.dtype)).to(ctx.bias_dtype)
        return tuple(grads)


def butterfly_linear(
    x: Tensor,
    weight: Tensor | QuantWeight,
    blocks: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """`gain * (butterfly_rotate(x, blocks) W^T) + bias`, differentiable in x, blocks, bias, gain and a dense weight.

    x: [..., K] float32, bfloat16, float16 (float64 on the reference). weight: dense [N, K] or a `QuantWeight` of that
    shape. blocks: [m, D, b, b] with D * b = K, or [m, 1, b, b], as `butterfly_rotate` takes them, in a dtype of their
    own. bias: [N]. gain: N elements of any shape, computed with in float32. Returns [..., N] in x.dtype; sums are
    float32, and the turned x is rounded to x.dtype, as eager code does. Kept for the backward: x and the blocks
    (neither copied), and with a gain that needs a gradient as much as y. Under autocast x is cast to autocast's dtype.
    Raises ValueError or TypeError on bad arguments.
    """
    x = as_autocast("butterfly_linear", x)
    flat, n, k = base.flat_weight("butterfly_linear", weight)
    if x.dim() == 0 or x.shape[-1] != k:
        raise arg_error("butterfly_linear", "x", f"[..., {k}] to fit the weight [{n}, {k}]", tuple(x.shape))
    if gain is not None:
        if gain.numel() != n:
            raise arg_error("butterfly_linear", "gain", f"of {n} elements", tuple(gain.shape))
        check_memory("butterfly_linear", gain=gain)
        gain = gain.reshape(-1).to(base.acc_dtype(x.dtype))
    rows = rows_of("butterfly_linear", x, k)
    tensors = (x, blocks, flat[0], gain, bias)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    args = (rows, blocks, *flat, n, gain, bias, wanted and gain is not None and gain.requires_grad)
    if wanted or forward_mode():
        y = base.apply_function(_ButterflyLinear, *args)[0]
    else:
        y = forward_op.op(*args)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], n)
