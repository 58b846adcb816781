"""gated: native at every level and the reference against float64; gated_mlp is in test_gated_mlp.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from forms import grid
from lora_tools import BF16, F32, FLOATS, level_fixture, needs_native, threads
from torch import Tensor

from peft_kernels import gated
from peft_kernels.ops import gated as op
from peft_kernels.ops.gated import Activation
from peft_kernels.testing import assert_no_worse, assert_same_bits

level = level_fixture()
SILU = Activation()
QUICK, CLAMPED = Activation(op.SILU, 1.702), Activation(op.SILU, 1.702, 1.5, 1.0)
ALL = {"silu": SILU, "gelu": Activation(op.GELU), "gelu_tanh": Activation(op.GELU_TANH), "relu": Activation(op.RELU),
       "relu2": Activation(op.RELU2), "quick_gelu": QUICK, "clamped": CLAMPED,
       "clamped gelu": Activation(op.GELU, 1.0, 0.5)}  # fmt: skip
WITH_UP = [True, False]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, dh = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    return (gate * scale).to(dtype), up.to(dtype), dh.to(dtype)


def check(gate: Tensor, up: Tensor | None, dh: Tensor, numbers: Activation = SILU) -> None:
    """Both operators against float64. The exponent of the smaller side of a sigmoid or of the normal distribution is
    rounded once: an error in proportion to it, where it is not the gate itself."""
    if up is None:
        numbers = numbers._replace(shift=0.0)
    exact = [None if t is None else t.double() for t in (gate, up, dh)]
    g, u, d = (torch.ones_like(gate).double() if t is None else t for t in exact)
    most = numbers.limit or math.inf
    g, u = g.clamp(max=most), u.clamp(-most, most) + numbers.shift
    s, slope = torch.sigmoid(g), torch.ones_like(g)
    exponent = 0.0 * g
    if numbers.act == op.GELU:
        exponent, s = torch.full_like(g, 2.0), torch.special.ndtr(g)  # the polynomial's own
    elif numbers.act == op.GELU_TANH:
        exponent = math.sqrt(8 / math.pi) * (g + 0.044715 * g**3).abs()
        s, slope = op._activate(g, numbers.act, 1.0)[0] / g, math.sqrt(8 / math.pi) * (1 + 0.134145 * g * g)
    elif numbers.alpha != 1.0:
        exponent, s, slope = (numbers.alpha * g).abs(), torch.sigmoid(numbers.alpha * g), numbers.alpha * slope
    h = op.forward_op.reference(*exact[:2], *numbers)
    assert_no_worse(op.forward_op.op(gate, up, *numbers), op.forward_op.reference(gate, up, *numbers), h,
                    h.abs() * (1 + exponent / 2))  # fmt: skip
    got = op.backward_op.op(gate, up, dh, *numbers, 0)
    eager, want = op.backward_op.reference(gate, up, dh, *numbers, 0), op.backward_op.reference(*exact, *numbers, 0)
    # silu' = s + g s (1 - s) has a zero, near which only the terms have the precision; gelu' = P + g p alike
    side = s * (1 - s) * slope if numbers.act != op.GELU else torch.exp(-g * g / 2) * 0.4
    if numbers.act in (op.RELU, op.RELU2):
        s, side = want[0].abs() / (d * u).abs().clamp(min=1e-300), 0 * g
    assert_no_worse(got[0], eager[0], want[0], (d * u).abs() * (s + g.abs() * side) * (1 + exponent / 2))
    if up is None:
        assert got[1].shape == (0,)
    else:
        assert_no_worse(got[1], eager[1], want[1], want[1].abs() * (1 + exponent / 2))


@needs_native
@pytest.mark.parametrize(("name", "dtype"), grid(ALL, FLOATS), ids=str)
def test_any_size(level: str, name: str, dtype: torch.dtype) -> None:
    for i, shape in enumerate(((1,), (3, 5), (17, 33), (2, 3, 70), (9000,), (4, 20000), (0, 3), (3, 0))):
        gate, up, dh = inputs(shape, dtype)
        check(gate, up if i % 3 else None, dh, ALL[name])


@needs_native
@pytest.mark.parametrize(
    ("name", "dtype"), grid(["silu", "gelu", "gelu_tanh", "quick_gelu"], [F32, BF16]), ids=str
)
def test_every_magnitude(level: str, name: str, dtype: torch.dtype) -> None:
    """From gates whose sigmoid is 1 to those where it leaves the normal numbers, on both sides."""
    # where the smaller side of each is the smallest normal number
    least = {"silu": -87.0, "gelu": -12.8, "gelu_tanh": -9.5, "quick_gelu": -51.0}[name]
    gate = torch.cat([torch.linspace(least, 87, 4001), torch.logspace(-30, 4, 999), -torch.logspace(-30, 0.97, 999)])
    check(gate.to(dtype), torch.randn(gate.shape).to(dtype), torch.randn(gate.shape).to(dtype), ALL[name])
    far = torch.tensor([least - 3, least - 8, least - 16, 1.3 * least - 23, -1e4, -3e38], dtype=dtype)
    ones = torch.ones_like(far)
    h = op.forward_op.op(far, ones, *ALL[name])
    assert_same_bits(h[3:], torch.tensor([-0.0, -0.0, -0.0], dtype=dtype))
    # below the normal numbers a unit in the last place is the smallest number that there is
    want = op.forward_op.reference(far.double(), ones.double(), *ALL[name])
    assert_no_worse(h, op.forward_op.reference(far, ones, *ALL[name]), want, torch.full((6,), 1e-30))
    slopes = op.backward_op.op(torch.cat([far[3:], -far[3:]]), None, torch.ones(6, dtype=dtype), *ALL[name], 0)[0]
    assert_same_bits(slopes.abs(), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=dtype))


TORCH = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"), "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(), "quick_gelu": lambda g: g * torch.sigmoid(1.702 * g),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
def test_functions_are_those_of_torch(name: str) -> None:
    gate, up, dh = (t.requires_grad_() for t in inputs((7, 30), torch.float64, 2.0))
    want, alone = TORCH[name](gate) * up, TORCH[name](gate)
    sizes = (1 + gate.square()) * (1 + up.abs()) * (1 + dh.abs())
    for got, right in ((gated(gate, up, name), want), (gated(gate, act=name), alone)):
        assert_no_worse(got, right, right, sizes)
    grads = [torch.autograd.grad(h, [gate, up], dh.detach()) for h in (gated(gate, up, name), want)]
    for got, right in zip(*grads, strict=True):
        assert_no_worse(got, right, right, sizes)


def test_names_are_those_of_transformers() -> None:
    """Each is what transformers computes by that name, but for rounding; its constants have ten digits."""
    activations = pytest.importorskip("transformers.activations")
    g = torch.linspace(-8, 8, 1001)
    named = {name for name in op.ACTS if name in activations.ACT2FN}
    assert set(op.ACTS) - named == {"gelu_tanh"}, "torch's name"
    for name in sorted(named):
        theirs, exact = activations.ACT2FN[name](g), gated(g.double(), act=name)
        assert_no_worse(theirs, gated(g, act=name), exact, 1 + g.square())


def test_limit_and_shift_as_gpt_oss_has_them() -> None:
    both, dh = torch.randn(5, 24, dtype=torch.float64) * 4, torch.randn(5, 12, dtype=torch.float64)

    def formula(both: Tensor) -> Tensor:
        gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)

    both[0, :2] = 9.0
    both[1, :4] = torch.tensor([-9.0, -9.0, 7.0, -7.0])
    runs = []
    for f in (formula, lambda t: gated(t, fused="pairs", alpha=1.702, limit=7.0, shift=1.0)):
        x = both.clone().requires_grad_()
        y = f(x)
        runs.append([y.detach(), *torch.autograd.grad(y, x, dh)])
    for got, want in zip(*runs, strict=True):
        assert_no_worse(got, want, want, 1 + want.square())


@needs_native
@pytest.mark.parametrize(("fused", "dtype"), grid(["halves", "pairs"], FLOATS), ids=str)
def test_gate_and_up_in_one_tensor(level: str, fused: str, dtype: torch.dtype) -> None:
    """They have the bits that they have apart, and one gradient; so do slices of a wider tensor, without a copy."""
    for shape in ((3, 7), (2, 3, 16), (5, 49), (300, 40)):
        gate, up, dh = inputs(shape, dtype)
        both = torch.cat([gate, up], -1) if fused == "halves" else torch.stack([gate, up], -1).flatten(-2)
        numbers = CLAMPED
        want = [op.forward_op.op(gate, up, *numbers), *op.backward_op.op(gate, up, dh, *numbers, 0)]
        leaf = both.clone().requires_grad_()
        h = gated(leaf, fused=fused, alpha=1.702, limit=1.5, shift=1.0)
        (grad,) = torch.autograd.grad(h, leaf, dh)
        for got, right in zip((h.detach(), *op.parts_of(grad, op.FUSED[fused])), want, strict=True):
            assert_same_bits(got, right)
        wide = torch.cat([both, both[..., :3]], -1)[..., : both.shape[-1]]
        views = op.parts_of(wide, op.FUSED[fused])
        for apart in (0, 1, 2):
            found = op.backward_op.op(*views, dh, *numbers, apart)
            for got, right in zip(op.parts_of(found[0], apart) if apart else found, want[1:], strict=True):
                assert_same_bits(got, right)
        assert_same_bits(op.forward_op.op(*views, *numbers), want[0])


@needs_native
def test_slices_are_not_copied() -> None:
    from peft_kernels.ops.gated import native

    both = torch.randn(2, 6, 64)
    for fused, ahead, step in ((1, 32, 1), (2, 1, 2)):
        laid = native._laid(*op.parts_of(both, fused))
        assert (laid.gate, laid.up) == (both.data_ptr(), both.data_ptr() + 4 * ahead)
        assert laid.strides == (64, 64, step)
    assert native._laid(both[:, 1:, :8], None).gate != both[:, 1:, :8].data_ptr(), "rows at two distances are copied"


@needs_native
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_infinities_and_nan_as_eager(level: str, name: str) -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([inf, nan, 1.0, inf, -1.0, 2.0])
    up = torch.tensor([2.0, 1.0, nan, -inf, inf, 3.0])
    # in float64: torch's vectors of float32 make NaN of gelu(inf)
    want, got = (TORCH[name](gate.double()) * up.double()).float(), gated(gate, up, name)
    assert_same_bits(got.isnan(), want.isnan())
    assert_same_bits(got[[0, 3, 4]], want[[0, 3, 4]])
    both = op.backward_op.op(gate, up, torch.ones(6), *ALL[name], 0)
    assert both[0][[1, 2]].isnan().all()
    assert both[1][1].isnan()
    assert torch.stack(both)[:, 5].isfinite().all()


@needs_native
def test_same_bits_on_one_and_two_threads(level: str) -> None:
    gate, up, dh = inputs((50, 1001), BF16)
    runs = []
    for n in (1, 2):
        with threads(n):
            runs.append([op.forward_op.op(gate, up, *SILU), *op.backward_op.op(gate, up, dh, *SILU, 1)])
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b)


@needs_native
def test_strides_and_empty() -> None:
    gate, up, dh = inputs((6, 10), F32)
    want = gated(gate, up)
    assert_same_bits(gated(gate.t().contiguous().t(), torch.cat([up, up], 1)[:, :10]), want)
    assert_same_bits(gated(gate[:, None].expand(6, 2, 10)[:, 1], up), want)
    assert gated(gate.t(), up.t()).is_contiguous()
    assert_same_bits(op.backward_op.op(gate, up, dh.t().contiguous().t(), *SILU, 0)[0],
                     op.backward_op.op(gate, up, dh, *SILU, 0)[0])  # fmt: skip
    assert gated(gate[:0], up[:0]).shape == (0, 10)
    assert gated(gate[:, :0], fused="halves").shape == (6, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_gradcheck_and_opcheck(name: str) -> None:
    gate, up, _ = inputs((3, 4), torch.float64)
    named = {"clamped": "silu", "clamped gelu": "gelu"}.get(name, name)
    alpha, limit, shift = ALL[name][1:]
    options = {"limit": limit, "shift": shift, "alpha": alpha if ALL[name].act == op.SILU else None}
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, named, **options),
                                    (gate.requires_grad_(), up.requires_grad_()))  # fmt: skip
    assert torch.autograd.gradcheck(lambda g: gated(g, None, named, fused="pairs", **options), gate)
    calls = inputs((3, 4), F32)
    torch.library.opcheck(op.forward_op.op, (*calls[:2], *ALL[name]))
    torch.library.opcheck(op.backward_op.op, (*calls, *ALL[name], 2))


def test_bad_input() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"gated: up must be \(3, 4\) like gate, got \(3, 5\)"):
        gated(x, torch.randn(3, 5))
    with pytest.raises(TypeError, match=r"gated: up must be torch\.float32 like gate, got torch\.bfloat16"):
        gated(x, x.bfloat16())
    with pytest.raises(TypeError, match="gated: gate must be a floating-point tensor"):
        gated(x.long(), x.long())
    with pytest.raises(ValueError, match=r"gated: act must be one of \['gelu', .*\], got 'mish'"):
        gated(x, x, "mish")
    with pytest.raises(ValueError, match="gated: alpha must be None with act 'gelu'"):
        gated(x, x, "gelu", alpha=2.0)
    with pytest.raises(ValueError, match=r"gated: limit must be 0 \(none\) or above, got -1.0"):
        gated(x, x, limit=-1.0)
    with pytest.raises(ValueError, match="gated: shift must be 0 without up"):
        gated(x, shift=1.0)
    with pytest.raises(ValueError, match="gated: fused must be None, 'halves' or 'pairs', got 'both'"):
        gated(x, fused="both")
    with pytest.raises(ValueError, match=r"gated: up must be None where gate holds both \(halves\)"):
        gated(x, x, fused="halves")
    with pytest.raises(ValueError, match=r"gated: gate must be \[\.\.\., 2 F\] where it holds both, got \(3, 3\)"):
        gated(x[:, :3], fused="pairs")
    with pytest.raises(ValueError, match="gated_backward: fused must be 0, or 1 or 2 with up, got 1"):
        op.backward_op.op(x, None, x, *SILU, 1)
