"""The native CPU backend of lora_linear: packs the arguments into one struct and makes one call.

A struct packed in one go costs a third of what 30 ctypes arguments do; at one token a 576 x 576 layer takes about 5 us,
so that matters.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import ALL_FORMATS, FLOATS, Backend
from ...formats import contiguous
from ...native import pointer

_ARGS = struct.Struct("=29q2d3q24x7q")  # pk_lora_args of csrc/pk_abi.h; the three that are left out are for CUDA
_F32 = torch.float32
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@lru_cache(1)
def _mismatch() -> str | None:  # of the built library, which is loaded once
    have = native.lora_args_size()
    if have != _ARGS.size:
        return f"pk_lora_args has {have} bytes, this package packs {_ARGS.size}: rebuild the library"
    return None


def available() -> str | None:
    return native.available() or _mismatch()


def refusal(
    weight: Tensor, quant_type: int, a: Tensor | None, b: Tensor | None, bias: Tensor | None
) -> str | None:
    if quant_type == 0 and weight.dtype not in _CODES:
        return f"does not serve a {weight.dtype} weight"
    for name, t in (("a", a), ("b", b), ("bias", bias)):
        if t is not None and t.dtype not in _CODES:
            return f"does not serve {name} in {t.dtype}"
    return None


def _when_forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> str | None:  # fmt: skip
    return refusal(weight, quant_type, a, b, bias)


def _when_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor | None, b: Tensor | None, s: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None,
    need_dx: bool, need_ab: bool,
) -> str | None:  # fmt: skip
    return refusal(weight, quant_type, a, b, None)


def pack(
    threads: int, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, n: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None, *,
    y: Tensor | None = None, s: Tensor | None = None, dy: Tensor | None = None, dx: Tensor | None = None,
    da: Tensor | None = None, db: Tensor | None = None, gain: Tensor | None = None, h: Tensor | None = None,
    dgain: Tensor | None = None, plan: tuple[Tensor, Tensor | None, Tensor, Tensor, int] | None = None,
) -> bytes:  # fmt: skip
    """pk_lora_args of one projection. Every tensor is contiguous and must live until the native call returns.

    plan: adapters, starts, ranks, scaling and max_rank of `multi_lora_linear`, whose `native` does without starts.
    """
    nested = nested_absmax is not None and nested_absmax.numel() > 0  # a weight of no elements has none to point to
    w_dtype = _CODES.get(weight.dtype, 0)
    if quant_type > 2:
        nested, (w_dtype, nested_blocksize) = True, group_dtypes(absmax, nested_absmax)
    m, k = x.shape
    r, many = 0 if a is None else a.shape[0], (0,) * 7
    if plan is not None:
        *each, most = plan
        r, many = most, (*map(pointer, each), each[2].shape[0], r, most)
    return _ARGS.pack(
        x.data_ptr(), weight.data_ptr(), pointer(absmax), pointer(nested_absmax) if nested else 0,
        pointer(nested_code) if nested else 0, pointer(offset) if nested else 0, pointer(a), pointer(b),
        pointer(bias), pointer(seed),
        pointer(y), pointer(s), pointer(dy), pointer(dx), pointer(da), pointer(db), m, n, k, r, quant_type, blocksize,
        nested_blocksize, _CODES[x.dtype], w_dtype, 0 if a is None else _CODES[a.dtype],
        0 if b is None else _CODES[b.dtype], 0 if bias is None else _CODES[bias.dtype], threads, scaling, dropout_p,
        pointer(gain), pointer(h), pointer(dgain), *many,
    )  # fmt: skip


def group_dtypes(scales: Tensor | None, zeros: Tensor | None) -> tuple[int, int]:
    """(w_dtype, nested_blocksize) of pk_lora_args for a weight in groups: the dtypes of its scales and its zeros."""
    return (0 if scales is None else native.DTYPES[scales.dtype]), (4 if zeros is None else native.DTYPES[zeros.dtype])


_STEP = struct.Struct("=q64s8q88sq16s3q80s")  # pk_lora_args, what a step changes apart from the rest


def fields(packed: bytes) -> tuple[bytes, ...]:
    """The parts of a `pack` that `put` takes: those that stay from step to step."""
    parts = _STEP.unpack(packed)
    return parts[1], parts[10], parts[12], parts[16]


def put(
    rest: tuple[bytes, ...], x: Tensor, seed: Tensor | None, m: int, y: int, s: int, dy: int = 0, dx: int = 0,
    da: int = 0, db: int = 0, gain: int = 0, h: int = 0, dgain: int = 0,
) -> bytes:  # fmt: skip
    """`pack` with other activations, of m rows, and as many threads as there are; addresses in the place of tensors."""
    tensors, sizes, factors, last = rest
    return _STEP.pack(x.data_ptr(), tensors, 0 if seed is None else seed.data_ptr(), y, s, dy, dx, da, db, m, sizes,
                      torch.get_num_threads(), factors, gain, h, dgain, last)  # fmt: skip


def forward_arguments(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[tuple[Any, ...], Tensor, Tensor]:  # fmt: skip
    """(what `pack` takes after x, contiguous; y; s)."""
    m = x.shape[0]
    absmax, nested_absmax, nested_code, offset, bias = contiguous(absmax, nested_absmax, nested_code, offset, bias)
    if a is not None and b is not None:
        a, b = a.contiguous(), b.contiguous()
        s = x.new_empty((m, a.shape[0]), dtype=_F32)
    else:
        s = x.new_empty((0,), dtype=_F32)
    return (weight.contiguous(), absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
            out_features, a, b, scaling, bias, dropout_p, seed), x.new_empty((m, out_features)), s  # fmt: skip


def backward_arguments(
    dy: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, a: Tensor | None, b: Tensor | None,
    s: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None, need_ab: bool,
) -> tuple[tuple[Any, ...], Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(what `pack` takes after x, contiguous; dy; s; da; db), the last two empty where not needed."""
    absmax, nested_absmax, nested_code, offset = contiguous(absmax, nested_absmax, nested_code, offset)
    if a is not None and b is not None:
        a, b = a.contiguous(), b.contiguous()
        s = None if s is None else s.contiguous()
    if need_ab:
        assert a is not None
        assert b is not None
        da, db = torch.empty_like(a), torch.empty_like(b)
    else:
        da, db = dy.new_empty((0,)), dy.new_empty((0,))
    return (weight.contiguous(), absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
            dy.shape[1], a, b, scaling, None, dropout_p, seed), dy.contiguous(), s, da, db  # fmt: skip


def forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, r]); s is empty without an adapter."""
    x = x.contiguous()
    own, y, s = forward_arguments(x, *args)
    code = native.cpu().pk_cpu_lora_linear(pack(torch.get_num_threads(), x, *own, y=y, s=s), 1)
    if code:
        native.check(code)
    return y, s


def backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [M, K], da [r, K], db [N, r]); empty where not needed."""
    *rest, need_dx, need_ab = args
    own, dy, s, da, db = backward_arguments(dy, *rest, need_ab)
    x = x.contiguous()
    dx = x.new_empty(x.shape if need_dx else (0,))
    code = native.cpu().pk_cpu_lora_linear_backward(pack(
        torch.get_num_threads(), x, *own, s=s, dy=dy, dx=dx if need_dx else None, da=da if need_ab else None,
        db=db if need_ab else None,
    ), 1)  # fmt: skip
    if code:
        native.check(code)
    return dx, da, db


# ---- prepared calls: `fields` of a `pack` in the place of its tensors -----------------------------------------------
def step(
    fields: tuple[bytes, ...], x: Tensor, n: int, r: int, seed: Tensor | None = None, gain: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, r]); x [M, K] contiguous."""
    m = x.shape[0]
    y, s = x.new_empty((m, n)), x.new_empty((m, r), dtype=_F32)
    own = put(fields, x, seed, m, y.data_ptr(), s.data_ptr(), gain=0 if gain is None else gain.data_ptr())
    code = native.cpu().pk_cpu_lora_linear(own, 1)
    if code:
        native.check(code)
    return y, s


_ROW = "q72s2q128sq120s"  # pk_lora_args, what a call of one row without gradients changes apart from the rest
_ONE = bytes(32) + struct.pack("=q", 1)  # dy, dx, da, db and m


class Row:
    """Projections of one row without gradients and dropout, call after call: a token waits for Python, so that all that
    stays is packed once, and outputs are one tensor. Never written to, as threads may share it.

    packed: `fields` of each; sizes: (n, r) of each; itemsize: bytes of an element of x.
    """

    def __init__(self, packed: Sequence[tuple[bytes, ...]], sizes: Sequence[tuple[int, int]], itemsize: int) -> None:
        self._pack, self._count = struct.Struct("=" + _ROW * len(packed)).pack, len(packed)
        self._each: list[tuple[bytes, int, int, bytes, bytes]] = []
        n = r = 0
        for (tensors, widths, factors, last), (own_n, own_r) in zip(packed, sizes, strict=True):
            self._each.append((tensors + bytes(8), n * itemsize, 4 * r, _ONE + widths, factors + bytes(24) + last))
            n, r = n + own_n, r + own_r
        self._n, self._r = (1, n), (r,)

    def __call__(self, x: Tensor) -> Tensor:
        """Every y, one after the other, [1, N]; x of K elements, contiguous."""
        y, s = x.new_empty(self._n), x.new_empty(self._r, dtype=_F32)
        x_at, y_at, s_at, threads = x.data_ptr(), y.data_ptr(), s.data_ptr(), torch.get_num_threads()
        args: list[Any] = []
        for tensors, n, r, sizes, rest in self._each:
            args += x_at, tensors, y_at + n, s_at + r, sizes, threads, rest
        code = native.cpu().pk_cpu_lora_linear(self._pack(*args), self._count)
        if code:
            native.check(code)
        return y


def step_backward(
    fields: tuple[bytes, ...], dy: Tensor, x: Tensor, s: Tensor, seed: Tensor | None, a: Tensor, b: Tensor,
    need: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx [M, K], da [r, K], db [N, r]); None where `need` says so."""
    need_dx, need_a, need_b = need[:3]
    dy = dy.contiguous()
    dx, da, db = torch.empty_like(x) if need_dx else None, None, None
    if need_a or need_b:
        da, db = torch.empty_like(a), torch.empty_like(b)
    code = native.cpu().pk_cpu_lora_linear_backward(
        put(fields, x, seed, dy.shape[0], 0, s.data_ptr(), dy.data_ptr(), pointer(dx), pointer(da), pointer(db)), 1
    )
    if code:
        native.check(code)
    return dx, da if need_a else None, db if need_b else None


def backend(
    fn: Callable[..., Any], when: Callable[..., str | None], dtypes: frozenset[torch.dtype] = FLOATS
) -> Backend:
    """The native `Backend` of an operator that reads a weight, which may be in any format."""
    return Backend("native", fn, frozenset({"cpu"}), dtypes, available=available, when=when, formats=ALL_FORMATS)


BACKENDS: dict[str, Backend] = {
    "lora_linear": backend(forward, _when_forward),
    "lora_linear_backward": backend(backward, _when_backward),
}
