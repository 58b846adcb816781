"""attention: native at every level, Triton and the reference against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_tools import CASES, DROPPED, LONG, ONE, Case, check, doubled, inputs, magnitudes, options_of, run
from forms import grid
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter
from lora_tools import BF16, F32, FLOATS, level_fixture, needs_native, threads
from torch import Tensor

from peft_kernels import BackendUnavailable, attention, draw_seed, philox, use_backend
from peft_kernels.ops import attention as op
from peft_kernels.testing import assert_no_worse, assert_same_bits

needs_triton = pytest.mark.skipif(bool(op.forward_op.load("triton").available()), reason="Triton is not installed")
level = level_fixture()


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_shape(level: str, dtype: torch.dtype) -> None:
    for case in (*CASES, *ONE, *DROPPED):
        check(*inputs(case, dtype))


@needs_native
@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_long_rows(dtype: torch.dtype, case: Case) -> None:
    check(*inputs(case, dtype))


@needs_native
def test_tables_of_another_type(level: str) -> None:
    dy, args = inputs(replace(CASES[2], bias=True), BF16)
    check(dy, [*args[:3], args[3].float(), args[4].float(), *args[5:7], args[7].float(), *args[8:]])
    check(dy, [*args[:9], args[9].double(), *args[10:]])


@needs_native
def test_what_says_the_same_gives_the_same_bits(level: str) -> None:
    """A causal mask, spans and a window that leave all of what is causal; examples packed in a row by either give what
    each gives alone."""
    dy, args = inputs(Case(2, 75, 75, 4, 2, 16, 16, turned=16), BF16)
    causal = torch.ones(2, 75, 75, dtype=torch.bool).tril()
    spans = torch.tensor([0, 75], dtype=torch.int32).expand(2, 75, 2)
    want = run("op", dy, args)
    for others in ([*args[:6], causal, *args[7:12], False, *args[13:]], [*args[:5], spans, *args[6:]],
                   [*args[:13], 75, *args[14:]]):  # fmt: skip
        for mine, same in zip(run("op", dy, others), want, strict=True):
            assert_same_bits(mine, same)
    start = 48  # where a block of queries begins, so that the sums are cut alike
    packed = causal & ((torch.arange(75) < start)[:, None] == (torch.arange(75) < start))
    bounds = torch.where((torch.arange(75) < start)[:, None], torch.tensor([0, start]), torch.tensor([start, 75]))
    for tables in ([None, packed], [bounds.int().expand(2, -1, -1), None]):
        together = run("op", dy, [*args[:5], *tables, *args[7:]])
        for part in (slice(0, start), slice(start, 75)):
            alone = run("op", dy[:, part], [*(t[:, part] for t in args[:5]), *args[5:]])
            for mine, same in zip(together[:4], alone, strict=False):
                assert_same_bits(mine[:, part].contiguous(), same)


@needs_native
@pytest.mark.parametrize("case", [Case(1, 70, 70, 6, 2, 16, 16, turned=16, keep=True),
                                  Case(1, 560, 560, 6, 2, 16, 16, turned=16, p=0.1), ONE[0], ONE[3]],
                         ids=str)  # fmt: skip
def test_same_bits_on_any_number_of_threads(level: str, case: Case) -> None:
    """Also where a task is a head, not a group of heads."""
    dy, args = inputs(case, BF16)
    runs = []
    for n in (1, 2, 8):
        with threads(n):
            runs.append(run("op", dy, args))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert_same_bits(a, b)


@needs_native
def test_nan_stays_where_it_is_seen(level: str) -> None:
    dy, args = inputs(Case(1, 60, 60, 2, 1, 16, 16, turned=16), F32)
    want = run("op", dy, args)
    args[0][0, 50, 1] = float("nan")
    got = run("op", dy, args)
    assert got[0][0, 50, 1].isnan().all()
    got[0][0, 50, 1] = want[0][0, 50, 1]
    assert_same_bits(got[0], want[0])


@needs_native
def test_keys_that_no_query_sees_are_not_read(level: str) -> None:
    """A cache that is not full: what lies beyond may be anything."""
    for tokens in (1, 40):
        dy, args = inputs(Case(1, tokens, 700, 4, 2, 16, 16, causal=False), BF16)
        args[5] = torch.tensor([16, 640], dtype=torch.int32).expand(1, tokens, 2)
        want = run("op", dy, args)[0]
        for t in args[1:3]:
            t[:, 640:] = float("nan")
            t[:, :16] = float("nan")
        assert_same_bits(run("op", dy, args)[0], want)


@needs_native
@pytest.mark.parametrize("case", [replace(CASES[2], spans=True, bias=True), replace(ONE[2], h=6, g=2)],
                         ids=str)  # fmt: skip
def test_strides_and_empty(level: str, case: Case) -> None:
    """Slices of one fused projection, keys of a cache [B, G, S, D], anything that is not dense."""
    dy, args = inputs(case, F32)
    want = run("op", dy, args)
    c = case
    if c.t == c.s:
        fused = torch.cat([t.flatten(2) for t in args[:3]], -1)
        parts = fused.split([c.h * c.d, c.g * c.d, c.g * c.dv], -1)
        sliced = [t.unflatten(2, (-1, d)) for t, d in zip(parts, (c.d, c.d, c.dv), strict=True)]
    else:
        sliced = [args[0], *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in args[1:3])]
    assert not any(t.is_contiguous() for t in sliced[1:])
    scattered = [t if t is None else t.mT.contiguous().mT for t in args[:8]]
    for tensors in ([*sliced, *args[3:8]], scattered):
        for a, b in zip(run("op", dy.mT.contiguous().mT, [*tensors, *args[8:]]), want, strict=True):
            assert_same_bits(a, b)
    for b, t, s in ((0, 4, 4), (2, 0, 5), (2, 5, 0)):
        dy, args = inputs(Case(b, t, s, 2, 1, 8, 6), F32)
        y, dq, dk, dv, lse = run("op", dy, args)
        assert [y.shape, dq.shape, dk.shape, dv.shape] == [dy.shape, *(t.shape for t in args[:3])]
        assert not any(t.any() for t in (y, dq, dk, dv))
        assert lse.isinf().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    """Those that are wanted; kept for them are the inputs, y, and a number for each query and head."""
    dy, args = inputs(replace(CASES[2], keep=True), dtype)
    q, k, v, cos, sin, _, keep, _, _, sinks = args[:10]
    leaves = [q.requires_grad_(), k, v.requires_grad_(), sinks.requires_grad_()]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = attention(q, k, v, cos=cos, sin=sin, keep=keep, sinks=sinks, scale=0.25)
    kept = sum(t.numel() for t in (q, k, v, cos, sin, keep, sinks, y))
    assert sum(t.numel() for t in saved) == kept + q.shape[0] * q.shape[2] * q.shape[1]
    got = torch.autograd.grad(y, (leaves[0], leaves[2], sinks), dy)
    plain = [t.detach() if isinstance(t, Tensor) else t for t in args]
    plain[10] = 0.25
    want = run("op", dy, plain)
    for mine, same in zip((y, *got[:2]), (want[0], want[1], want[3]), strict=True):
        assert_same_bits(mine, same)
    # the gradient of sinks is plain torch: as near as the reference's in the same dtype
    assert_same_bits(got[2], op._sinks_gradient(dy, want[0], want[4], plain[9]))
    exact = [t.detach() if isinstance(t, Tensor) else t for t in doubled(args)]
    options = {**options_of(exact), "sinks": exact[9].requires_grad_(), "scale": 0.25}
    (right,) = torch.autograd.grad(attention(*exact[:3], **options), exact[9], dy.double())
    with use_backend("reference"):
        options = {**options_of(plain), "sinks": plain[9].requires_grad_(), "scale": 0.25}
        (eager,) = torch.autograd.grad(attention(*plain[:3], **options), plain[9], dy)
    size = dy.double().abs().sum((0, 1, 3))  # of y's terms along dy
    assert_no_worse(got[2], eager, right, size * torch.finfo(dtype).eps / torch.finfo(F32).eps)


@pytest.mark.slow
def test_gradcheck_and_opcheck() -> None:
    """The backward's formulas against differences, with every option at once and none."""
    full = Case(2, 5, 5, 4, 2, 6, 4, turned=4, rows=2, interleaved=True, window=4, spans=True, keep=True, bias=True,
                slopes=True, softcap=1.5, sinks=True, p=0.3)  # fmt: skip
    for case in (Case(2, 5, 5, 4, 2, 6, 4), full, Case(1, 3, 5, 2, 1, 4, 2, causal=False)):
        dy, args = inputs(case, F32)
        exact = doubled(args)
        options = options_of(exact)
        leaves = [t.requires_grad_() for t in (*exact[:3], *([exact[9]] if case.sinks else []))]

        def call(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor, options: Any = options) -> Tensor:
            return attention(q, k, v, **{**options, "sinks": sinks[0] if sinks else None})

        assert torch.autograd.gradcheck(call, leaves)
        y, lse = op.forward_op.op(*args)
        torch.library.opcheck(op.forward_op.op, tuple(args))
        torch.library.opcheck(op.backward_op.op, (dy, *args[:3], y, lse, *args[3:9], *args[10:]))


