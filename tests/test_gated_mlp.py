"""gated_mlp: against float64; what it keeps, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from forms import grid
from lora_tools import BF16, F32, FLOATS, needs_native, saved_bytes
from torch import Tensor

from peft_kernels import PreparedCall, Projection, QuantWeight, gated, gated_mlp, lora_linear, use_backend
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight

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
    got = run(gated_mlp, parts, x, dy)
    with use_backend("reference"):
        eager, want = run(by_parts, parts, x, dy), run(by_parts, in_double(parts), x.double(), dy)
    for mine, theirs, exact in zip(got, eager, want, strict=True):
        # a chain of products: the largest element bounds what rounding on the way can do
        worst = [(t.double() - exact).abs().max().reshape(1) for t in (mine, theirs)]
        zero = torch.zeros(1, dtype=torch.float64)
        assert_no_worse(worst[0].to(mine.dtype), worst[1].to(mine.dtype), zero, exact.abs().max().reshape(1))
    with torch.no_grad():
        assert_same_bits(gated_mlp(x, *parts), got[0])


# Other forms: their parts in float32 and float64 by the layers one by one
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"act": "gelu_new"},
    "plain relu2": {"act": "relu2"},
    "halves": {"fused": "halves"},
    "pairs": {"fused": "pairs", "alpha": 1.702, "limit": 1.0, "shift": 1.0},
}


def parts_of(form: str, dtype: torch.dtype) -> list[Projection]:
    features = F if form.startswith("plain") else 2 * F
    return [layer(features, K, 4, dtype, 0.2, 1, form != "halves"), layer(N, F, 3, dtype, 0.1, 3, True)]


@pytest.mark.parametrize(("form", "dtype"), grid(OPTIONS, FLOATS), ids=str)
def test_other_forms(form: str, dtype: torch.dtype) -> None:
    # the gradient jumps at the limit, where in 16 bits the rounding of gate would decide
    options = {**OPTIONS[form], **({} if dtype is F32 else {"limit": 0.0})}

    def whole(x: Tensor, first: Projection, down: Projection) -> Tensor:
        return gated_mlp(x, first, None, down, **options)

    def one_by_one(x: Tensor, first: Projection, down: Projection) -> Tensor:
        return lora_linear(gated(lora_linear(x, *first), **options), *down)

    parts = parts_of(form, dtype)
    x, dy = torch.randn(3, 5, K).to(dtype), torch.randn(3, 5, N).to(dtype)
    got = run(whole, parts, x, dy)
    with use_backend("reference"):
        eager, want = run(one_by_one, parts, x, dy), run(one_by_one, in_double(parts), x.double(), dy)
    for mine, theirs, exact in zip(got, eager, want, strict=True):
        worst = [(t.double() - exact).abs().max().reshape(1) for t in (mine, theirs)]
        zero = torch.zeros(1, dtype=torch.float64)
        assert_no_worse(worst[0].to(mine.dtype), worst[1].to(mine.dtype), zero, exact.abs().max().reshape(1))
    with torch.no_grad():
        assert_same_bits(whole(x, *parts), got[0])


@needs_native
@pytest.mark.parametrize(("form", "dtype"), grid(["two", *OPTIONS], FLOATS), ids=str)
def test_a_prepared_token_has_the_bits_of_the_function(form: str, dtype: torch.dtype) -> None:
    made = MLPS["all"](dtype) if form == "two" else parts_of(form, dtype)
    first, *up, down = (p._replace(dropout_p=0.0, seed=None) for p in made)
    call, options = PreparedCall(gated_mlp), OPTIONS.get(form, {})
    with torch.no_grad():
        for shape in (1, 1, K), (1, K), (K,), (2, K), (0, K):
            x, parts = torch.randn(shape).to(dtype), (first, up[0] if up else None, down)
            assert_same_bits(call(x, *parts, *every_option(**options)), gated_mlp(x, *parts, **options))
            if x.numel():
                assert call.ready(x, *parts, *every_option(**options)) is not None


def every_option(act: str = "silu", fused: str | None = None, alpha: float | None = None, limit: float = 0.0,
                 shift: float = 0.0) -> tuple[Any, ...]:  # fmt: skip
    return act, fused, alpha, limit, shift


@pytest.mark.parametrize("form", ["plain", "pairs"])
def test_gradcheck_of_other_forms(form: str) -> None:
    parts = in_double(parts_of(form, F32))

    def f(x: Tensor, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        first, down = (Projection(*(next(left) if isinstance(t, Tensor) and t.requires_grad else t for t in p))
                       for p in parts)  # fmt: skip
        return gated_mlp(x, first, None, down, **OPTIONS[form])

    x = torch.randn(2, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x, *trained(parts)), fast_mode=True)


@needs_native
def test_a_fused_projection_keeps_one_tensor() -> None:
    m, parts = 50, [layer(2 * F, K, 4, BF16, 0.0, 1), layer(N, F, 3, BF16, 0.0, 3)]
    x = torch.randn(m, K, dtype=BF16, requires_grad=True)
    own = [t for p in parts for t in (*p, *(p.weight.flatten() if isinstance(p.weight, QuantWeight) else ()))]
    kept = saved_bytes(lambda: gated_mlp(x, parts[0], None, parts[1], fused="halves"), own)
    assert kept == m * (K + 2 * F) * 2 + m * 7 * 4


def test_gradcheck_of_the_mlp() -> None:
    parts = in_double(MLPS["all"](F32))
    leaves = trained(parts)

    def f(x: Tensor, *tensors: Tensor) -> Tensor:
        left = iter(tensors)

        def taken(p: Projection) -> Projection:
            return Projection(*(next(left) if isinstance(t, Tensor) and t.requires_grad else t for t in p))

        return gated_mlp(x, *map(taken, parts))

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
    assert saved_bytes(lambda: ys.append(gated_mlp(x, *parts)), own) == unsloth + small
    one_by_one = saved_bytes(lambda: by_parts(x, *parts), own)
    assert one_by_one >= unsloth + small + 2 * m * F * 2, "one by one, silu(gate) and h are kept, too"
    assert ys[0].requires_grad


@needs_native
def test_the_backward_leaves_what_was_saved_as_it_was() -> None:
    parts = MLPS["all"](BF16)
    x = torch.randn(9, K, dtype=BF16, requires_grad=True)
    y = gated_mlp(x, *parts)
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
    want = torch.autograd.grad(gated_mlp(x, *parts).sum(), [x, *trained(parts)])
    torch.manual_seed(1)
    torch.utils.checkpoint.checkpoint(gated_mlp, x, *parts, use_reentrant=reentrant).sum().backward()
    for got, exact in zip([x.grad, *(t.grad for t in trained(parts))], want, strict=True):
        assert_same_bits(got, exact)


@needs_native
def test_only_down_trains_and_x_needs_nothing() -> None:
    parts = MLPS["down alone"](F32)
    x = torch.randn(9, K)
    got = torch.autograd.grad(gated_mlp(x, *parts).sum(), trained(parts))
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
        assert_same_bits(gated_mlp(x, *parts), gated_mlp(x.to(BF16), *parts))


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    parts, x, dy = MLPS["all"](F32), torch.randn(5, K), torch.randn(5, N)
    torch._dynamo.reset()
    compiled = torch.compile(gated_mlp, backend="aot_eager", fullgraph=True)
    for got, want in zip(run(compiled, parts, x, dy), run(gated_mlp, parts, x, dy), strict=True):
        assert_same_bits(got, want)


def test_mlp_of_sizes_that_do_not_fit() -> None:
    gate, up, down = MLPS["none"](F32)
    x = torch.randn(3, K)
    with pytest.raises(ValueError, match="gated_mlp: up must be a projection to 128 features like gate, got 40"):
        gated_mlp(x, gate, Projection(random_quant_weight(40, K)), down)
    with pytest.raises(ValueError, match=r"gated_mlp: down must be a projection whose weight is \[N, 128\]"):
        gated_mlp(x, gate, up, Projection(random_quant_weight(40, K)))
    with pytest.raises(ValueError, match="gated_mlp: gate must be a projection to 2 F features where it gives both"):
        gated_mlp(x, Projection(random_quant_weight(41, K)), None, down, fused="pairs")
    with pytest.raises(ValueError, match=r"gated_mlp: down must be a projection whose weight is \[N, 64\]"):
        gated_mlp(x, gate, None, down, fused="halves")
    with pytest.raises(ValueError, match="gated_mlp: act must be one of"):
        gated_mlp(x, gate, up, down, "mish")
    with pytest.raises(ValueError, match=r"gated_mlp: gate must be a projection whose weight is \[N, 63\]"):
        gated_mlp(x[:, :63], gate, up, down)
