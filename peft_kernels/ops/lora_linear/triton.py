"""Triton backend of lora_linear: the host side. The kernels are in `triton_kernels.py`, imported on first use.

Serves CUDA tensors, and CPU tensors when forced in a process with TRITON_INTERPRET=1. Scratch memory: float32 parts of
the sums that are split over programs; no dense copy of a 4-bit weight. Only with many rows of 16-bit x, where a
vendor's matmul wins over decoding again for every tile of rows, W is decoded in panels of a bounded size, and the
matmul adds each product onto the low-rank term that our kernel wrote (`panels.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import formats, native, philox, tuning
from ...checks import moved
from ...triton_lib import host
from .. import dequantize_4bit as decoding
from . import panels

_LARGE = 128 * 128  # elements of a tile of y
_DENSE, _PAIR_ROWS, _PAIR_ANY, _ELEMENT, _FORMAT = 0, 1, 2, 3, 16  # as in triton_lib/device.py


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _rank_tile(r: int, most: int) -> int:
    """Ranks per tile: a power of two of at least 16, which the tensor cores need; larger ranks are looped over."""
    return min(max(16, 1 << max(r - 1, 0).bit_length()), most)


def _split(total: int, step: int, tiles: int, programs: int, least: int) -> tuple[int, int]:
    """(parts, steps): a sum over `total`, in tiles of `step`, in parts of `steps` tiles, `least` of them or more.

    Depends on shapes and the table only, so the order of the sum is the same in every run.
    """
    tiles_in = _cdiv(total, step)
    parts = max(1, min(programs // max(tiles, 1), _cdiv(tiles_in, least)))
    steps = max(1, _cdiv(tiles_in, parts))
    return max(1, _cdiv(tiles_in, steps)), steps


def weight_mode(quant_type: int, n: int, k: int, blocksize: int, dtype: torch.dtype) -> int:
    """How the kernels read the weight; see `triton_lib/device.py`."""
    if quant_type == 0:
        return _DENSE
    if quant_type > 2:
        return _FORMAT + quant_type
    if dtype is torch.float32 or k % 2:
        return _ELEMENT  # float32 decodes exactly; rows of odd length start in the middle of a byte
    return _PAIR_ROWS if k % blocksize == 0 else _PAIR_ANY


class _Weight:
    """The weight's pointers and constants as the kernels take them. Unused pointers repeat a used one."""

    def __init__(
        self, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
        offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, n: int, k: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        native.say_misaligned(weight=weight)
        mode = weight_mode(quant_type, n, k, blocksize, dtype)
        blocksize, nested_blocksize = (blocksize, nested_blocksize) if quant_type else (64, 256)  # dense: not read
        nested: int = mode != _DENSE and nested_absmax is not None
        absmax, nested_absmax, nested_code, offset = formats.contiguous(absmax, nested_absmax, nested_code, offset)
        self.parts = (weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize)
        self.strides = weight.stride() if mode == _DENSE else (k, 1)
        table = weight
        if quant_type in formats.HAVE_TABLE:
            pair = mode in (_PAIR_ROWS, _PAIR_ANY)
            table = (formats.pair_table if pair else formats.table)(quant_type, weight.device)
        absmax = weight if absmax is None else absmax
        second = (nested_absmax, nested_code, offset) if nested else (absmax, absmax, absmax)
        if mode >= _FORMAT:  # each may be absent; a group of more columns than there are is a row
            blocksize = min(blocksize, max(k, 1))
            second = tuple(absmax if t is None else t for t in (nested_absmax, nested_code, offset))
            nested = sum(1 << i for i, t in enumerate((nested_absmax, nested_code, offset)) if t is not None)
        self.pointers = (weight, absmax, *second, table)
        self.plain = mode == _PAIR_ROWS or (mode == _DENSE and 1 in self.strides)
        self.blocksize, self.shape, self.dtype = blocksize, (n, k), dtype
        sizes = {"BLOCKSIZE": blocksize, "NESTED_BLOCKSIZE": nested_blocksize}
        self.constants: dict[str, Any] = {"MODE": mode, "NESTED": nested, **sizes}

    @property
    def dense(self) -> bool:
        return bool(self.constants["MODE"] == _DENSE)

    def whole(self) -> Tensor:
        """A dense weight in x's dtype."""
        return self.pointers[0].to(self.dtype)

    def decoder(self, by_rows: bool, most: int) -> tuple[panels.Decode, int]:
        """As `panels.Weight` says: rows by the CUDA kernel, where dequantize_4bit would take it, else by Triton's."""
        n, k = self.shape
        if by_rows and decoding.op.choose((*self.parts, [*self.shape], self.dtype)).name == "cuda":
            from ..dequantize_4bit import cuda

            step = math.lcm(panels.STEP, cuda.rows_apart(k, self.parts))
            if step <= most:
                return lambda rows, out: cuda.decode_rows(rows, k, out, self.parts), step
        if by_rows:
            return lambda rows, out: self._decode(rows, range(k), out), panels.STEP
        return lambda columns, out: self._decode(range(n), columns, out), panels.STEP

    def _decode(self, rows: range, columns: range, out: Tensor) -> Tensor:
        """W[rows, columns] in x's dtype, in the memory `out`."""
        from . import triton_kernels as kernels

        out = out[: len(rows) * len(columns)].view(len(rows), len(columns))
        bn, bk = 32, panels.STEP
        host.launch(kernels.decode_kernel, (_cdiv(len(rows), bn), _cdiv(len(columns), bk)), *self.pointers, out,
                    rows.start, columns.start, *out.shape, *self.shape, *self.strides, **self.constants, BN=bn, BK=bk,
                    num_warps=4, num_stages=1)  # fmt: skip
        return out


def _precision(dtype: torch.dtype) -> str:
    """Of the low-rank products that are added to y and dx: float32's where x is float32 (never TF32). Where the sum is
    rounded to 16 bits a TF32 product will do: TF32 has float16's precision at least, and float32's range.
    """
    return "ieee" if dtype is torch.float32 else "tf32"


def _options(config: tuning.Config) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def _tiling(config: tuning.Config, n: int, k: int) -> dict[str, int]:
    """Arguments of the two large products beside their tiles."""
    even = {"EVEN_N": n % config.BN == 0, "EVEN_K": k % config.BK == 0}
    return {"GROUP": config.GROUP, "LEFT": config.LEFT, **even, **_options(config)}


def _reduce(parts: Tensor, out: Tensor, scale: float) -> Tensor:
    """out = scale * parts.sum(0), added in order."""
    from . import triton_kernels as kernels

    block = 1024
    host.launch(kernels.reduce_kernel, (_cdiv(out.numel(), block),), parts, out, out.numel(), parts.shape[0], scale,
                BLOCK=block, num_warps=4, num_stages=1)  # fmt: skip
    return out


class _Dropout:
    """The mask's arguments; p = 0 compiles to nothing."""

    def __init__(self, p: float, seed: Tensor | None, k: int, like: Tensor) -> None:
        self.on = p > 0.0
        self.seed = moved("dropout", "seed", seed, like.device) if self.on and seed is not None else like
        self.arguments = (philox.threshold(p), 1.0 / (1.0 - p))
        self.constants = {"DROPOUT": self.on, "BY_FOUR": k % 4 == 0}


def _project(x: Tensor, a: Tensor, drop: _Dropout, arch: str, mix: Tensor | None = None) -> Tensor:
    """s = drop(x) a^T, float32 [M, r]. mix: [M, n], weights of r / n ranks each; zero in tiles whose weights are."""
    from . import triton_kernels as kernels

    (m, k), r = x.shape, a.shape[0]
    shape = tuning.Shape(m, r, k, r, x.element_size() * 8, plain=k % 16 == 0)
    out = torch.empty((m, r), dtype=torch.float32, device=x.device)

    def run(c: tuning.Config) -> Tensor:
        br = _rank_tile(r, c.BR)
        tiles = (_cdiv(m, c.BM), _cdiv(r, br))
        parts, steps = _split(k, c.BK, tiles[0] * tiles[1], c.programs, 4)
        s = out if parts == 1 else torch.empty((parts, m, r), dtype=torch.float32, device=x.device)
        host.launch(kernels.project_kernel, (*tiles, parts), x, a, s, drop.seed, mix, m, k, r,
                    None if mix is None else r // mix.shape[1], steps, *drop.arguments, **drop.constants, BM=c.BM,
                    BK=c.BK, BR=br, **_options(c))  # fmt: skip
        return s if parts == 1 else _reduce(s, out, 1.0)

    return run(tuning.choose("project", arch, shape, run))


def _outer(
    z: Tensor, t: Tensor, b: Tensor | None, out: Tensor, strides: tuple[int, int], scale: float, drop: _Dropout,
    arch: str, sparse: bool = False,
) -> Tensor | None:  # fmt: skip
    """out = scale * drop(z)^T t, [C, r] at `strides`; with b [C, r] also returns ds = scale * z b, in the same pass.
    sparse: t is zero in whole tiles, whose z is not read; without b."""
    from . import triton_kernels as kernels

    (m, c_), r = z.shape, t.shape[1]
    shape = tuning.Shape(m, c_, c_, r, z.element_size() * 8, plain=c_ % 16 == 0)
    ds = None if b is None else torch.empty((m, r), dtype=torch.float32, device=z.device)

    def run(c: tuning.Config) -> None:
        br = _rank_tile(r, c.BR)
        tiles = (_cdiv(c_, c.BN), _cdiv(r, br))
        parts, steps = _split(m, c.BM, tiles[0] * tiles[1], c.programs, 2)
        outer = torch.empty((parts, c_ * r), dtype=torch.float32, device=z.device)
        shares = outer if ds is None else torch.empty((tiles[0], m, r), dtype=torch.float32, device=z.device)
        host.launch(kernels.outer_kernel, (*tiles, parts), z, t, t if b is None else b, outer, shares, drop.seed,
                    m, c_, r, *strides, steps, *drop.arguments, WITH_DS=ds is not None, **drop.constants,
                    BM=c.BM, BC=c.BN, BR=br, SPARSE=sparse, **_options(c))  # fmt: skip
        _reduce(outer, out, scale)
        if ds is not None:
            _reduce(shares, ds, scale)

    run(tuning.choose("outer", arch, shape, run))
    return ds


def forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [M, N], s [M, r]); s is empty without an adapter."""
    x = x.contiguous()
    (m, k), n = x.shape, out_features
    arch = tuning.arch_of(x.device)
    y = x.new_empty((m, n))
    s = x.new_empty((0,), dtype=torch.float32)
    if a is not None and b is not None:
        s = _project(x, a.contiguous(), _Dropout(dropout_p, seed, k, x), arch)
    w = _Weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, n, k,
                x.dtype)  # fmt: skip
    product(x, w, None if a is None else s, b, scaling, bias, y, arch)
    return y, s


@dataclass(frozen=True)
class Gain:
    """The epilogue of dora_linear on h = x W^T + scaling s b^T: y = gain * h + bias, plus what y held with `add`.

    gain: float32 [N]. h: where h is kept, like y, or None.
    """

    gain: Tensor
    h: Tensor | None
    add: bool

    def finish(self, parts: Tensor, h: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
        """From h in `parts` [parts, M, N]; where it is to be kept in `h`, too."""
        from . import triton_kernels as kernels

        bm, bn = 4, 256
        host.launch(kernels.gain_kernel, (_cdiv(y.shape[0], bm), _cdiv(y.shape[1], bn)), parts, self.gain,
                    y if bias is None else bias, y, y if h is None else h, *y.shape, parts.shape[0],
                    BIAS=bias is not None, SAVE_H=h is not None, ADD=self.add, BM=bm, BN=bn, num_warps=4,
                    num_stages=1)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """The prologue of butterfly_linear on x before the product: its columns times blocks, in the product's own tiles.

    blocks: float32 [K / size or 1, size, size], contiguous; size a power of two that divides every BK of "turned" in
    `tuned/`, whose rows say for how many rows of x there is a tile.
    """

    blocks: Tensor

    @property
    def size(self) -> int:
        return int(self.blocks.shape[-1])


def product(
    x: Tensor, w: _Weight, s: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None, y: Tensor,
    arch: str, gain: Gain | None = None, turn: Turn | None = None, sparse: bool = False,
) -> None:  # fmt: skip
    """y [M, N] = x W^T + scaling * s b^T + bias; with `gain` and `turn` as they say. x and y are contiguous.
    sparse: s is zero in whole tiles, whose b is not read."""
    from . import triton_kernels as kernels

    native.say_misaligned(x=x)
    (m, k), n = x.shape, y.shape[1]
    r = 0 if s is None else s.shape[1]
    b = x if b is None else b.contiguous()
    bias = None if bias is None else bias.contiguous()
    vendor = panels.use(x, w.dense, arch)
    whole = y  # what a launch without parts writes
    if vendor and gain is not None:
        whole = y.new_empty(y.shape) if gain.h is None else gain.h

    def run(c: tuning.Config) -> None:
        tiles = _cdiv(m, c.BM) * _cdiv(n, c.BN)
        # without steps the kernel writes what it starts from: s B^T and the bias
        parts, steps = (1, 0) if vendor else _split(k, c.BK, tiles, c.programs, 4)
        out = whole if parts == 1 else torch.empty((parts, m, n), dtype=torch.float32, device=x.device)
        here = None if vendor or parts > 1 else gain  # the kernel itself ends with it
        last = bias if gain is None or here is not None else None
        h = None if here is None else here.h
        if h is not None and c.BM * c.BN >= _LARGE:  # two results leave from it: with fewer warps it would spill
            c = replace(c, num_warps=max(c.num_warps, 8))
        host.launch(kernels.forward_kernel, (tiles, parts), x, *w.pointers, s if r else x, b,
                    x if last is None else last, out, x if here is None else here.gain, out if h is None else h,
                    None if turn is None else turn.blocks, m, n, k, r, *w.strides, steps, scaling, ADAPTER=r > 0,
                    BIAS=last is not None, GAIN=here is not None, SAVE_H=h is not None,
                    ADD=here is not None and here.add, **w.constants, PRECISION=_precision(x.dtype),
                    BM=c.BM, BN=c.BN, BK=c.BK, BR=_rank_tile(r, c.BR),
                    TURN=0 if turn is None else turn.size, ONE_TURN=turn is not None and len(turn.blocks) == 1,
                    SPARSE=sparse,
                    **_tiling(c, n, k))  # fmt: skip
        if parts > 1:
            if gain is None:
                _reduce(out, y, 1.0)
            else:
                gain.finish(out, gain.h, bias, y)

    started = r > 0 or (bias is not None and gain is None)

    def begin() -> None:
        if not (y.numel() and (started or not vendor)):
            return
        plain = w.plain and k % 16 == 0
        shape = tuning.Shape(m, n, k, r, x.element_size() * 8, plain, w.blocksize)
        once = vendor or (gain is not None and gain.add)  # to be run more than once it may not add to y
        kernel = "forward" if turn is None else "turned"
        run(tuning.choose(kernel, arch, shape, None if once else run))

    if not vendor:
        begin()
    else:
        panels.multiply(x, w, whole, started, True, arch, begin)
        if gain is not None:
            gain.finish(whole[None], None, bias, y)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor | None, b: Tensor | None, s: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None,
    need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [M, K], da [r, K], db [N, r]); empty where not needed."""
    dy = dy.contiguous()
    n, k = dy.shape[1], x.shape[1]
    arch = tuning.arch_of(dy.device)
    dx, da, db = (dy.new_empty((0,)) for _ in range(3))  # outputs of an op may not share memory
    ds: Tensor | None = None
    if a is not None and b is not None:
        a, b = a.contiguous(), b.contiguous()
        if need_ab:
            da, db = torch.empty_like(a), torch.empty_like(b)
        if a.shape[0] == 0:
            pass  # an adapter of rank 0 adds nothing
        elif need_ab:
            assert s is not None
            x = x.contiguous()
            off = _Dropout(0.0, None, 4, dy)
            ds = _outer(dy, s.contiguous(), b, db, (b.shape[1], 1), scaling, off, arch)
            assert ds is not None
            _outer(x, ds, None, da, (1, k), 1.0, _Dropout(dropout_p, seed, k, x), arch)
        else:
            # ds = scaling * dy b is a projection onto the columns of b
            ds = _project(dy, b.t().contiguous(), _Dropout(0.0, None, 4, dy), arch).mul_(scaling)
    if need_dx:
        w = _Weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, n, k,
                    dy.dtype)  # fmt: skip
        dx = _input_gradient(dy, w, ds, a, _Dropout(dropout_p, seed, k, dy), k, arch)
    return dx, da, db


