"""Calls of the rotations' operators, forward and backward, held against float64; for several test files."""

from __future__ import annotations

import torch
from lora_tools import on_tensor_cores
from torch import Tensor

from peft_kernels.ops import butterfly_rotate, cayley, householder_rotate, pair_rotate
from peft_kernels.testing import assert_no_worse

FACTORS = [  # (M, d, m, blocks in a factor or "shared", b)
    (5, 12, 1, 4), (3, 9, 1, 3), (70, 64, 1, 2), (1, 32, 1, 32), (33, 128, 1, 64), (2, 256, 1, 256), (130, 96, 1, 6),
    (7, 24, 2, 2), (65, 128, 3, 4), (9, 160, 4, 10), (2, 512, 5, 8), (600, 72, 2, 6), (3, 7, 1, 7), (4, 5, 1, 1),
    (300, 48, 1, 16),
]  # fmt: skip


def _double(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def make_blocks(m: int, count: int, b: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Blocks near rotations, so that values keep their size from factor to factor."""
    noise = torch.randn(m, count, b, b, device=device, dtype=torch.float64) / b**0.5
    return (torch.eye(b, device=device, dtype=torch.float64) + noise / 2).to(dtype)


def check_butterfly(
    rows: int, d: int, m: int, b: int, dtype: torch.dtype, transposed: bool = False, shared: bool = False,
    blocks_dtype: torch.dtype = torch.float32, device: str = "cpu",
) -> list[Tensor]:  # fmt: skip
    """Forward and backward on the backend in force; what it returned."""
    op = butterfly_rotate
    x, dy = (torch.randn(rows, d, device=device, dtype=torch.float64).to(dtype) for _ in range(2))
    blocks = make_blocks(m, 1 if shared else d // b, b, blocks_dtype, device)
    exact = _double(dy, x, blocks)
    y = op.forward_op.op(x, blocks, transposed)
    # the terms behind an element: absolute values through all factors
    size = op.forward_op.reference(exact[1].abs(), exact[2].abs(), transposed)
    assert_no_worse(y, op.forward_op.reference(x, blocks, transposed),
                    op.forward_op.reference(*exact[1:], transposed), size)  # fmt: skip
    dx, dblocks = op.backward_op.op(dy, x, blocks, transposed, True, True)
    eager = op.backward_op.reference(dy, x, blocks, transposed, True, True)
    wanted = op.backward_op.reference(*exact, transposed, True, True)
    sizes = op.backward_op.reference(*(t.abs() for t in exact), transposed, True, True)
    assert_no_worse(dx, eager[0], wanted[0], sizes[0])
    terms = on_tensor_cores(x, rows, d)
    assert_no_worse(dblocks, eager[1], wanted[1], sizes[1], terms)
    only, none = op.backward_op.op(dy, x, blocks, transposed, True, False)
    assert_no_worse(only, eager[0], wanted[0], sizes[0])
    none_dx, again = op.backward_op.op(dy, x, blocks, transposed, False, True)
    assert_no_worse(again, eager[1], wanted[1], sizes[1], terms)
    assert none.numel() == none_dx.numel() == 0
    return [y, dx, dblocks]


def skew_blocks(count: int, b: int, size: float, device: str = "cpu") -> Tensor:
    """Skew-symmetric [count, b, b], float32, of about that norm."""
    full = torch.randn(count, b, b, device=device, dtype=torch.float64) * (size / max(b, 1) ** 0.5)
    return ((full - full.mT) / 2).float()


def check_cayley(count: int, b: int, terms: int, size: float, device: str = "cpu") -> list[Tensor]:
    op, q = cayley, skew_blocks(count, b, size, device)
    dr = torch.randn(count, b, b, device=device)
    exact, r = q.double(), cayley.forward_op.op(q, terms)
    wanted = op.forward_op.reference(exact, terms)
    eye = torch.eye(b, device=device, dtype=torch.float64)
    bound = eye + 2 * exact.abs() @ (eye + exact.abs()) if terms else wanted.abs() + 1.0
    assert_no_worse(r, op.forward_op.reference(q, terms), wanted, bound)
    kept = op.forward_op.reference(q, terms)
    dq = op.backward_op.op(dr, q, kept, terms)
    wanted = op.backward_op.reference(dr.double(), exact, wanted, terms)
    side = kept.double().abs() + eye
    bound = side.mT @ dr.double().abs() @ side.mT
    assert_no_worse(dq, op.backward_op.reference(dr, q, kept, terms), wanted, bound)
    return [r, dq]


def check_householder(
    rows: int, d: int, r: int, dtype: torch.dtype, uv_dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    op = householder_rotate
    x, dy = (torch.randn(rows, d, device=device, dtype=torch.float64).to(dtype) for _ in range(2))
    u, v = ((torch.randn(r, d, device=device, dtype=torch.float64) / d**0.5).to(uv_dtype) for _ in range(2))
    gradient, exact = dy.double(), _double(x, u, v)
    absolute = [t.abs() for t in exact]
    y, s = op.forward_op.op(x, u, v)
    eager, wanted = op.forward_op.reference(x, u, v), op.forward_op.reference(*exact)
    assert_no_worse(s, eager[1], wanted[1], absolute[0] @ absolute[1].t(), on_tensor_cores(x, d))
    assert_no_worse(y, eager[0], wanted[0], absolute[0] + absolute[0] @ absolute[1].t() @ absolute[2])
    found = op.backward_op.op(dy, x, u, v, eager[1], True, True)
    eager_back = op.backward_op.reference(dy, x, u, v, eager[1], True, True)
    wanted_back = op.backward_op.reference(gradient, *exact, wanted[1], True, True)
    t = gradient.abs() @ absolute[2].t()
    sizes = (gradient.abs() + t @ absolute[1], t.t() @ absolute[0],
             (absolute[0] @ absolute[1].t()).t() @ gradient.abs())  # fmt: skip
    for args in zip(found, eager_back, wanted_back, sizes, (0, *[on_tensor_cores(x, rows, d)] * 2), strict=True):
        assert_no_worse(*args)
    assert [t.numel() for t in op.backward_op.op(dy, x, u, v, s, False, False)] == [0, 0, 0]
    return [y, s, *found]


def check_pairs(
    rows: int, d: int, half: int, dtype: torch.dtype, columns: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    op = pair_rotate
    x, dy = (torch.randn(rows, d, device=device, dtype=torch.float64).to(dtype) for _ in range(2))
    first, second = (torch.randn(d, device=device, dtype=torch.float64).to(columns) for _ in range(2))
    exact = _double(dy, x, first, second)
    y = op.forward_op.op(x, first, second, half)
    assert_no_worse(y, op.forward_op.reference(x, first, second, half), op.forward_op.reference(*exact[1:], half),
                    exact[1].abs() * exact[2].abs() + _partner(exact[1].abs(), half) * exact[3].abs())  # fmt: skip
    found = op.backward_op.op(dy, x, first, second, half, True, True)
    eager = op.backward_op.reference(dy, x, first, second, half, True, True)
    wanted = op.backward_op.reference(*exact, half, True, True)
    g, h, f, s = (t.abs() for t in exact)
    sizes = (g * f + _partner(g * s, half), (g * h).sum(0), (g * _partner(h, half)).sum(0))
    for args in zip(found, eager, wanted, sizes, strict=True):
        assert_no_worse(*args)
    assert [t.numel() for t in op.backward_op.op(dy, x, first, second, half, False, False)] == [0, 0, 0]
    return [y, *found]


def _partner(x: Tensor, half: int) -> Tensor:
    return x.view(*x.shape[:-1], x.shape[-1] // (2 * half), 2, half).flip(-2).flatten(-3)
