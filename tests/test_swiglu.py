"""swiglu and swiglu_mlp: native at every level and the reference against float64; what the MLP keeps and gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from lora_tools import BF16, F32, FLOATS, level_fixture, needs_native, saved_bytes, threads
from torch import Tensor

from peft_kernels import Projection, QuantWeight, lora_linear, swiglu, swiglu_mlp, use_backend
from peft_kernels.ops import swiglu as op
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight

level = level_fixture()


def inputs(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, dh = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    return (gate * scale).to(dtype), up.to(dtype), dh.to(dtype)


def check(gate: Tensor, up: Tensor, dh: Tensor) -> None:
    exact = [t.double() for t in (gate, up, dh)]
    s, size = torch.sigmoid(exact[0]), [t.abs() for t in exact]
    assert_no_worse(op.forward_op.op(gate, up), op.forward_op.reference(gate, up), op.forward_op.reference(*exact[:2]))
    got = op.backward_op.op(gate, up, dh)
    eager, want = op.backward_op.reference(gate, up, dh), op.backward_op.reference(*exact)
    # silu' = s + g s (1 - s) has a zero, near which only the terms have the precision
    assert_no_worse(got[0], eager[0], want[0], size[2] * size[1] * (s + size[0] * s * (1 - s)))
    assert_no_worse(got[1], eager[1], want[1])


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_size(level: str, dtype: torch.dtype) -> None:
    for shape in ((1,), (3, 5), (17, 33), (2, 3, 70), (9000,), (4, 20000)):
        check(*inputs(shape, dtype))


@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_magnitude(level: str, dtype: torch.dtype) -> None:
    """From gates whose sigmoid is 1 to those where it leaves the normal numbers, on both sides."""
    gate = torch.cat([torch.linspace(-87, 87, 4001), torch.logspace(-30, 4, 999), -torch.logspace(-30, 1.9, 999)])
    check(gate.to(dtype), torch.randn(gate.shape).to(dtype), torch.randn(gate.shape).to(dtype))
    far = torch.tensor([-90.0, -95.0, -103.0, -110.0, -1e4, -3e38], dtype=dtype)
    h = op.forward_op.op(far, torch.ones_like(far))
    assert_same_bits(h[3:], torch.tensor([-0.0, -0.0, -0.0], dtype=dtype))
    # below the normal numbers a unit in the last place is the smallest number that there is
    want = op.forward_op.reference(far.double(), torch.ones(6, dtype=torch.float64))
    assert_no_worse(h, op.forward_op.reference(far, torch.ones_like(far)), want, torch.full((6,), 1e-30))


@needs_native
def test_infinities_and_nan_as_eager(level: str) -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([inf, nan, 1.0, inf, -1.0])
    up = torch.tensor([2.0, 1.0, nan, -inf, inf])
    want = torch.nn.functional.silu(gate) * up
    assert_same_bits(swiglu(gate, up).isnan(), want.isnan())
    assert_same_bits(swiglu(gate, up)[[0, 3, 4]], want[[0, 3, 4]])


@needs_native
def test_same_bits_on_one_and_two_threads(level: str) -> None:
    gate, up, dh = inputs((50, 1001), BF16)
    runs = []
    for n in (1, 2):
        with threads(n):
            runs.append([op.forward_op.op(gate, up), *op.backward_op.op(gate, up, dh)])
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b)


@needs_native
def test_strides_and_empty() -> None:
    gate, up, dh = inputs((6, 10), F32)
    want = swiglu(gate, up)
    assert_same_bits(swiglu(gate.t().contiguous().t(), torch.cat([up, up], 1)[:, :10]), want)
    assert swiglu(gate.t(), up.t()).is_contiguous()
    assert_same_bits(op.backward_op.op(gate, up, dh.t().contiguous().t())[0], op.backward_op.op(gate, up, dh)[0])
    assert swiglu(gate[:0], up[:0]).shape == (0, 10)


@pytest.mark.slow
def test_gradcheck_and_opcheck() -> None:
    gate, up, _ = inputs((3, 4), torch.float64)
    assert torch.autograd.gradcheck(swiglu, (gate.requires_grad_(), up.requires_grad_()))
    calls = inputs((3, 4), F32)
    torch.library.opcheck(op.forward_op.op, calls[:2])
    torch.library.opcheck(op.backward_op.op, calls)


def test_bad_input() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"swiglu: up must be \(3, 4\) like gate, got \(3, 5\)"):
        swiglu(x, torch.randn(3, 5))
    with pytest.raises(TypeError, match=r"swiglu: up must be torch\.float32 like gate, got torch\.bfloat16"):
        swiglu(x, x.bfloat16())
    with pytest.raises(TypeError, match="swiglu: gate must be a floating-point tensor"):
        swiglu(x.long(), x.long())


# ---- the whole MLP --------------------------------------------------------------------------------------------------
K, F, N = 64, 128, 40


def leaf(*shape: int, scale: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def layer(n: int, k: int, r: int, dtype: torch.dtype, p: float, seed: int, dense: bool = False) -> Projection:
    weight = leaf(n, k, scale=k**-0.5, dtype=dtype) if dense else random_quant_weight(n, k, nested=True, seed=seed)
    bias = leaf(n, scale=1, dtype=dtype) if dense else None
    if not r:
        return Projection(weight, bias=bias)
    wide = torch.promote_types(dtype, F32)
    a, b = leaf(r, k, scale=k**-0.5, dtype=wide), leaf(n, r, scale=0.3, dtype=wide)
    return Projection(weight, a, b, 2.0, bias, p, torch.tensor([seed]) if p else None)


Make = Callable[[torch.dtype], list[Projection]]
MLPS: dict[str, Make] = {
    "all": lambda t: [layer(F, K, 4, t, 0.2, 1), layer(F, K, 7, t, 0.0, 2), layer(N, F, 3, t, 0.1, 3)],
    "up alone": lambda t: [layer(F, K, 0, t, 0, 1), layer(F, K, 4, t, 0, 2), layer(N, F, 0, t, 0, 3)],
    "down alone": lambda t: [layer(F, K, 0, t, 0, 1), layer(F, K, 0, t, 0, 2), layer(N, F, 4, t, 0.5, 3)],
    "none": lambda t: [layer(F, K, 0, t, 0, 1), layer(F, K, 0, t, 0, 2), layer(N, F, 0, t, 0, 3)],
    "dense and trained": lambda t: [
        layer(F, K, 4, t, 0, 1, True), layer(F, K, 0, t, 0, 2), layer(N, F, 0, t, 0, 3, True)
    ],
}  # fmt: skip


def trained(parts: Sequence[Projection]) -> list[Tensor]:
    return [t for p in parts for t in p if isinstance(t, Tensor) and t.requires_grad]


def by_parts(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    h = torch.nn.functional.silu(lora_linear(x, *gate)) * lora_linear(x, *up)
    return lora_linear(h, *down)


def run(mlp: Callable[..., Tensor], parts: Sequence[Projection], x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = mlp(x, *parts)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained(parts)], dy.to(y.dtype))]


def in_double(parts: Sequence[Projection]) -> list[Projection]:
    def up(t: object) -> object:
        is_float = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().double().requires_grad_() if is_float else t

    return [Projection(*map(up, p)) for p in parts]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", MLPS)
def test_mlp(name: str, dtype: torch.dtype) -> None:
    parts = MLPS[name](dtype)
    x, dy = torch.randn(3, 5, K).to(dtype), torch.randn(3, 5, N).to(dtype)
    got = run(swiglu_mlp, parts, x, dy)
    with use_backend("reference"):
        eager, want = run(by_parts, parts, x, dy), run(by_parts, in_double(parts), x.double(), dy)
    for mine, theirs, exact in zip(got, eager, want, strict=True):
        # a chain of products: the largest element bounds what rounding on the way can do
        worst = [(t.double() - exact).abs().max().reshape(1) for t in (mine, theirs)]
        zero = torch.zeros(1, dtype=torch.float64)
        assert_no_worse(worst[0].to(mine.dtype), worst[1].to(mine.dtype), zero, exact.abs().max().reshape(1))
    with torch.no_grad():
        assert_same_bits(swiglu_mlp(x, *parts), got[0])


def test_gradcheck_of_the_mlp() -> None:
    parts = in_double(MLPS["all"](F32))
    leaves = trained(parts)

    def f(x: Tensor, *tensors: Tensor) -> Tensor:
        left = iter(tensors)

        def taken(p: Projection) -> Projection:
            return Projection(*(next(left) if isinstance(t, Tensor) and t.requires_grad else t for t in p))

        return swiglu_mlp(x, *map(taken, parts))

    x = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x, *leaves), fast_mode=True)


@needs_native
def test_saves_x_gate_up_and_the_small_sums_alone() -> None:
    """unsloth's LoRA_MLP saves X, e (gate), g (up) beside the adapters' own tensors; ours adds s [M, r] of each."""
    m, parts = 200, MLPS["all"](BF16)
    x = torch.randn(m, K, dtype=BF16, requires_grad=True)
    own = [t for p in parts for t in (*p, *(p.weight.flatten() if isinstance(p.weight, QuantWeight) else ()))]
    ys: list[Tensor] = []
    unsloth, small = m * (K + 2 * F) * 2, m * (4 + 7 + 3) * 4
    assert saved_bytes(lambda: ys.append(swiglu_mlp(x, *parts)), own) == unsloth + small
    one_by_one = saved_bytes(lambda: by_parts(x, *parts), own)
    assert one_by_one >= unsloth + small + 2 * m * F * 2, "one by one, silu(gate) and h are kept, too"
    assert ys[0].requires_grad


@needs_native
def test_the_backward_leaves_what_was_saved_as_it_was() -> None:
    parts = MLPS["all"](BF16)
    x = torch.randn(9, K, dtype=BF16, requires_grad=True)
    y = swiglu_mlp(x, *parts)
    first = torch.autograd.grad(y.sum(), [x, *trained(parts)], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y.sum(), [x, *trained(parts)]), strict=True):
        assert_same_bits(a, b)


@needs_native
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    """Seeds are drawn from torch's generator, so a recomputed forward drops the same."""
    parts = [p._replace(seed=None) for p in MLPS["all"](F32)]
    x = torch.randn(9, K, requires_grad=True)
    torch.manual_seed(1)
    want = torch.autograd.grad(swiglu_mlp(x, *parts).sum(), [x, *trained(parts)])
    torch.manual_seed(1)
    torch.utils.checkpoint.checkpoint(swiglu_mlp, x, *parts, use_reentrant=reentrant).sum().backward()
    for got, exact in zip([x.grad, *(t.grad for t in trained(parts))], want, strict=True):
        assert_same_bits(got, exact)


