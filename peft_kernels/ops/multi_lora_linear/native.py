"""The native CPU backend of multi_lora_linear: lora_linear's kernels, which group the rows by adapter.

The operator takes stacks, which serving fills once. In training every step changes the adapters, and filling a stack of
them and taking its gradients apart again costs more than the products at few tokens. `PackedLayer` leaves the adapters
where they are: the library reads each one's A [r, K] and B [N, r] through a pointer, writes its gradients to tensors of
its own, and takes all layers that read one x in a call.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from ...formats import contiguous
from ...native import pointer
from ..lora_linear.native import backend, fields, pack, put, refusal
from ..lora_linear.native import forward as alone
from . import backward_op, check_values, forward_op

_A = 6 * 8  # where pk_lora_args has a and b


def _when_forward(x: Tensor, *args: Any) -> str | None:
    return refusal(args[0], args[5], args[9], args[10], args[16])


def _when_backward(dy: Tensor, x: Tensor, *args: Any) -> str | None:
    return refusal(args[0], args[5], args[8], args[9], None)


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
    if 0 in (x.shape[0], a.shape[0], starts.shape[0], max_rank):  # no row can have an adapter
        check_values("multi_lora_linear", a.shape[0], adapters, starts, ranks, max_rank)
        plain = (weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize)
        y = alone(x, *plain, out_features, None, None, 1.0, bias, 0.0, None)[0]
        return y, x.new_zeros((x.shape[0], max_rank), dtype=torch.float32)
    x, a, b, m = x.contiguous(), a.contiguous(), b.contiguous(), x.shape[0]
    weight = weight.contiguous()  # the names keep a copy alive during the call
    absmax, nested_absmax, nested_code, offset, bias = contiguous(absmax, nested_absmax, nested_code, offset, bias)
    plan = (*(t.contiguous() for t in (adapters, starts, ranks, scaling)), max_rank)
    y, s = x.new_empty((m, out_features)), x.new_empty((m, max_rank), dtype=torch.float32)
    packed = pack(torch.get_num_threads(), x, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                  nested_blocksize, out_features, a, b, 1.0, bias, dropout_p, seed, y=y, s=s,
                  plan=plan)  # fmt: skip
    _check(native.cpu().pk_cpu_lora_linear(packed, 1), "multi_lora_linear", a, plan, False)
    return y, s


def step(packed: tuple[bytes, ...], x: Tensor, n: int, a: Tensor, plan: tuple[Any, ...]) -> Tensor:
    """y [M, N] of a prepared call; x [M, K] contiguous, packed: `lora_linear.native.fields`."""
    m = x.shape[0]
    y, s = x.new_empty((m, n)), x.new_empty((m, plan[4]), dtype=torch.float32)
    code = native.cpu().pk_cpu_lora_linear(put(packed, x, None, m, y.data_ptr(), s.data_ptr()), 1)
    _check(code, "multi_lora_linear", a, plan, False)
    return y


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
    dy, x, a, b, s, weight = (t.contiguous() for t in (dy, x, a, b, s, weight))
    absmax, nested_absmax, nested_code, offset = contiguous(absmax, nested_absmax, nested_code, offset)
    plan = (*(t.contiguous() for t in (adapters, starts, ranks, scaling)), max_rank)
    packed = pack(torch.get_num_threads(), x, weight, absmax, nested_absmax, nested_code, offset, quant_type,
                  blocksize, nested_blocksize, dy.shape[1], a, b, 1.0,
                  None, dropout_p, seed, s=s, dy=dy, dx=dx if need_dx else None, da=da if need_ab else None,
                  db=db if need_ab else None, plan=plan)  # fmt: skip
    _check(native.cpu().pk_cpu_lora_linear_backward(packed, 1), "multi_lora_linear_backward", a, plan, need_ab)
    return dx, da, db


BACKENDS: dict[str, Backend] = {
    "multi_lora_linear": backend(forward, _when_forward),
    "multi_lora_linear_backward": backend(backward, _when_backward),
}


# ---- several layers of one x, adapters in tensors of their own ------------------------------------------------------
MOST = 16  # PK_LORA_MOST of csrc/pk_abi.h


class Layer(NamedTuple):
    """A linear layer with adapters by row of x. Everything is contiguous, and the values are in range."""

    weight: tuple[Any, ...]  # as `lora_linear.flat_weight` has it
    n: int
    a: Sequence[Tensor]  # of each adapter [r_i, K], of one dtype
    b: Sequence[Tensor]  # [N, r_i], of one dtype
    adapters: Tensor  # int64 [M], -1: the base alone
    ranks: Tensor  # int64 [S]
    scaling: Tensor  # float32 [S]
    max_rank: int
    bias: Tensor | None
    dropout_p: float


class PackedLayer(NamedTuple):
    """A layer packed for calls with any x of as many rows; its tensors must live as long."""

    fields: tuple[bytes, ...]  # of `lora_linear.native`
    n: int
    max_rank: int
    pointers: array[int]  # of the as and the bs, to whose halves the fields point


def serves_layer(x: Tensor, layer: Layer) -> bool:
    """True if the native library serves it, by the rules of the operator: a backend may be forced."""
    empty = x.new_empty((0,))
    seed = torch.empty(1, dtype=torch.int64) if layer.dropout_p > 0.0 else None
    plan = (layer.adapters, empty, layer.ranks, layer.scaling, layer.max_rank)
    args = (x, *layer.weight, layer.n, layer.a[0], layer.b[0], *plan, layer.bias, layer.dropout_p, seed)
    back = (x, x, *layer.weight, layer.a[0], layer.b[0], empty, *plan, layer.dropout_p, seed, True, True)
    return forward_op.choose(args).name == "native" and backward_op.choose(back).name == "native"


def pack_layer(x: Tensor, layer: Layer) -> PackedLayer:
    """x: any of its dtype and width."""
    plan = (layer.adapters, None, layer.ranks, layer.scaling, layer.max_rank)
    pointers = _table((*layer.a, *layer.b))
    own = bytearray(pack(0, x, *layer.weight, layer.n, layer.a[0], layer.b[0], 1.0, layer.bias, layer.dropout_p, None,
                         plan=plan))  # fmt: skip
    struct.pack_into("=2q", own, _A, *_halves(pointers))
    return PackedLayer(fields(bytes(own)), layer.n, layer.max_rank, pointers)


def forward_layers(
    x: Tensor, layers: Sequence[PackedLayer], seeds: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """(y [M, N], s [M, max_rank] float32) of each layer; x [M, K] contiguous, at most `MOST` layers."""
    m, args = x.shape[0], []
    ys = [x.new_empty((m, layer.n)) for layer in layers]
    ss = [x.new_empty((m, layer.max_rank), dtype=torch.float32) for layer in layers]
    for layer, seed, y, s in zip(layers, seeds, ys, ss, strict=True):
        args.append(put(layer.fields, x, seed, m, y.data_ptr(), s.data_ptr()))
    code = native.cpu().pk_cpu_lora_linear(b"".join(args), len(args))
    if code:
        native.check(code)
    return ys, ss


def backward_layers(
    dys: Sequence[Tensor], x: Tensor, layers: Sequence[PackedLayer], factors: Sequence[Sequence[Tensor]],
    ss: Sequence[Tensor], seeds: Sequence[Tensor | None], need_dx: bool, wanted: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:  # fmt: skip
    """(dx [M, K], the sum over the layers; of each layer, the gradients of its as and then of its bs).

    dys, x, ss: contiguous. factors: of each layer, its as and then its bs. wanted: which of their gradients; the others
    are None.
    """
    m, dx = x.shape[0], torch.empty_like(x) if need_dx else None
    args, kept, found = [], [], []
    for dy, layer, own, s, seed, asked in zip(dys, layers, factors, ss, seeds, wanted, strict=True):
        grads = [torch.empty_like(t) if need else None for t, need in zip(own, asked, strict=True)]
        of_grads = _table(grads)
        to = _halves(of_grads) if any(asked) else (0, 0)
        args.append(put(layer.fields, x, seed, m, 0, s.data_ptr(), dy.data_ptr(), pointer(dx), *to))
        kept.append(of_grads)
        found.append(grads)
    code = native.cpu().pk_cpu_lora_linear_backward(b"".join(args), len(args))
    if code:
        native.check(code)
    return dx, found


def _halves(table: array[int]) -> tuple[int, int]:
    """Where a table and its second half begin."""
    first, count = table.buffer_info()
    return first, first + 4 * count


def _table(tensors: Sequence[Tensor | None]) -> array[int]:
    return array("q", [0 if t is None else t.data_ptr() for t in tensors])