@pytest.mark.parametrize("case", [
    Case(2, 30, 30, 4, 2, 16, 16), Case(2, 7, 30, 4, 4, 16, 16, causal=False, bias=True),
    Case(1, 5, 30, 4, 1, 16, 8, keep=True),
], ids=str)  # fmt: skip
def test_the_reference_is_torchs_attention(case: Case) -> None:
    _, args = inputs(case, torch.float64)
    q, k, v, _, _, _, keep, bias = args[:8]
    seen = op._seen(case.t, case.s, None, keep, case.causal, 0, q.device)[:, 0]
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf) + (0.0 if bias is None else bias)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=args[10], enable_gqa=True
    ).transpose(1, 2)
    blind = ~seen.any(-1).expand(case.b, 1, case.t)[:, 0]
    got, want = attention(q, k, v, **options_of(args)), want.masked_fill(blind[..., None, None], 0.0)
    assert_no_worse(got, want, want, magnitudes(got, args)[0])


def test_one_graph() -> None:
    dy, args = inputs(Case(1, 6, 6, 2, 1, 8, 8, turned=8, p=0.3), F32)
    q, k, v, options = *args[:3], options_of(args)
    compiled: Callable[[Tensor], Tensor] = torch.compile(
        lambda q: attention(q, k, v, **options), backend="aot_eager", fullgraph=True
    )
    q.requires_grad_()
    got, want = compiled(q), attention(q, k, v, **options)
    assert_same_bits(got, want)
    assert_same_bits(*(torch.autograd.grad(y, q, dy)[0] for y in (got, want)))