@needs_native
def test_only_down_trains_and_x_needs_nothing() -> None:
    parts = MLPS["down alone"](F32)
    x = torch.randn(9, K)
    got = torch.autograd.grad(swiglu_mlp(x, *parts).sum(), trained(parts))
    with use_backend("reference"):
        eager = torch.autograd.grad(by_parts(x, *parts).sum(), trained(parts))
        double = in_double(parts)
        want = torch.autograd.grad(by_parts(x.double(), *double).sum(), trained(double))
    for a, b, exact in zip(got, eager, want, strict=True):
        assert_no_worse(a, b, exact, exact.abs().max().expand_as(exact))


@needs_native
def test_under_autocast() -> None:
    parts = MLPS["all"](F32)
    x = torch.randn(4, K)
    with torch.autocast("cpu", dtype=BF16):
        assert_same_bits(swiglu_mlp(x, *parts), swiglu_mlp(x.to(BF16), *parts))


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    parts, x, dy = MLPS["all"](F32), torch.randn(5, K), torch.randn(5, N)
    torch._dynamo.reset()
    compiled = torch.compile(swiglu_mlp, backend="aot_eager", fullgraph=True)
    for got, want in zip(run(compiled, parts, x, dy), run(swiglu_mlp, parts, x, dy), strict=True):
        assert_same_bits(got, want)


def test_mlp_of_sizes_that_do_not_fit() -> None:
    gate, up, down = MLPS["none"](F32)
    x = torch.randn(3, K)
    with pytest.raises(ValueError, match="swiglu_mlp: up must be a projection to 128 features like gate, got 40"):
        swiglu_mlp(x, gate, Projection(random_quant_weight(40, K)), down)
    with pytest.raises(ValueError, match=r"swiglu_mlp: down must be a projection whose weight is \[N, 128\]"):
        swiglu_mlp(x, gate, up, Projection(random_quant_weight(40, K)))
    with pytest.raises(ValueError, match=r"swiglu_mlp: gate must be a projection whose weight is \[N, 63\]"):
        swiglu_mlp(x[:, :63], gate, up, down)
