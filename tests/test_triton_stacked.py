"""lora_linear_stacked and gated on Triton: in its interpreter against float64, and compiled for sm_80 and sm_90.

The interpreter is chosen when Triton is imported, so `test_in_the_interpreter` starts this same file in a process of
its own; what is marked `on_device` runs there, and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from forms import grid
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter, small_tiles
from lora_tools import F16, F32, Case, Stack, check_stack, make
from torch import Tensor

from bench.static import report
from peft_kernels import BackendUnavailable, Projection, lora_linear_stacked, tuning, use_backend
from peft_kernels.ops import gated
from peft_kernels.ops import lora_linear as single
from peft_kernels.ops import lora_linear_stacked as op
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight
from peft_kernels.triton_lib import host
from tests.test_kept_on_devices import (  # noqa: F401  # for the process that is here anyway
    test_device_calls_keep_nothing,
    test_device_kernels_pass_their_checks,
)

pytest.importorskip("triton", reason="Triton is not installed")


@not_interpreted
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, "device")


@pytest.fixture
def small() -> Iterator[None]:
    with small_tiles(), use_backend("triton"):
        yield


def put(c: Case) -> Case:
    def move(t: object) -> object:
        return t.to(DEVICE) if isinstance(t, Tensor) else t

    return Case(*(tuple(map(move, v)) if isinstance(v, tuple) else move(v) for v in vars(c).values()))


STACKS = {
    "no dropout": lambda m, t: [make(m, 40, 96, dtype=t, r=16, blocksize=32, nested=True),
                                make(m, 33, 96, dtype=t, r=3, bias=True, blocksize=32, seed=1)],
    "own masks": lambda m, t: [make(m, 64, 64, dtype=t, r=5, p=0.25), make(m, 7, 64, dtype=t, r=20, p=0.5, seed=1),
                               make(m, 48, 64, dtype=t, nested=True, seed=2)],
    "any layout": lambda m, t: [make(m, 24, 77, dtype=t, r=4), make(m, 31, 77, dtype=t, quant="dense", w_dtype=t, r=4),
                                make(m, 16, 77, dtype=t, quant="fp4", blocksize=64, bias=True, p=0.1, r=2)],
}  # fmt: skip


@on_device
@pytest.mark.parametrize(("name", "m", "dtype"), grid(STACKS, [3, 37], [F32, F16], strength=2), ids=str)
def test_device_stack(small: None, name: str, m: int, dtype: torch.dtype) -> None:
    stack = Stack([put(c) for c in STACKS[name](m, dtype)])
    check_stack(stack)
    for a, b in zip(stack.forward(op.forward_op.op), stack.forward(op.forward_op.op), strict=True):
        assert_same_bits(a, b)


@on_device
def test_device_stack_of_many_rows_takes_the_vendors_matmul(small: None) -> None:
    """There every projection runs by itself, and has the bits that it has alone."""
    stack = Stack([put(c) for c in STACKS["own masks"](37, F16)])
    with tuning.override("panels", from_M=16, from_M_dense=16):
        got = stack.forward(op.forward_op.op)
        for i, c in enumerate(stack.cases):
            assert_same_bits(got[i], c.forward(single.forward_op.op)[0])
        check_stack(stack)


NUMBERS = {"silu": (0, 1.0, 0.0, 0.0), "gelu": (1, 1.0, 0.0, 0.0), "gelu_tanh": (2, 1.0, 0.0, 0.0),
           "relu": (3, 1.0, 0.8, 0.0), "relu2": (4, 1.0, 0.0, 0.0), "clamped": (0, 1.702, 1.0, 1.0)}  # fmt: skip


@on_device
@pytest.mark.parametrize(("name", "dtype"), grid(NUMBERS, [F32, F16, torch.bfloat16], strength=2), ids=str)
def test_device_gated(small: None, name: str, dtype: torch.dtype) -> None:
    numbers = NUMBERS[name]
    for fused, (shape, scale) in enumerate((((3, 5), 1.0), ((4, 1025), 4.0), ((4096,), 9.0 if numbers[0] else 30.0))):
        gate, up, dh = (torch.randn(shape, device=DEVICE, dtype=torch.float64) for _ in range(3))
        both = torch.stack([gate * scale, up], -1).flatten(-2).to(dtype)
        calls = [*gated.parts_of(both, 2), dh.to(dtype)]
        exact = [t.double() for t in calls]
        want = gated.forward_op.reference(*exact[:2], *numbers)
        # the smaller side of a normal distribution, or of a sigmoid, is an exponential, whose exponent was rounded
        exponent = exact[0].abs() + {1: exact[0].square(), 2: 0.15 * exact[0].abs() ** 3}.get(numbers[0], 0.0)
        assert_no_worse(gated.forward_op.op(*calls[:2], *numbers), gated.forward_op.reference(*calls[:2], *numbers),
                        want, want.abs() * (1 + exponent * (numbers[0] in (1, 2) or numbers[1] != 1.0)))  # fmt: skip
        size = exact[2].abs() * (exact[1].abs() + abs(numbers[3])) * (1 + exact[0].abs())
        got = gated.backward_op.op(*calls, *numbers, fused)
        for mine, eager, right in zip(got, gated.backward_op.reference(*calls, *numbers, fused),
                                      gated.backward_op.reference(*exact, *numbers, fused), strict=True):  # fmt: skip
            if not fused:
                assert_no_worse(mine, eager, right, size)
            elif right.numel():
                sizes = torch.zeros_like(right)
                for part in gated.parts_of(sizes, fused):
                    part.copy_(size.maximum(exact[2].abs() * exact[0].abs()))
                assert_no_worse(mine, eager, right, sizes)
        alone = gated.backward_op.op(calls[0], None, calls[2], *numbers[:3], 0.0, 0)
        assert_no_worse(alone[0], gated.backward_op.reference(calls[0], None, calls[2], *numbers[:3], 0.0, 0)[0],
                        gated.backward_op.reference(exact[0], None, exact[2], *numbers[:3], 0.0, 0)[0],
                        exact[2].abs() * (1 + exact[0].abs()))  # fmt: skip
        assert alone[1].shape == (0,)


@not_interpreted
def test_more_projections_than_a_launch_holds_are_refused() -> None:
    x, q = torch.zeros(2, 64), random_quant_weight(8, 64)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="more than 4 projections"):
        lora_linear_stacked(x, [Projection(q)] * 5)


@not_interpreted
@pytest.mark.slow
@pytest.mark.parametrize(("m", "capability"), grid([1, 512], [80, 90]))
def test_compiled_without_spills(capability: int, m: int) -> None:
    """q, k, v of a large model (with dropout) and its gate and up (without), in bfloat16."""
    k, bf16 = 4096, torch.bfloat16
    for features, p in (((4096, 1024, 1024), 0.1), ((14336, 14336), 0.0)):
        x = torch.empty(m, k, dtype=bf16)
        rows, grads = [], []
        for n in features:
            q = random_quant_weight(n, k, nested=True).flatten()
            a, b, seed = torch.empty(16, k), torch.empty(n, 16), torch.tensor([1])
            rows.append((*q, n, a, b, 2.0, None, p, seed))
            grads.append((torch.empty(m, n, dtype=bf16), *q, a, b, torch.empty(m, 16), 2.0, p, seed))
        fused = tuning.override("panels", from_M=2048, from_M_backward=2048)
        with host.compile_only(capability, lambda name, _: name.startswith("stacked_")) as found, fused:
            backends = [o.load("triton") for o in (op.forward_op, op.backward_op)]
            backends[0].fn(x, *map(list, zip(*rows, strict=True)))
            backends[1].fn(x, *map(list, zip(*grads, strict=True)), True, [True] * len(features))
        assert [c.name for c in found] == ["stacked_forward_kernel", "stacked_backward_kernel"]
        for c in found:
            (kernel,) = report.read(c.kernel.asm["cubin"])
            assert (kernel.spills, kernel.stack) == (0, 0), (c.name, features, c.options)
