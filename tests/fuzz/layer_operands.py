"""Makers of calls of the operators of transformers' layers: norms, activations, attention."""

from __future__ import annotations

import torch

from peft_kernels.ops.attention import forward_op as attention
from peft_kernels.ops.gated import RELU2, SILU, parts_of

from .draws import F16, F32, FLOATS, Draw
from .makers import Arguments, maker


@maker("rms_norm")
def _rms(d: Draw) -> Arguments:
    shape = [d.size(20) for _ in range(d.random.randint(0, 2))] + [d.size(300, 2)]
    scale = d.tensor(shape[-1], dtype=d.one(FLOATS)) if d.maybe(0.8) else None
    offset = d.one((0.0, 1.0)) if scale is not None else 0.0
    return [d.tensor(*shape, dtype=d.one(FLOATS)), scale, d.one((1e-6, 1e-5, 0.1)), offset]


@maker("rms_norm_backward")
def _rms_backward(d: Draw) -> Arguments:
    d.calm = True
    x, *rest = _rms(d)
    return [d.tensor(*x.shape, dtype=x.dtype), x, *rest, d.maybe(0.8), d.maybe(0.5)]


@maker("layer_norm")
def _layer_norm(d: Draw) -> Arguments:
    x, scale, eps, _ = _rms(d)
    return [x, scale, d.tensor(x.shape[-1], dtype=F32 if scale is None else scale.dtype) if d.maybe(0.7) else None, eps]


@maker("layer_norm_backward")
def _layer_norm_backward(d: Draw) -> Arguments:
    d.calm = True
    x, scale, eps, _ = _rms(d)
    return [d.tensor(*x.shape, dtype=x.dtype), x, scale, eps, d.maybe(0.8), d.maybe(0.5)]


@maker("gated")
def _gated(d: Draw) -> Arguments:
    shape, dtype = [d.size() for _ in range(d.random.randint(0, 3))], d.one(FLOATS)
    gate, up = d.tensor(*shape, dtype=dtype), d.tensor(*shape, dtype=dtype) if d.maybe(0.7) else None
    if shape and up is not None and d.maybe(0.3):
        gate, up = parts_of(d.tensor(*shape[:-1], 2 * shape[-1], dtype=dtype), d.one((1, 2)))
    act = d.random.randint(SILU, RELU2)
    shift = d.one((0.0, 1.0)) if up is not None else 0.0
    return [gate, up, act, d.one((1.0, 1.702)), d.one((0.0, 0.0, 0.7, 7.0)), shift]


@maker("gated_backward")
def _gated_backward(d: Draw) -> Arguments:
    gate, up, *numbers = _gated(d)
    fused = d.random.randint(0, 2) if up is not None and gate.dim() else 0
    return [gate, up, d.tensor(*gate.shape, dtype=gate.dtype), *numbers, fused]


@maker("attention")
def _attention(d: Draw) -> Arguments:
    batch, tokens, groups = d.random.randint(0 if d.maybe(0.1) else 1, 3), d.size(40), d.random.randint(1, 3)
    heads, size, width = groups * d.random.randint(1, 3), *(2 * d.random.randint(1, 20) for _ in range(2))
    dtype, tables, d.calm = d.one(FLOATS), d.one((F32, F16)), True  # of infinite scores some sums have NaNs
    keys = tokens if d.maybe(0.5) else d.size(60)
    if d.maybe(0.2):
        tokens = 1
    q = d.tensor(batch, tokens, heads, size, dtype=dtype)
    k, v = (d.tensor(batch, keys, groups, n, dtype=dtype) for n in (size, width))
    cos = sin = spans = keep = bias = slopes = sinks = None
    if keys == tokens and d.maybe(0.5):
        half = d.random.randint(0, size // 2)
        angle = torch.rand(1 if d.maybe(0.5) else batch, tokens, half, generator=d.generator).repeat(1, 1, 2) * 6
        cos, sin = d.laid(angle.cos().to(tables)), d.laid(angle.sin().to(tables))
    if d.maybe(0.3):
        ends = torch.rand(batch, tokens, 2, generator=d.generator).sort(-1).values * (keys + 1)
        spans = d.laid(ends.to(torch.int32).clamp(max=keys))
    if d.maybe(0.4):
        keep = d.laid(torch.rand(batch, tokens, keys, generator=d.generator) > 0.4)
    if d.maybe(0.3):
        bias = d.tensor(batch, heads, tokens, keys, dtype=tables)
    if d.maybe(0.2):
        slopes = d.laid(torch.rand(heads, generator=d.generator))
    if d.maybe(0.3):
        sinks = d.tensor(heads)
    window, softcap = d.size(30) if d.maybe(0.3) else 0, 3.0 if d.maybe(0.3) else 0.0
    tables, pairs, causal = [cos, sin, spans, keep, bias, slopes, sinks], d.maybe(0.3), d.maybe(0.6)
    return [q, k, v, *tables, size**-0.5, pairs, causal, window, softcap, *d.dropout()]


@maker("attention_backward")
def _attention_backward(d: Draw) -> Arguments:
    args = _attention(d)
    y, lse = (d.laid(t) for t in attention.reference(*args))
    return [d.tensor(*y.shape, dtype=y.dtype), *args[:3], y, lse, *args[3:9], *args[10:]]