def test_a_mask_for_all_is_expanded() -> None:
    _, args = inputs(Case(2, 4, 6, 2, 1, 8, 8), F32)
    q, k, v = args[:3]
    left = torch.tensor([[False] * 2 + [True] * 4, [True] * 6])[:, None]
    want = attention(q, k, v, keep=left.expand(2, 4, 6), scale=1.0)
    assert_same_bits(attention(q, k, v, keep=left, scale=1.0), want)
    bias = torch.zeros(2, 1, 1, 6).masked_fill(~left[:, None], -torch.inf)
    got = attention(q, k, v, bias=bias, scale=1.0)
    exact = attention(*(t.double() for t in (q, k, v)), bias=bias.double(), scale=1.0)
    assert_no_worse(got, want, exact, v.abs().max())
    spans = torch.tensor([[[0, 6]] * 4], dtype=torch.int32)
    assert_same_bits(attention(q, k, v, spans=spans, scale=1.0), attention(q, k, v, scale=1.0))


def test_bad_input() -> None:
    dy, args = inputs(Case(2, 3, 3, 4, 2, 6, 6, turned=6), F32)
    good = dict(zip("qkv", args[:3], strict=True)) | options_of(args)

    def call(**changed: Any) -> Tensor:
        return attention(**{**good, **changed})

    q, k, cos, sin = good["q"], good["k"], good["cos"], good["sin"]
    with pytest.raises(ValueError, match=r"attention: q must be \[B, T, H, D\] with H at least 1 and D even"):
        call(q=q[..., :5])
    with pytest.raises(ValueError, match=r"k must be \[2, S, G, 6\] with 4 a multiple of G, got \(2, 3, 3, 6\)"):
        call(k=q[:, :, :3])
    with pytest.raises(TypeError, match=r"k must be torch\.float32 like q, got torch\.bfloat16"):
        call(k=k.bfloat16())
    with pytest.raises(ValueError, match=r"v must be \[2, 3, 2, Dv\] with Dv even, got \(2, 3, 4, 6\)"):
        call(v=q)
    with pytest.raises(ValueError, match=r"v must be .* with Dv even, got \(2, 3, 2, 5\)"):
        call(v=k[..., :5])
    with pytest.raises(ValueError, match=r"cos must be \[2 or 1, 3, R\] with R even and at most 6, got \(1, 3, 8\)"):
        call(cos=torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match=r"cos must be None where 3 queries meet 2 keys \(turn q and k before\)"):
        call(k=k[:, :2], v=k[:, :2])
    with pytest.raises(ValueError, match=r"sin must be torch\.float32 \(1, 3, 6\) like cos, got torch\.bfloat16"):
        call(sin=sin.bfloat16())
    with pytest.raises(TypeError, match=r"sin must be a tensor like cos, got None"):
        call(sin=None)
    with pytest.raises(TypeError, match=r"cos must be a tensor like sin, got None"):
        call(cos=None)
    with pytest.raises(TypeError, match=r"keep must be bool, True where a query sees a key, got torch\.float32"):
        call(keep=torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match=r"keep must be \(2, 3, 3\), or 1 in any place but the last, got \(3, 3, 3\)"):
        call(keep=torch.ones(3, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"keep must be \(2, 3, 3\), got \(3, 3\)"):
        call(keep=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"spans must be int32, the first key .*, got torch\.int64"):
        call(spans=torch.zeros(1, 3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"spans must be \(2, 3, 2\), got \(2, 3, 3\)"):
        call(spans=torch.zeros(1, 3, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"bias must be without gradients .* got one that wants them"):
        call(bias=torch.zeros(1, 4, 3, 3, requires_grad=True))
    with pytest.raises(ValueError, match=r"slopes must be \(4,\), got \(2,\)"):
        call(slopes=torch.zeros(2))
    for name, value in (("scale", math.inf), ("softcap", -1.0), ("window", -1)):
        with pytest.raises(ValueError, match=rf"{name} must be .* got {value}"):
            call(**{name: value})
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), got 1\.0"):
        call(dropout_p=1.0)
    with pytest.raises(ValueError, match=r"seed must be an int64 tensor of one .* got \(torch\.float32, \(2,\)\)"):
        call(dropout_p=0.1, seed=torch.zeros(2))
    with pytest.raises(ValueError, match=r"attention_backward: lse must be \(2, 4, 3\) in torch\.float32"):
        op.backward_op.op(dy, *args[:3], dy, torch.zeros(2, 3, 4), cos, sin, *[None] * 4, *args[10:])


@needs_native
def test_native_takes_tables_of_its_types() -> None:
    _, args = inputs(CASES[1], F32)
    options = options_of(args)
    with use_backend("native"), pytest.raises(BackendUnavailable, match=r"cos and sin are torch\.float64"):
        attention(*args[:3], **{**options, "cos": args[3].double(), "sin": args[4].double()})
    with use_backend("native"), pytest.raises(BackendUnavailable, match=r"bias is torch\.float64"):
        attention(*args[:3], **{**options, "bias": torch.zeros(1, 2, 5, 5, dtype=torch.float64)})


# ---- dropout --------------------------------------------------------------------------------------------------------
def masks(t: int, s: int, p: float, seed: Tensor, device: str = "cpu") -> list[Tensor]:
    """Masks of forward and backward, [B H T, S]: even probabilities, of values and gradients that are one-hot."""
    n = max(t, s) + max(t, s) % 2
    q, k = torch.zeros(2, t, 3, 2, device=device), torch.zeros(2, s, 3, 2, device=device)
    v, dy = (torch.eye(m, n, device=device)[None, :, None].expand(2, m, 3, n) for m in (s, t))
    numbers = (1.0, False, False, 0, 0.0, p, seed)
    y, lse = op.forward_op.op(q, k, v, *[None] * 7, *numbers)
    dv = op.backward_op.op(dy, q, k, v, y, lse, *[None] * 6, *numbers)[2]
    return [y[..., :s].transpose(1, 2).flatten(0, 2) != 0, dv[..., :t].permute(0, 2, 3, 1).flatten(0, 2) != 0]


def check_masks(shapes: tuple[tuple[int, int], ...], device: str = "cpu") -> None:
    seed = torch.tensor([-(2**62) + 12345], device=device)
    for t, s in shapes:
        want = philox.keep_mask(2 * 3 * t, s, 0.3, seed, device)
        for mask in masks(t, s, 0.3, seed, device):
            assert torch.equal(mask, want)


@needs_native
def test_drops_what_the_generator_says(level: str) -> None:
    shapes = ((49, 133), (1, 72))
    check_masks(shapes)
    with use_backend("reference"):
        check_masks(shapes)


def test_a_seed_is_drawn_from_torchs_generator() -> None:
    q = torch.randn(1, 9, 2, 8)
    torch.manual_seed(5)
    first, second = (attention(q, q, q, scale=1.0, dropout_p=0.4) for _ in range(2))
    torch.manual_seed(5)
    seed = draw_seed()
    assert_same_bits(attention(q, q, q, scale=1.0, dropout_p=0.4, seed=seed), first)
    assert not torch.equal(first, second)
    before = torch.get_rng_state()
    attention(q, q, q, scale=1.0)
    assert torch.equal(torch.get_rng_state(), before)


# ---- Triton: in its interpreter, which is chosen when Triton is imported, so in a process of its own -----------------
@needs_triton
@pytest.mark.slow
@not_interpreted
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, "device")


@needs_triton
@on_device
@pytest.mark.parametrize(("dtype", "case"), grid(FLOATS, [*CASES[1:8], *DROPPED[:2]]), ids=str)
def test_device(dtype: torch.dtype, case: Case) -> None:
    with use_backend("triton"):
        check(*inputs(case, dtype, DEVICE))


@needs_triton
@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_device_no_rows(dtype: torch.dtype) -> None:
    with use_backend("triton"):
        _, args = inputs(Case(0, 4, 4, 2, 1, 8, 8), dtype, DEVICE)
        assert attention(*args[:3], scale=1.0).shape == (0, 4, 2, 8)


@needs_triton
@on_device
def test_device_drops_what_the_generator_says() -> None:
    with use_backend("triton"):
        check_masks(((17, 21), (1, 40)), DEVICE)


@needs_triton
def test_heads_that_no_program_holds_are_refused() -> None:
    q = torch.zeros(1, 1, 1, 258)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="more than 256 features"):
        attention(q, q, q, scale=1.0)
