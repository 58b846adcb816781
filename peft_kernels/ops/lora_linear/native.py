"""The native CPU backend of lora_linear: packs the arguments into one struct and makes one call.

A struct packed in one go costs a third of what 30 ctypes arguments do; at one token a 576 x 576 layer takes about 5 us,
so that matters.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend

_ARGS = struct.Struct("=29q2d24x")  # pk_lora_args of csrc/pk_abi.h; its last three fields are for CUDA
_F32 = torch.float32
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@lru_cache(1)
def _mismatch() -> str | None:  # of the built library, which is loaded once
    have = native.lora_args_size()
    if have != _ARGS.size:
        return f"pk_lora_args has {have} bytes, this package packs {_ARGS.size}: rebuild the library"
    return None


def _available() -> str | None:
    return native.available() or _mismatch()


def _when(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, a: Tensor | None, b: Tensor | None, bias: Tensor | None,
) -> str | None:  # fmt: skip
    if quant_type == 0 and weight.dtype not in _CODES:
        return f"does not serve a {weight.dtype} weight"
    for name, t in (("a", a), ("b", b), ("bias", bias)):
        if t is not None and t.dtype not in _CODES:
            return f"does not serve {name} in {t.dtype}"
    if quant_type != 0 and absmax is not None:
        nested = nested_absmax is not None and nested_absmax.numel() > 0
        if absmax.dtype is not (torch.uint8 if nested else _F32):
            return f"does not serve absmax in {absmax.dtype}"
        if nested and any(t is None or t.dtype is not _F32 for t in (nested_absmax, nested_code, offset)):
            return "nested scales must be float32"
    return None


def _when_forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> str | None:  # fmt: skip
    return _when(x, weight, absmax, nested_absmax, nested_code, offset, quant_type, a, b, bias)


def _when_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor | None, b: Tensor | None, s: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None,
    need_dx: bool, need_ab: bool,
) -> str | None:  # fmt: skip
    return _when(x, weight, absmax, nested_absmax, nested_code, offset, quant_type, a, b, None)


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    m, k = x.shape
    # contiguous() is a no-op on what is contiguous; the names keep a copy alive until the call returns
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty((m, out_features))
    nested = nested_absmax is not None and nested_absmax.numel() > 0
    if absmax is not None:
        absmax = absmax.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    r = a_dtype = b_dtype = 0
    if a is not None and b is not None:
        a, b, r = a.contiguous(), b.contiguous(), a.shape[0]
        a_dtype, b_dtype = _CODES[a.dtype], _CODES[b.dtype]
        s = torch.empty((m, r), dtype=_F32)
    else:
        s = torch.empty((0,), dtype=_F32)
    code = native.cpu().pk_cpu_lora_linear(_ARGS.pack(
        x.data_ptr(), weight.data_ptr(), _ptr(absmax), _ptr(nested_absmax) if nested else 0,
        _ptr(nested_code) if nested else 0, _ptr(offset) if nested else 0, _ptr(a), _ptr(b), _ptr(bias), _ptr(seed),
        y.data_ptr(), s.data_ptr(), 0, 0, 0, 0, m, out_features, k, r, quant_type, blocksize, nested_blocksize,
        _CODES[x.dtype], _CODES.get(weight.dtype, 0), a_dtype, b_dtype, 0 if bias is None else _CODES[bias.dtype],
        torch.get_num_threads(), scaling, dropout_p,
    ))  # fmt: skip
    if code:
        native.check(code)
    return y, s


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor | None, b: Tensor | None, s: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None,
    need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    m, k = x.shape
    n = dy.shape[1]
    dy, weight = dy.contiguous(), weight.contiguous()
    dx = x.new_empty((m, k) if need_dx else (0,))
    if not need_ab:
        da, db = x.new_empty((0,)), x.new_empty((0,))
    nested = nested_absmax is not None and nested_absmax.numel() > 0
    if absmax is not None:
        absmax = absmax.contiguous()
    r = a_dtype = b_dtype = 0
    if a is not None and b is not None:
        a, b, r = a.contiguous(), b.contiguous(), a.shape[0]
        a_dtype, b_dtype = _CODES[a.dtype], _CODES[b.dtype]
        if need_ab:
            assert s is not None
            x, s = x.contiguous(), s.contiguous()
            da, db = torch.empty_like(a), torch.empty_like(b)
    code = native.cpu().pk_cpu_lora_linear_backward(_ARGS.pack(
        x.data_ptr(), weight.data_ptr(), _ptr(absmax), _ptr(nested_absmax) if nested else 0,
        _ptr(nested_code) if nested else 0, _ptr(offset) if nested else 0, _ptr(a), _ptr(b), 0, _ptr(seed),
        0, _ptr(s), dy.data_ptr(), dx.data_ptr() if need_dx else 0, da.data_ptr() if need_ab else 0,
        db.data_ptr() if need_ab else 0, m, n, k, r, quant_type, blocksize, nested_blocksize,
        _CODES[dy.dtype], _CODES.get(weight.dtype, 0), a_dtype, b_dtype, 0,
        torch.get_num_threads(), scaling, dropout_p,
    ))  # fmt: skip
    if code:
        native.check(code)
    return dx, da, db


_CPU = frozenset({"cpu"})
BACKENDS: dict[str, Backend] = {
    "lora_linear": Backend("native", forward, _CPU, available=_available, when=_when_forward),
    "lora_linear_backward": Backend("native", backward, _CPU, available=_available, when=_when_backward),
}
