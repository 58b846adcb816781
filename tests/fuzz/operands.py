"""Makers of calls of linear layers and their weights; `layer_operands.py` has those of what is around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels.formats import BLOCKSIZES, FORMATS
from peft_kernels.ops.butterfly_linear import forward_op as butterfly_linear
from peft_kernels.ops.cayley import forward_op as cayley
from peft_kernels.ops.dora_linear import forward_op as dora_linear
from peft_kernels.ops.householder_rotate import forward_op as householder
from peft_kernels.ops.lora_linear import forward_op as lora_linear
from peft_kernels.ops.lora_mixture import forward_op as lora_mixture
from peft_kernels.ops.lora_shrink import STEP
from peft_kernels.ops.multi_lora_linear import forward_op as multi_lora_linear
from peft_kernels.row_groups import RowGroups
from peft_kernels.testing import random_affine_weight, random_quant_weight

from . import layer_operands  # noqa: F401  # their makers
from .draws import F32, FLOATS, Draw
from .makers import EXACT, MAKERS, Arguments, maker, missing  # noqa: F401  # of all makers


def weight(d: Draw, n: int, k: int, dtype: torch.dtype = F32, quantised: bool | None = None) -> Arguments:
    """[N, K] as operators take it: dense, or 4-bit with scales of every sort."""
    if quantised is None:
        quantised = d.maybe(0.6)
    if not quantised:
        return [d.tensor(n, k, dtype=d.one((dtype, *FLOATS))), None, None, None, None, 0, 64, 256]
    if d.maybe(0.5):
        return _in_groups(d, n, k)
    w = random_quant_weight(n, k, quant_type=d.one(("nf4", "fp4")), blocksize=d.one((*BLOCKSIZES[:3], 4096)),
                            nested=d.maybe(0.6), seed=d.random.randrange(2**30))  # fmt: skip
    packed, absmax, nested_absmax, nested_code, offset, *numbers = w.flatten()
    if nested_absmax is not None and d.maybe(0.5):
        numbers[2] = d.one((1, 3, 64))
        nested_absmax = torch.rand(-(-absmax.numel() // numbers[2]), generator=d.generator) * 0.02
    where = packed if d.place is None else d.place.empty(packed.numel(), torch.uint8, d.maybe(0.7)).copy_(packed)
    parts = [None if t is None else d.laid(t) for t in (absmax, nested_absmax, nested_code, offset)]
    return [where, *parts, *numbers]


def _in_groups(d: Draw, n: int, k: int) -> Arguments:
    """Integers by group of any sort, or blocks of GGUF where K has whole ones; the blocks lie anywhere in memory."""
    fit = [name for name, known in FORMATS.items() if known.blocksize and k % known.blocksize == 0]
    if k and fit and d.maybe(0.8):
        w = random_quant_weight(n, k, quant_type=d.one(fit), seed=d.random.randrange(2**30))
    else:
        w = random_affine_weight(
            n, k, d.one(("int4", "int8", "uint8")), d.one((16, 32, 64, 7, max(k, 1))), shifts=d.maybe(0.3),
            zeros=d.one(("codes", "values", None)), act_order=d.maybe(0.3), scales=d.one(FLOATS),
            seed=d.random.randrange(2**30),
        )  # fmt: skip
    packed, *parts = w.flatten()
    where = packed if d.place is None else d.place.empty(packed.numel(), torch.uint8, d.maybe(0.7)).copy_(
        packed.reshape(-1))  # fmt: skip
    return [where, *(d.laid(t) if isinstance(t, Tensor) else t for t in parts)]


def _adapter(d: Draw, n: int, k: int, least: int = 0) -> Arguments:
    r, dtype = d.one((d.size(20, least), d.size(300, least))) if d.maybe(0.2) else d.size(20, least), d.one(FLOATS)
    return [d.tensor(r, k, dtype=dtype), d.tensor(n, r, dtype=d.one((dtype, F32)))]


def _rows(d: Draw) -> tuple[int, int, int, torch.dtype]:
    """(M, N, K, dtype of x)"""
    k = d.one((32, 64, 160, 256, 512)) if d.maybe(0.3) else d.size(130)
    return d.size(), d.size(), k, d.one(FLOATS)


def _bias(d: Draw, n: int) -> Tensor | None:
    return d.tensor(n, dtype=d.one(FLOATS)) if d.maybe(0.4) else None


def _kept(d: Draw, results: Any, *which: int) -> list[Tensor]:
    """Tensors that a forward left for its backward, each in a place of its own."""
    return [d.laid(results[i].contiguous()) for i in which]


@maker("lora_linear")
def _lora(d: Draw) -> Arguments:
    m, n, k, dtype = _rows(d)
    a, b = _adapter(d, n, k) if d.maybe(0.8) else (None, None)
    return [d.tensor(m, k, dtype=dtype), *weight(d, n, k, dtype), n, a, b, d.number(), _bias(d, n), *d.dropout()]


@maker("lora_linear_backward")
def _lora_backward(d: Draw) -> Arguments:
    x, *w, n, a, b, scaling, _, p, seed = _lora(d)
    s = None if a is None else _kept(d, lora_linear.reference(x, *w, n, a, b, scaling, None, p, seed), 1)[0]
    dy = d.tensor(x.shape[0], n, dtype=x.dtype)
    return [dy, x, *w, a, b, s, scaling, p, seed, d.maybe(0.8), a is not None and d.maybe(0.8)]


@maker("grouped_linear")
def _grouped(d: Draw) -> Arguments:
    m, n, k, dtype = _rows(d)
    e, r = d.random.randint(1, 5), d.size(20)
    ends = sorted(d.random.randint(0, m) for _ in range(e))
    parts = weight(d, e * n, k, dtype)
    if parts[5] == 0:
        own = parts[0].dtype
        parts[0] = d.tensor(e, k, n, dtype=own).mT if d.maybe(0.5) else d.tensor(e, n, k, dtype=own)
    a, b = (d.tensor(e, *shape, dtype=dtype) for shape in ((r, k), (n, r)))
    ab, bias = [a, b] if d.maybe(0.8) else [None, None], d.tensor(e, n, dtype=d.one(FLOATS)) if d.maybe(0.4) else None
    return [d.tensor(m, k, dtype=dtype), *parts, d.integers([0, *ends]), n, *ab, d.number(), bias]


@maker("grouped_linear_backward")
def _grouped_backward(d: Draw) -> Arguments:
    x, *parts, n, a, b, scaling, _ = _grouped(d)
    dy = d.tensor(x.shape[0], n, dtype=x.dtype)
    return [dy, x, *parts, a, b, scaling, d.maybe(0.8), a is not None and d.maybe(0.8)]


@maker("lora_linear_stacked")
def _stacked(d: Draw) -> Arguments:
    m, n, k, dtype = _rows(d)
    calls = []
    for _ in range(d.random.randint(1, 4)):
        n = d.size()
        a, b = _adapter(d, n, k) if d.maybe(0.8) else (None, None)
        calls.append([*weight(d, n, k, dtype), n, a, b, d.number(), _bias(d, n), *d.dropout()])
    return [d.tensor(m, k, dtype=dtype), *(list(values) for values in zip(*calls, strict=True))]


@maker("lora_linear_stacked_backward")
def _stacked_backward(d: Draw) -> Arguments:
    x, *lists = _stacked(d)
    calls = []
    for *w, n, a, b, scaling, _, p, seed in zip(*lists, strict=True):
        s = None if a is None else _kept(d, lora_linear.reference(x, *w, n, a, b, scaling, None, p, seed), 1)[0]
        dy = d.tensor(x.shape[0], n, dtype=x.dtype)
        calls.append([dy, *w, a, b, s, scaling, p, seed, a is not None and d.maybe(0.8)])
    *each, need_ab = (list(values) for values in zip(*calls, strict=True))
    return [x, *each, d.maybe(0.8), need_ab]


def _plan(d: Draw, m: int, n: int, k: int) -> tuple[Arguments, Arguments]:
    """(a and b of a stack; which adapter each row has)"""
    ranks = [d.size(20) for _ in range(d.random.randint(0, 5))]
    starts, at = [], 0
    for r in ranks:
        at += d.random.randint(0, 2)
        starts.append(at)
        at += r
    p, dtype = at + d.random.randint(0, 2), d.one(FLOATS)
    stack = [d.tensor(p, k, dtype=dtype), d.tensor(p, n, dtype=d.one((dtype, F32)))]
    rows = [d.random.randrange(-1, len(ranks)) for _ in range(m)]
    scaling = d.laid(torch.tensor([d.number() for _ in ranks], dtype=F32))
    most = max(ranks, default=0) + d.random.choice((0, 0, 3))
    return stack, [d.integers(rows), d.integers(starts), d.integers(ranks), scaling, most]


@maker("multi_lora_linear")
def _multi(d: Draw) -> Arguments:
    m, n, k, dtype = _rows(d)
    stack, plan = _plan(d, m, n, k)
    return [d.tensor(m, k, dtype=dtype), *weight(d, n, k, dtype), n, *stack, *plan, _bias(d, n), *d.dropout()]


@maker("multi_lora_linear_backward")
def _multi_backward(d: Draw) -> Arguments:
    x, *w, n, a, b, adapters, starts, ranks, scaling, most, _, p, seed = _multi(d)
    plan = (adapters, starts, ranks, scaling, most)
    s = _kept(d, multi_lora_linear.reference(x, *w, n, a, b, *plan, None, p, seed), 1)
    dy = d.tensor(x.shape[0], n, dtype=x.dtype)
    return [dy, x, *w, a, b, *s, *plan, p, seed, d.maybe(0.8), d.maybe(0.8)]


@maker("lora_mixture")
def _mixture(d: Draw) -> Arguments:
    d.calm = True  # a weight of zero leaves an infinity out where its tile is left out
    (m, n, k, dtype), count, r = _rows(d), d.random.randint(1, 5), d.size(20)
    ab = d.one(FLOATS)
    mix = d.values(m, count)
    mix[torch.rand(m, count, generator=d.generator) < d.one((0.0, 0.5, 0.95))] = 0.0
    a, b = d.tensor(count, r, k, dtype=ab), d.tensor(n, count, r, dtype=d.one((ab, F32)))
    return [d.tensor(m, k, dtype=dtype), *weight(d, n, k, dtype), n, a, b, d.laid(mix), d.maybe(0.5), _bias(d, n),
            *d.dropout()]  # fmt: skip


@maker("lora_mixture_backward")
def _mixture_backward(d: Draw) -> Arguments:
    x, *w, n, a, b, mix, masked, _, p, seed = _mixture(d)
    s = _kept(d, lora_mixture.reference(x, *w, n, a, b, mix, masked, None, p, seed), 1)
    dy = d.tensor(x.shape[0], n, dtype=x.dtype)
    return [dy, x, *w, a, b, *s, mix, masked, p, seed, d.maybe(0.8), d.maybe(0.8), d.maybe(0.8)]


def _groups(d: Draw, m: int, slots: int) -> Arguments:
    """(adapters [m], order, bounds) of a batch that may have more rows, which have none."""
    rows = torch.tensor([d.random.randrange(-1, slots) for _ in range(m)] + [-1] * d.random.randint(0, 3)).long()
    return [d.laid(t) for t in RowGroups(rows, slots).rows(m)]


@maker("lora_shrink")
def _shrink(d: Draw) -> Arguments:
    (m, _, k, dtype), slots, r, kept = _rows(d), d.random.randint(0, 4), d.size(20), d.one(FLOATS)
    k = d.one((k, d.size(300)))
    a = [d.tensor(slots, r, k, dtype=kept) for _ in range(d.random.randint(1, 5))]
    parts = d.random.randint(1, max(1, -(-k // STEP)))
    return [d.tensor(m, k, dtype=dtype), a, *_groups(d, m, slots), d.number(), parts]


@maker("lora_expand")
def _expand(d: Draw) -> Arguments:
    (m, _, _, dtype), slots, r = _rows(d), d.random.randint(0, 4), d.size(20)
    kept, low, parts = d.one(FLOATS), d.one(FLOATS), d.random.randint(1, 3)
    widths = [d.size(40) for _ in range(d.random.randint(1, 5))]
    offsets, at = [], d.random.randint(0, 2)
    for width in widths:
        offsets.append(at)
        at += width
    s, b = [d.tensor(parts, m, r, dtype=low) for _ in widths], [d.tensor(slots, n, r, dtype=kept) for n in widths]
    n = max(at + d.random.randint(-2, 2), offsets[-1])  # the last may be cut
    y = torch.empty(m, n + 2, dtype=dtype).copy_(d.values(m, n + 2))[:, d.random.randint(0, 2) :][:, :n]  # written to
    return [y, s, b, *_groups(d, m, slots), offsets, d.maybe(0.5)]


@maker("dora_linear")
def _dora(d: Draw) -> Arguments:
    (m, n, k, dtype), (p, seed) = _rows(d), d.dropout()
    d.calm = d.calm or p > 0.0  # h may be x W^T less the rest, which an infinity that was dropped spoils
    return [d.tensor(m, k, dtype=dtype), *weight(d, n, k, dtype), n, *_adapter(d, n, k), d.tensor(n), d.number(),
            _bias(d, n), p, seed, d.maybe(0.5)]  # fmt: skip


MAKERS["dora_linear_normed"] = _dora


@maker("dora_linear_backward")
def _dora_backward(d: Draw) -> Arguments:
    x, *w, n, a, b, gain, scaling, _, p, seed, _ = _dora(d)
    results = dora_linear.reference(x, *w, n, a, b, gain, scaling, None, p, seed, True)
    h, s = _kept(d, results, 1, 2)
    need_gain = d.maybe(0.5)
    dy = d.tensor(x.shape[0], n, dtype=x.dtype)
    return [dy, x, *w, a, b, gain, h if need_gain else None, s, scaling, p, seed, d.maybe(0.8), d.maybe(0.8), need_gain]


@maker("squared_row_norms")
def _squares(d: Draw) -> Arguments:
    _, n, k, dtype = _rows(d)
    return [*weight(d, n, k, dtype), n, k]


@maker("dora_norm")
def _norm(d: Draw) -> Arguments:
    _, n, k, dtype = _rows(d)
    return [*weight(d, n, k, dtype), *_adapter(d, n, k), d.number(), None]


def _blocks(d: Draw, most: int = 24) -> tuple[int, Tensor]:
    """(features, blocks of a rotation)"""
    m = d.random.randint(1, 3)
    b = 2 * d.random.randint(1, most // 2) if m > 1 else d.random.randint(1, most)
    count = d.random.randint(1, 3) * 2 ** (m - 1)
    near = torch.eye(b) + d.values(m, 1 if d.maybe(0.2) else count, b, b) / (2 * b**0.5)
    return count * b, d.laid(near.to(d.one(FLOATS)))


@maker("butterfly_rotate")
def _rotate(d: Draw) -> Arguments:
    k, blocks = _blocks(d)
    return [d.tensor(d.size(), k, dtype=d.one(FLOATS)), blocks, d.maybe(0.5)]


@maker("butterfly_rotate_backward")
def _rotate_backward(d: Draw) -> Arguments:
    x, blocks, transposed = _rotate(d)
    return [d.tensor(*x.shape, dtype=x.dtype), x, blocks, transposed, d.maybe(0.8), d.maybe(0.8)]


@maker("butterfly_linear")
def _turned(d: Draw) -> Arguments:
    (m, n, _, dtype), (k, blocks), gain = _rows(d), _blocks(d), d.maybe(0.5)
    return [d.tensor(m, k, dtype=dtype), blocks, *weight(d, n, k, dtype), n, d.tensor(n) if gain else None, _bias(d, n),
            gain and d.maybe(0.5)]  # fmt: skip


@maker("butterfly_linear_backward")
def _turned_backward(d: Draw) -> Arguments:
    x, blocks, *w, n, gain, _, _ = _turned(d)
    h = None if gain is None else _kept(d, butterfly_linear.reference(x, blocks, *w, n, gain, None, True), 1)[0]
    need_gain = gain is not None and d.maybe(0.6)
    dy = d.tensor(x.shape[0], n, dtype=x.dtype)
    return [dy, x, blocks, *w, gain, h if need_gain else None, d.maybe(0.8), d.maybe(0.8), need_gain]


@maker("cayley")
def _cayley(d: Draw) -> Arguments:
    b, d.calm = d.size(24, 1), True  # of a block with an infinity, LAPACK's results are finite in part
    full = d.values(d.size(6), b, b) / (2 * b**0.5)
    return [d.laid((full - full.mT) / 2), d.one((0, 0, 1, 2, 5))]


@maker("cayley_backward")
def _cayley_backward(d: Draw) -> Arguments:
    q, terms = _cayley(d)
    r = cayley.reference(q.contiguous().nan_to_num(0.0, 0.0, 0.0), terms)
    return [d.tensor(*q.shape), q, d.laid(r), terms]


@maker("householder_rotate")
def _householder(d: Draw) -> Arguments:
    r, k = d.size(20), d.size()
    return [d.tensor(d.size(), k, dtype=d.one(FLOATS)), d.tensor(r, k, dtype=d.one(FLOATS)),
            d.tensor(r, k, dtype=d.one(FLOATS))]  # fmt: skip


@maker("householder_rotate_backward")
def _householder_backward(d: Draw) -> Arguments:
    x, u, v = _householder(d)
    s = _kept(d, householder.reference(x, u, v), 1)
    return [d.tensor(*x.shape, dtype=x.dtype), x, u, v, *s, d.maybe(0.8), d.maybe(0.8)]


@maker("pair_rotate")
def _pairs(d: Draw) -> Arguments:
    half = d.size(12, 1)
    k = 2 * half * d.size(5)
    return [d.tensor(d.size(), k, dtype=d.one(FLOATS)), *(d.tensor(k, dtype=d.one(FLOATS)) for _ in range(2)), half]


@maker("pair_rotate_backward")
def _pairs_backward(d: Draw) -> Arguments:
    x, first, second, half = _pairs(d)
    return [d.tensor(*x.shape, dtype=x.dtype), x, first, second, half, d.maybe(0.8), d.maybe(0.8)]


@maker("quantize_4bit")
def _quantize(d: Draw) -> Arguments:
    shape = [d.size() for _ in range(d.random.randint(0, 3))]
    return [d.tensor(*shape, dtype=d.one(FLOATS)), d.one((1, 2)), d.one(BLOCKSIZES), d.maybe(0.5), d.one((32, 256))]


@maker("dequantize_4bit")
def _dequantize(d: Draw) -> Arguments:
    n, k = d.size(), d.size(130)
    return [*weight(d, n, k, quantised=True), [n, k], d.one(FLOATS)]
