"""Prepared calls: they keep what they looked at, so what they keep is changed, freed and cut under them here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels import PreparedCall, Projection, QuantWeight, RowPlan, RowProjection
from peft_kernels.checks import in_memory
from peft_kernels.formats import AdapterStack
from peft_kernels.prepared import _ONE_BY_ONE
from peft_kernels.testing import random_quant_weight

from .cases import CLEAR, _both_refuse, describe, differs
from .draws import FLOATS, Draw

Made = tuple[list[Any], list[Tensor]]  # (arguments beside x, those of its tensors that are trained)


def _weight(d: Draw, n: int, k: int) -> Any:
    if d.maybe(0.4):
        return d.values(n, k)
    return random_quant_weight(n, k, nested=d.maybe(0.6), seed=d.random.randrange(2**30))


def _factors(d: Draw, n: int, k: int) -> tuple[Tensor, Tensor]:
    r, dtype = d.size(12, 1), d.one(FLOATS)
    return d.values(r, k, dtype=dtype).requires_grad_(), d.values(n, r, dtype=dtype).requires_grad_()


def _bias(d: Draw, n: int) -> Tensor | None:
    return d.values(n) if d.maybe(0.5) else None


def _lora(d: Draw, m: int, k: int) -> Made:
    n = d.size(40, 1)
    a, b = _factors(d, n, k)
    return [_weight(d, n, k), a, b, d.number(), _bias(d, n)], [a, b]


def _normed(d: Draw, m: int, k: int) -> Made:
    n = d.size(40, 1)
    (a, b), magnitude = _factors(d, n, k), torch.rand(n).requires_grad_()
    return [_weight(d, n, k), a, b, magnitude, d.number(), _bias(d, n)], [a, b, magnitude]


def _gained(d: Draw, m: int, k: int) -> Made:
    n = d.size(40, 1)
    return [_weight(d, n, k), *_factors(d, n, k), torch.rand(n), None, d.number(), _bias(d, n)], []


def _stacked(d: Draw, m: int, k: int) -> Made:
    parts = [_lora(d, m, k) for _ in range(d.random.randint(1, 3))]
    return [Projection(*given) for given, _ in parts], [t for _, leaves in parts for t in leaves]


def _mlp(d: Draw, m: int, k: int) -> Made:
    features, fused = 2 * d.size(20, 1), d.one((None, "halves", "pairs"))

    def one(n: int, k: int) -> Projection:
        return Projection(_weight(d, n, k), *_factors(d, n, k), d.number(), _bias(d, n))

    up = one(features, k) if fused is None and d.maybe(0.7) else None
    down = one(d.size(40, 1), features // 2 if fused else features)
    act, limit, gate = d.one(("silu", "gelu", "relu2")), d.one((0.0, 2.0)), one(features, k)
    leaves = [t for p in (gate, up, down) if p is not None for t in (p.a, p.b) if t is not None]
    return [gate, up, down, act, fused, None, limit, 0.0], leaves


def _rms(d: Draw, m: int, k: int) -> Made:
    weight = d.values(k, dtype=d.one(FLOATS)) if d.maybe(0.8) else None
    return [weight, 1e-5, d.one((0.0, 1.0)) if weight is not None else 0.0], []


def _layer(d: Draw, m: int, k: int) -> Made:
    dtype = d.one(FLOATS)
    return [*(d.values(k, dtype=dtype) if d.maybe(0.7) else None for _ in range(2)), 1e-5], []


def _by_row(d: Draw, m: int, k: int) -> Made:
    n, count, dtype = d.size(40, 1), d.random.randint(1, 3), d.one(FLOATS)
    ranks = [d.size(8, 1) for _ in range(count)]
    a = [d.values(r, k, dtype=dtype).requires_grad_() for r in ranks]
    b = [d.values(n, r, dtype=dtype).requires_grad_() for r in ranks]
    plan = RowPlan([d.random.randrange(-1, count) for _ in range(m)])
    return [RowProjection(_weight(d, n, k), a, b, [d.number() for _ in ranks], plan, _bias(d, n))], [*a, *b]


def _multi(d: Draw, m: int, k: int) -> Made:
    n = d.size(40, 1)
    with torch.no_grad():
        stack = AdapterStack.pack([(*_factors(d, n, k), d.number()) for _ in range(d.random.randint(1, 3))])
    rows = torch.tensor([d.random.randrange(-1, len(stack.ranks)) for _ in range(m)])
    return [_weight(d, n, k), stack, rows, _bias(d, n)], []


def _mixture(d: Draw, m: int, k: int) -> Made:
    n, count, r, dtype = d.size(40, 1), d.random.randint(1, 3), d.size(8, 1), d.one(FLOATS)
    a, b = d.values(count, r, k, dtype=dtype), d.values(n, count, r, dtype=dtype).transpose(0, 1)
    scaling = [d.number() for _ in range(count)] if d.maybe(0.5) else d.number()
    return [_weight(d, n, k), a, b, d.values(m, count), scaling, _bias(d, n)], []


MAKERS: dict[str, Callable[[Draw, int, int], Made]] = {
    "dora_linear": _gained,
    "dora_linear_normed": _normed,
    "gated_mlp": _mlp,
    "layer_norm": _layer,
    "lora_linear": _lora,
    "lora_linear_by_row": _by_row,
    "lora_linear_stacked": _stacked,
    "lora_mixture": _mixture,
    "multi_lora_linear": _multi,
    "rms_norm": _rms,
}
_SEVERAL = ("lora_linear_by_row", "lora_linear_stacked")
_WITHOUT_GRAPH = ("dora_linear", "lora_mixture", "multi_lora_linear")


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (QuantWeight, AdapterStack)):
        return [t for v in vars(value).values() for t in tensors_of(v)]
    return [t for v in value for t in tensors_of(v)] if isinstance(value, (list, tuple)) else []


def _resized(size: Callable[[Tensor], int]) -> Callable[[Tensor], object]:
    return lambda t: t.untyped_storage().resize_(size(t))


def _freed_and_taken(t: Tensor) -> None:
    """Its memory is freed and a part of it taken again, perhaps where it was."""
    size = t.nbytes
    t.untyped_storage().resize_(0)
    t.untyped_storage().resize_(size // 3)


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "freed": _resized(lambda t: 0),
    "cut": _resized(lambda t: t.nbytes // 2),
    "freed and taken": _freed_and_taken,
    "data =": lambda t: setattr(t, "data", t.data.clone() + 1),
    "data = shorter": lambda t: setattr(t, "data", t.data[:-1].clone()),
    "data = transposed": lambda t: setattr(t, "data", t.data.transpose(0, -1)),
    "data = strided": lambda t: setattr(t, "data", t.data.repeat_interleave(2, -1)[..., ::2]),
    "data = of a freed": lambda t: setattr(t, "data", _freed_half(t.data)),
    "set_": lambda t: t.set_(t.detach().clone()),  # type: ignore[call-overload]
    "written": lambda t: t.data.copy_(t.data.flip(0)),
    "nothing": lambda t: None,
}


FORMS = ("data = shorter", "data = transposed", "data = strided", "data = of a freed", "written")


def _in_stack(arguments: list[Any], t: Tensor) -> bool:
    return any(isinstance(v, AdapterStack) and any(t is own for own in tensors_of(v)) for v in arguments)


def _freed_half(t: Tensor) -> Tensor:
    pair = torch.cat([t.reshape(-1), t.reshape(-1)])
    view = pair[t.numel() :].view(t.shape)
    pair.untyped_storage().resize_(t.nbytes)
    return view


def case(seed: int) -> str | None:
    """Run the calls of a seed: a text of a failure, or None."""
    d = Draw(seed, calm=True)
    name, graph = d.one([*_ONE_BY_ONE]), d.maybe(0.6)
    if name not in MAKERS:
        return f"tests/fuzz/prepared_calls.py makes no arguments of {name}"
    graph = (graph and name not in _WITHOUT_GRAPH) or name == "lora_linear_by_row"
    m, k = d.size(20, 1), d.size(80, 1)
    arguments, leaves = MAKERS[name](d, m, k)
    x = d.values(m, k, dtype=d.one(FLOATS)).requires_grad_(graph)
    function, several = getattr(pk, name), name in _SEVERAL
    call = PreparedCall(function)
    target = d.one([x, *tensors_of(arguments)])
    # a stack's tensors keep their form, and a scalar has none; memory taken again is seen of x alone
    ways = [w for w in CHANGES if not (w in FORMS and (not target.dim() or _in_stack(arguments, target)))]
    way, late = d.one([w for w in ways if target is x or w != "freed and taken"]), graph and d.maybe(0.4)
    what = f"seed {seed}: {name}, {way} of {describe(target)}, {'between forward and backward' if late else 'before'}"

    def public_of(given: Tensor, own: list[Any]) -> Any:
        return function(given, own) if several else function(given, *own)

    def public(given: Tensor) -> Any:
        return public_of(given, arguments)

    def terms() -> Any:
        return _terms(public_of, x, arguments, leaves, graph)

    def prepared(given: Tensor) -> Any:
        return call(given, *arguments)

    def change() -> None:
        with torch.no_grad():
            CHANGES[way](target)

    with torch.set_grad_enabled(graph):
        for _ in range(2):
            why = _compare(_forward(prepared, x), _forward(public, x), None, terms)
            if why:
                return f"{why} ({what}; before the change)"
        if not graph or not late:
            change()
            got, wanted = _steps(prepared, x, leaves, graph), _steps(public, x, leaves, graph)
        else:
            held = [_forward(fn, x) for fn in (prepared, public)]
            if way not in ("freed", "cut", "freed and taken"):
                return None  # what a backward computes with is what was saved, by whoever saves it
            change()
            got, wanted = (_backward(ys, x, leaves) for ys in held)
            if isinstance(got, CLEAR):
                return None  # the public function may have saved a copy
    why = _compare(got, wanted, way, terms)
    return f"{why} ({what})" if why else None


def _forward(fn: Callable[[Tensor], Any], x: Tensor) -> Any:
    try:
        ys = fn(x)
        return [ys] if isinstance(ys, Tensor) else [*ys]
    except Exception as e:
        return e


def _backward(ys: Any, x: Tensor, leaves: list[Tensor]) -> Any:
    if isinstance(ys, Exception):
        return ys
    try:
        return [t for t in torch.autograd.grad([y.sum() for y in ys], [x, *leaves], allow_unused=True) if t is not None]
    except Exception as e:
        return e


def _steps(fn: Callable[[Tensor], Any], x: Tensor, leaves: list[Tensor], graph: bool) -> Any:
    ys = _forward(fn, x)
    if not graph or isinstance(ys, Exception):
        return ys
    grads = _backward(ys, x, leaves)
    return grads if isinstance(grads, Exception) else [*ys, *grads]


def _sizes(value: Any, made: dict[int, Tensor]) -> Any:
    """An argument in float32 with all numbers absolute, weights decoded. made: tensors by the id of their own."""
    if isinstance(value, QuantWeight):
        return pk.dequantize_4bit(value, torch.float32).abs()
    if isinstance(value, AdapterStack):
        return replace(value, a=_sizes(value.a, made), b=_sizes(value.b, made), scaling=value.scaling.abs())
    if isinstance(value, Tensor) and value.is_floating_point():
        if id(value) not in made:
            made[id(value)] = value.detach().float().abs().requires_grad_(value.requires_grad)
        return made[id(value)]
    if isinstance(value, (Projection, RowProjection)):
        return type(value)(*(_sizes(v, made) for v in value))
    if isinstance(value, (list, tuple)):
        return [_sizes(v, made) for v in value]
    return abs(value) if isinstance(value, float) else value


def _terms(
    public: Callable[[Tensor, list[Any]], Any], x: Tensor, arguments: list[Any], leaves: list[Tensor], graph: bool
) -> Any:
    """Results and gradients of absolute numbers: rounding goes with these, on both sides. float32 has them to its eps,
    since nothing cancels."""
    made: dict[int, Tensor] = {}
    given, own = _sizes([x, arguments], made)
    with torch.set_grad_enabled(graph):
        return _steps(lambda x: public(x, own), given, [made[id(t)] for t in leaves], graph)


def _compare(got: Any, wanted: Any, way: str | None, terms: Callable[[], Any]) -> str | None:
    """Why the prepared call is wrong. Both sides round, so what may lie between goes with the terms of their sums."""
    if isinstance(got, Exception) or isinstance(wanted, Exception):
        return _both_refuse(got, wanted, way)
    for i, (a, e) in enumerate(zip(got, wanted, strict=True)):
        if not (in_memory(a) and in_memory(e)):
            continue
        a, e = a.detach(), e.detach()
        why = differs(a, e, e, False)
        if why and not isinstance(sums := terms(), Exception):
            largest = float(sums[i].abs().max())
            why = differs(a, e, e, False, terms=largest if isfinite(largest) else 0.0)
        if why:
            return f"result {i}: {why}"
    return None
