"""Operands: what every operator asks of them, their memory, devices, layouts, and the parts of a 4-bit weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels import Fingerprint, PreparedCall, QuantWeight, adamw, dispatch, dora_norm, lora_linear, use_backend
from peft_kernels.native import available
from peft_kernels.testing import random_quant_weight
from tests.fuzz.draws import Draw
from tests.fuzz.hostile import cut_behind, cut_storage, freed, freed_view
from tests.fuzz.operands import MAKERS

GONE: dict[str, Callable[[Tensor], Tensor]] = {
    "freed": freed, "a freed view": freed_view, "cut": cut_storage, "cut before it": cut_behind,
}  # fmt: skip
IN_MEMORY = "must be in memory: .* do not fit its storage, which was freed or cut"
BACKENDS = ["reference", *([] if available() else ["native"])]


def with_others(args: list[Any], change: Callable[[Tensor], Tensor]) -> list[tuple[int, list[Any]]]:
    """(its place, the arguments) with each tensor in turn changed, in lists the last one."""
    found = []
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.numel():
            found.append((i, [*args[:i], change(value), *args[i + 1 :]]))
        elif isinstance(value, list) and value and isinstance(value[-1], Tensor) and value[-1].numel():
            found.append((i, [*args[:i], [*value[:-1], change(value[-1])], *args[i + 1 :]]))
    return found


def a_call(op: str) -> list[Any]:
    """Of several elements in everything, with a nested weight where there is one."""
    for seed in range(1000):
        args = MAKERS[op](Draw(seed, calm=True))
        tensors = [t for v in args for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
        nested = op.startswith(("quantize", "rms", "layer", "gated", "attention", "cayley", "house", "pair",
                                "butterfly_rotate", "lora_shrink", "lora_expand"))  # fmt: skip
        nested = nested or (any(t.dtype is torch.uint8 for t in tensors) and 256 in [t.numel() for t in tensors])
        if nested and all(t.numel() for t in tensors):
            return args
    raise AssertionError(op)


@pytest.mark.parametrize("op", sorted(dispatch.ops()))
def test_memory_devices_and_layouts_are_looked_at_by_every_operator(op: str) -> None:
    raw, args = dispatch.ops()[op], a_call(op)
    for backend in BACKENDS:
        with torch.no_grad(), use_backend(**{op: backend}):
            for change in GONE.values():
                for i, spoilt in with_others(args, change):
                    name = rf"{op}: {raw.operands.names[i]}(\[\d\])? "
                    with pytest.raises(ValueError, match=name + IN_MEMORY):
                        raw.op(*spoilt)
            for i, spoilt in with_others(args, lambda t: t.to("meta"))[1:]:
                first = raw.operands.names[0]
                if raw.operands.names[i] != "seed":
                    with pytest.raises(ValueError, match=rf"must be on (cpu|meta) like {first}, got (cpu|meta)"):
                        raw.op(*spoilt)
            for _, spoilt in with_others(args, lambda t: t.to_sparse() if t.dim() else freed(t)):
                with pytest.raises((ValueError, RuntimeError)):
                    raw.op(*spoilt)
            for i, spoilt in with_others(args, lambda t: None):  # type: ignore[arg-type, return-value]
                if i not in raw.operands.optional and i not in raw.operands.lists:
                    with pytest.raises((TypeError, RuntimeError)):
                        raw.op(*spoilt)


CUT: list[tuple[dict[str, Callable[[Any], Any]], type[Exception], str]] = [
    ({"packed": lambda t: t[:-1]}, ValueError, "bytes for shape"),
    ({"packed": lambda t: t.float()}, TypeError, "uint8"),
    ({"absmax": lambda t: t[:-1]}, ValueError, "absmax must be 8 scales"),
    ({"absmax": lambda t: t.float()}, TypeError, "absmax must be uint8 codes when nested"),
    ({"nested_absmax": lambda t: t[:0]}, ValueError, "nested_absmax must be 1 float32 values, got 0"),
    ({"nested_absmax": lambda t: t.double()}, TypeError, "nested_absmax must be float32"),
    ({"nested_absmax": lambda t: None}, TypeError, "absmax must be float32 when it is not nested"),
    ({"nested_code": lambda t: t[:10]}, ValueError, "nested_code must be 256 float32 values, got 10"),
    ({"nested_code": lambda t: t[:255]}, ValueError, "nested_code must be 256 float32 values, got 255"),
    ({"nested_code": lambda t: None}, ValueError, "nested_code must be 256 float32 values, got None"),
    ({"nested_code": lambda t: t.half()}, TypeError, "nested_code must be float32"),
    ({"offset": lambda t: t.repeat(2)}, ValueError, "offset must be 1 float32 values, got 2"),
    ({"offset": lambda t: None}, ValueError, "offset must be 1 float32 values, got None"),
    ({"offset": lambda t: t.double()}, TypeError, "offset must be float32"),
    ({"blocksize": lambda n: 0}, ValueError, "blocksize must be one of"),
    ({"blocksize": lambda n: -64}, ValueError, "blocksize must be one of"),
    ({"nested_blocksize": lambda n: 0}, ValueError, "nested_blocksize must be positive, got 0"),
    ({"nested_blocksize": lambda n: 1}, ValueError, "nested_absmax must be 8 float32 values, got 1"),
]
FIELDS = ("packed", "absmax", "nested_absmax", "nested_code", "offset", "quant_type", "blocksize", "nested_blocksize")


@pytest.mark.parametrize(("cut", "error", "text"), CUT)
def test_parts_of_a_weight_that_do_not_fit_are_refused_when_made_and_by_every_operator(
    cut: dict[str, Callable[[Any], Any]], error: type[Exception], text: str
) -> None:
    good = random_quant_weight(8, 64, nested=True)
    ((part, change),) = cut.items()
    fields = {**vars(good), part: change(getattr(good, part))}
    fields.pop("_flat", None)
    with pytest.raises(error, match=f"QuantWeight: .*{text}"):
        QuantWeight(**fields)
    flat = [*good.flatten()]
    flat[FIELDS.index(part)] = change(flat[FIELDS.index(part)])
    calls = _calls(flat)
    takes = {op for op, raw in dispatch.ops().items() if "nested_code" in raw.operands.names}
    assert set(calls) == takes, "a call of each operator that takes 4-bit weights"
    for op, args in calls.items():
        with pytest.raises(error, match=f"{op.replace('_stacked', '').removesuffix('_normed')}: .*{text}"):
            dispatch.ops()[op].op(*args)


def _calls(w: list[Any]) -> dict[str, list[Any]]:
    x, dy, a, b = torch.randn(3, 64), torch.randn(3, 8), torch.randn(2, 64), torch.randn(8, 2)
    s, blocks, gain = x @ a.t(), torch.randn(2, 16, 4, 4), torch.ones(8)
    plan = (torch.tensor([0, 0, -1]), torch.zeros(1, dtype=torch.int64), torch.tensor([2]), torch.ones(1), 2)
    lists, ends = [[value] for value in (*w, 8, a, b, 1.0, None, 0.0, None)], torch.tensor([0, 1, 3])
    return {
        "dequantize_4bit": [*w, [8, 64], torch.float32],
        "lora_linear": [x, *w, 8, a, b, 1.0, None, 0.0, None],
        "lora_linear_backward": [dy, x, *w, a, b, s, 1.0, 0.0, None, True, True],
        "lora_linear_stacked": [x, *lists],
        "lora_linear_stacked_backward": [x, [dy], *lists[:8], *lists[9:11], [s], lists[11], *lists[13:], True, [True]],
        "multi_lora_linear": [x, *w, 8, a, b.t(), *plan, None, 0.0, None],
        "multi_lora_linear_backward": [dy, x, *w, a, b.t(), s, *plan, 0.0, None, True, True],
        "lora_mixture": [x, *w, 8, a[None], b[:, None], torch.ones(3, 1), False, None, 0.0, None],
        "lora_mixture_backward": [dy, x, *w, a[None], b[:, None], s[:, None], torch.ones(3, 1), False, 0.0, None, True,
                                  True, True],
        "grouped_linear": [x, *w, ends, 4, torch.stack((a, a)), b.view(2, 4, 2), 1.0, None],
        "grouped_linear_backward": [dy[:, :4], x, *w, ends, torch.stack((a, a)), b.view(2, 4, 2), 1.0, True, True],
        "squared_row_norms": [*w, 8, 64],
        "dora_norm": [*w, a, b, 1.0, None],
        "dora_linear": [x, *w, 8, a, b, gain, 1.0, None, 0.0, None, True],
        "dora_linear_normed": [x, *w, 8, a, b, gain, 1.0, None, 0.0, None, True],
        "dora_linear_backward": [dy, x, *w, a, b, gain, dy, s, 1.0, 0.0, None, True, True, True],
        "butterfly_linear": [x, blocks, *w, 8, gain, None, True],
        "butterfly_linear_backward": [dy, x, blocks, *w, gain, dy, True, True, True],
    }


def test_strided_parts_of_a_weight_and_a_strided_bias_are_read_as_they_are() -> None:
    w, x = random_quant_weight(40, 192, nested=True, blocksize=32), torch.randn(3, 192)
    strided = {n: getattr(w, n).repeat_interleave(2)[::2] for n in ("absmax", "nested_absmax", "nested_code")}
    other = QuantWeight(**{**{k: v for k, v in vars(w).items() if k != "_flat"}, **strided})
    bias = torch.randn(40)
    assert not other.nested_code.is_contiguous()
    expected = lora_linear(x, w, bias=bias)
    assert torch.equal(lora_linear(x, other, bias=bias.repeat_interleave(2)[::2]), expected)


@pytest.mark.parametrize("name", ["s", "h", "lse"])
def test_what_a_backward_takes_back_is_of_the_forward(name: str) -> None:
    for op, raw in dispatch.ops().items():
        if name not in raw.operands.names:
            continue
        at = raw.operands.names.index(name)
        args = next(a for seed in range(1000) if (a := MAKERS[op](Draw(seed, calm=True)))[at] is not None
                    and (isinstance(a[at], Tensor) or a[at][0] is not None) and a[0].numel())  # fmt: skip
        for change in (lambda t: t[:-1], lambda t: t.to(torch.bfloat16 if t.dtype is torch.float32 else torch.float32)):
            kept = args[at]
            spoilt = [change(kept[0]), *kept[1:]] if isinstance(kept, list) else change(kept)
            with pytest.raises(ValueError, match=f"{name} must be .* as the forward returned it"):
                raw.op(*args[:at], spoilt, *args[at + 1 :])


def _weights() -> list[Any]:
    return [torch.randn(24, 64), random_quant_weight(24, 64, nested=True)]


@pytest.mark.parametrize("gone", GONE)
def test_public_functions_read_nothing_that_is_gone(gone: str) -> None:
    """Before their operators look, they copy what is not contiguous or of another dtype."""
    change, x = GONE[gone], torch.randn(2, 5, 64)
    a, b, blocks = torch.randn(3, 64), torch.randn(24, 3), torch.randn(1, 16, 4, 4)
    lost, column = torch.randn(5, 2, 64).transpose(0, 1), change(torch.randn(24, 1))
    lost.untyped_storage().resize_(0 if gone.endswith("freed") or "view" in gone else lost.nbytes // 2)
    adapters, rows = change(torch.zeros(2, dtype=torch.int64)), pk.RowGroups(torch.zeros(5, dtype=torch.int64), 2)
    calls: list[Callable[[], Any]] = [
        lambda: pk.butterfly_rotate(lost, blocks), lambda: pk.pair_rotate(lost, torch.ones(64), torch.ones(64), 1),
        lambda: pk.householder_rotate(lost, torch.randn(64, 2)),
        lambda: pk.householder_rotate(x, change(torch.randn(64, 3))),
        lambda: pk.rms_norm(lost, torch.ones(64), 1e-6), lambda: pk.gated(lost, lost),
        lambda: pk.lora_shrink(x[0], [change(torch.randn(2, 3, 64))], rows),
        lambda: pk.lora_expand(x[0], [torch.randn(1, 5, 3)], [change(torch.randn(2, 64, 3))], rows, [0]),
        lambda: pk.squared_row_norms(change(torch.randn(24, 64))), lambda: pk.quantize_4bit(lost),
    ]  # fmt: skip
    stack = pk.AdapterStack.pack([(a, b, 1.0)])
    for w in _weights():
        calls += [
            lambda w=w: lora_linear(lost, w, a, b), lambda w=w: lora_linear(x, w, change(a), b),
            lambda w=w: pk.lora_linear_stacked(lost, [pk.Projection(w)]),
            lambda w=w: pk.butterfly_linear(lost, w, blocks),
            lambda w=w: pk.butterfly_linear(x, w, blocks, gain=column),
            lambda w=w: pk.dora_linear(lost, w, a, b, torch.ones(24), None),
            lambda w=w: pk.dora_linear(x, w, a, b, column, None),
            lambda w=w: pk.multi_lora_linear(x, w, stack, adapters),
            lambda w=w: pk.lora_mixture(lost, w, [a], [b], torch.ones(1)),
            lambda w=w: pk.lora_mixture(x, w, [a], [change(b)], torch.ones(1)),
            lambda w=w: pk.lora_mixture(x, w, [a], [b], change(torch.ones(2, 5, 1))),
            lambda w=w: dora_norm(w, change(a), b),
        ]  # fmt: skip
    for call in calls:
        for autocast in (False, True):
            with torch.no_grad(), torch.autocast("cpu", enabled=autocast), pytest.raises(ValueError, match=IN_MEMORY):
                call()


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("graph", [False, True])
def test_a_prepared_call_reads_nothing_that_is_gone(gone: str, graph: bool) -> None:
    for which in range(2):
        parts = range(4) if which == 0 else range(7)
        for i in parts:
            w, x = _weights()[which], torch.randn(5, 64)
            a, b = torch.randn(3, 64, requires_grad=graph), torch.randn(24, 3, requires_grad=graph)
            call = PreparedCall(lora_linear)
            for _ in range(2):
                call(x, w, a, b)
            of_weight = [w] if isinstance(w, Tensor) else [t for t in w.flatten() if isinstance(t, Tensor) and t.dim()]
            t = [a, b, x, *of_weight][i] if i < 3 + len(of_weight) else a
            t.data = GONE[gone](t.data)
            with pytest.raises(ValueError, match=IN_MEMORY):
                call(x, w, a, b)


def test_what_is_freed_before_the_backward_of_a_prepared_call_is_not_read() -> None:
    for i, name in enumerate(("weight", "x", "a", "b")):
        w, x = torch.randn(24, 64), torch.randn(5, 64, requires_grad=True)
        a, b = torch.randn(3, 64, requires_grad=True), torch.randn(24, 3, requires_grad=True)
        y = PreparedCall(lora_linear)(x, w, a, b)
        [w, x, a, b][i].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"lora_linear_backward: {name} {IN_MEMORY}"):
            y.sum().backward()
    w, x, plan = torch.randn(24, 64), torch.randn(2, 64, requires_grad=True), pk.RowPlan([0, 0])
    layer = pk.RowProjection(w, [torch.randn(3, 64)], [torch.randn(24, 3)], [1.0], plan)
    ys: Any = PreparedCall(pk.lora_linear_by_row)(x, layer)
    w.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"lora_linear_by_row: weight {IN_MEMORY}"):
        ys[0].sum().backward()


def test_a_layer_of_adapters_by_row_is_checked_before_it_is_read_in_place() -> None:
    x, b = torch.randn(2, 64, requires_grad=True), torch.randn(24, 3)
    for changes, text in (
        ({"a": [torch.randn(3, 63)]}, r"a must be \[r, 64\]"),
        ({"b": [torch.randn(23, 3)]}, r"b must be \[24, 3\]"),
        ({"b": [b, b]}, "a, b and scaling must be one of each"),
        ({"bias": torch.randn(23)}, r"bias must be \[24\]"),
        ({"weight": _weights()[1].flatten()[0]}, "weight must be"),
    ):
        given: Any = {"weight": torch.randn(24, 64), "a": [torch.randn(3, 64)], "b": [b], "scaling": [1.0],
                      "plan": pk.RowPlan([0, 0])} | changes  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=text):
            PreparedCall(pk.lora_linear_by_row)(x, pk.RowProjection(**given))


def test_adamw_and_fingerprints_read_nothing_that_is_gone() -> None:
    for change in GONE.values():
        state = [torch.randn(6) for _ in range(4)] + [torch.zeros(())]
        for i in range(4):
            spoilt: Any = tuple(change(t) if j == i else t for j, t in enumerate(state))
            with pytest.raises(ValueError, match=IN_MEMORY):
                adamw.update([spoilt], 0.1, (0.9, 0.99), 1e-8, 0.0)
        with pytest.raises(ValueError, match=IN_MEMORY):
            adamw.norm([torch.ones(3), change(state[0])])
        assert not Fingerprint([torch.ones(3), change(state[0])]).known


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaling_of_zero_times_an_infinity_is_nan_as_in_a_merged_weight(backend: str) -> None:
    for w in _weights():
        a, b = torch.randn(2, 64), torch.randn(24, 2)
        b[3, 1] = float("inf")
        with use_backend(backend):
            norm = dora_norm(w, a, b, 0.0)
        merged = (w if isinstance(w, Tensor) else pk.dequantize_4bit(w)) + 0.0 * (b @ a)
        assert torch.equal(norm.isnan(), merged.norm(dim=1).isnan())
        assert norm.isnan().nonzero().tolist() == [[3]]