def _input_gradient(
    dy: Tensor, w: _Weight, ds: Tensor | None, a: Tensor | None, drop: _Dropout, k: int, arch: str,
    out: Tensor | None = None, sparse: bool = False,
) -> Tensor:  # fmt: skip
    """dx = dy W + drop'(ds a), in `out` where it is given. sparse: ds is zero in whole tiles, whose a is not read."""
    from . import triton_kernels as kernels

    m, n = dy.shape
    r = 0 if ds is None else ds.shape[1]
    dx = dy.new_empty((m, k)) if out is None else out

    vendor = panels.use(dy, w.dense, arch, backward=True)

    def run(c: tuning.Config) -> None:
        tiles = _cdiv(m, c.BM) * _cdiv(k, c.BK)
        parts, steps = (1, 0) if vendor else _split(n, c.BN, tiles, c.programs, 4)
        out = dx if parts == 1 else torch.empty((parts, m, k), dtype=torch.float32, device=dy.device)
        host.launch(kernels.backward_kernel, (tiles, parts), dy, *w.pointers, dy if ds is None else ds,
                    dy if a is None else a, drop.seed, out, m, n, k, r, *w.strides, steps, *drop.arguments,
                    ADAPTER=r > 0, **drop.constants, **w.constants, PRECISION=_precision(dy.dtype), BM=c.BM, BN=c.BN,
                    BK=c.BK, BR=_rank_tile(r, c.BR), SPARSE=sparse, **_tiling(c, n, k))  # fmt: skip
        if parts > 1:
            _reduce(out, dx, 1.0)

    def begin() -> None:
        if dx.numel() and (r > 0 or not vendor):
            plain = w.plain and k % 16 == 0 and n % 16 == 0
            shape = tuning.Shape(m, n, k, r, dy.element_size() * 8, plain, w.blocksize)
            run(tuning.choose("backward", arch, shape, None if vendor else run))

    if not vendor:
        begin()
    else:
        panels.multiply(dy, w, dx, r > 0, False, arch, begin)
    return dx


BACKENDS = host.backends({"lora_linear": forward, "lora_linear_backward": backward})
