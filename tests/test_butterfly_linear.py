"""butterfly_linear: a rotation as the prologue of a dense or 4-bit linear; reference, and native at every level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lora_tools import FLOATS, LEVELS, at_level, level_fixture, needs_native, saved_bytes, threads
from rotation_tools import make_blocks
from torch import Tensor
from turned_tools import CASES, LONG, Turned, check_turned

from bench.flops import flops_of
from peft_kernels import QuantWeight, butterfly_linear, butterfly_rotate, lora_linear
from peft_kernels.ops import butterfly_linear as op
from peft_kernels.testing import assert_same_bits, random_quant_weight

level = level_fixture("reference")


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_against_float64(level: str, dtype: torch.dtype) -> None:
    for case in CASES:
        check_turned(case, dtype)
    if level in ("reference", *LEVELS[-1:]):
        check_turned(LONG, dtype)


@pytest.mark.parametrize("gain", [False, True])
def test_gradients(gain: bool) -> None:
    inputs = [rand(3, 16), rand(5, 16), make_blocks(2, 4, 4, torch.float64), rand(5), *([rand(5)] if gain else [])]
    assert torch.autograd.gradcheck(butterfly_linear, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("quantised", [False, True])
def test_it_is_the_rotation_and_the_product(level: str, quantised: bool) -> None:
    """Its bits are theirs, forward and backward; on the CPU the reference's product may be cut otherwise."""
    x = torch.randn(2, 37, 64, requires_grad=True)
    r = make_blocks(1, 2, 32).requires_grad_()
    weight: Tensor | QuantWeight = random_quant_weight(24, 64) if quantised else torch.randn(24, 64)
    bias, dy = torch.randn(24, requires_grad=True), torch.randn(2, 37, 24)
    y = butterfly_linear(x, weight, r, bias)
    want = lora_linear(butterfly_rotate(x, r), weight, bias=bias)
    assert_same_bits(y, want)
    for found, wanted in zip(*(torch.autograd.grad(t, [x, r, bias], dy) for t in (y, want)), strict=True):
        assert_same_bits(found, wanted)


def test_a_dense_weight_may_be_trained(level: str) -> None:
    x, r, w = torch.randn(9, 16), make_blocks(2, 4, 4), torch.randn(6, 16, requires_grad=True)
    gain, dy = torch.randn(6), torch.randn(9, 6)
    found = torch.autograd.grad(butterfly_linear(x, w, r, gain=gain), w, dy)[0]
    assert_same_bits(found, (dy * gain).t() @ butterfly_rotate(x, r))


@needs_native
def test_native_bits_do_not_depend_on_threads() -> None:
    found = []
    for n in (1, 2):
        torch.manual_seed(0)
        with threads(n), at_level(LEVELS[-1]):
            found.append(
                [t for dtype in FLOATS[:2] for c in (LONG, CASES[3], CASES[4]) for t in check_turned(c, dtype)]
            )
    for one, two in zip(*found, strict=True):
        assert_same_bits(one, two)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("b", [4, 32])
def test_it_costs_little_beside_the_layer(quantised: bool, b: int) -> None:
    """FLOPs at most 1.10 of the frozen layer's up to blocks of 32, and nothing is kept but what came in."""
    m, n = 96, 2048
    weight: Tensor | QuantWeight = random_quant_weight(n, n) if quantised else torch.randn(n, n)
    x, r, dy = torch.randn(m, n, requires_grad=True), make_blocks(1, n // b, b).requires_grad_(), torch.randn(m, n)
    own = [x, r, *(weight.flatten() if isinstance(weight, QuantWeight) else [weight])]
    y = []
    assert saved_bytes(lambda: y.append(butterfly_linear(x, weight, r)), own) == 0
    flops = flops_of(lambda: torch.autograd.grad(butterfly_linear(x, weight, r), [x, r], dy))
    frozen = flops_of(lambda: torch.autograd.grad(lora_linear(x, weight), x, dy))
    assert frozen == 4 * m * n * n
    assert frozen < flops <= 1.10 * frozen
    fixed = r.detach()  # then not even x
    assert saved_bytes(lambda: y.append(butterfly_linear(x, weight, fixed)), [fixed, *own[2:]]) == 0


@needs_native
def test_native_holds_no_turned_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8,192 rows only some are turned at a time: what torch allocates is y alone."""
    x, r = torch.randn(8192, 64), make_blocks(1, 16, 4)
    with at_level(LEVELS[-1]), torch.profiler.profile(profile_memory=True) as profile:
        butterfly_linear(x, torch.randn(16, 64), r)
    taken = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages() if "randn" not in e.key)
    assert taken < x.numel() * 4


def test_opcheck() -> None:
    blocks, weight = make_blocks(2, 4, 4), (torch.randn(5, 16), None, None, None, None, 0, 64, 256)
    x, dy, gain = torch.randn(3, 16), torch.randn(3, 5), torch.randn(5)
    for bias in (None, torch.randn(5)):
        torch.library.opcheck(op.forward_op.op, (x, blocks, *weight, 5, gain, bias, True))
    torch.library.opcheck(op.backward_op.op, (dy, x, blocks, *weight, gain, dy, True, True, True))


def _call(**changes: object) -> Tensor:
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(3, 8), "blocks": torch.ones(1, 2, 4, 4), **changes}
    return butterfly_linear(**arguments)  # type: ignore[arg-type]


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "x": (lambda: _call(x=torch.ones(2, 7)), r"\[..., 8\] to fit the weight"),
    "blocks": (lambda: _call(blocks=torch.ones(1, 3, 4, 4)), "for 8 features"),
    "factors": (lambda: _call(blocks=torch.ones(3, 2, 4, 4)), r"divisible by 2\^2"),
    "bias": (lambda: _call(bias=torch.ones(4)), r"bias must be \[3\]"),
    "gain": (lambda: _call(gain=torch.ones(4)), "of 3 elements"),
    "integers": (lambda: _call(blocks=torch.ones(1, 2, 4, 4, dtype=torch.int64)), "floating"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, text = BAD[name]
    with pytest.raises((ValueError, TypeError), match=text):
        call()


def test_autocast_casts_x() -> None:
    x, r = torch.randn(3, 16), make_blocks(1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert butterfly_linear(x, torch.randn(5, 16), r).dtype is torch.bfloat16


def test_shapes_with_nothing(level: str) -> None:
    for case in (Turned(0, 3, 8, 1, 4, gain=True), Turned(4, 0, 8, 1, 4)):
        check_turned(case, torch.float32)
