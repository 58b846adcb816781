"""Rows of the rotations: butterfly_rotate (OFT's block_rotate is one factor), householder_rotate, pair_rotate, cayley;
and of butterfly_linear on an NF4 weight, beside the rotation and the product one after the other.

Forward + backward, each backend beside the eager reference. Bound by memory but for large blocks and the product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peft_kernels import butterfly_linear, butterfly_rotate, cayley, householder_rotate, lora_linear, pair_rotate
from peft_kernels.dispatch import Op
from peft_kernels.ops import butterfly_rotate as butterfly_op
from peft_kernels.ops import cayley as cayley_op
from peft_kernels.ops import householder_rotate as householder_op
from peft_kernels.ops import pair_rotate as pair_op

from .. import subjects
from ..measure import Candidate
from ..results import Claim, Row
from . import default_backends, on_backends

OP = "rotations"
SIZES = [2048, 4096]
M = [128, 512]
KINDS: dict[str, tuple[Op, Callable[[int], list[Tensor]], Callable[..., Tensor], Callable[..., tuple[object, ...]]]] = {
    "BOFT b=4": (butterfly_op.forward_op, lambda d: [_blocks(1, d, 4)], butterfly_rotate, lambda x, r: (x, r, False)),
    "BOFT b=4 m=4": (butterfly_op.forward_op, lambda d: [_blocks(4, d, 4)], butterfly_rotate,
                     lambda x, r: (x, r, False)),
    "OFT b=32": (butterfly_op.forward_op, lambda d: [_blocks(1, d, 32)], butterfly_rotate, lambda x, r: (x, r, False)),
    "HRA r=8": (householder_op.forward_op, lambda d: [torch.randn(d, 8)], householder_rotate,
                lambda x, u: (x, u.t(), u.t())),
    "RoAd": (pair_op.forward_op, lambda d: [torch.rand(d), torch.rand(d)], lambda x, f, s: pair_rotate(x, f, s, 32),
             lambda x, f, s: (x, f, s, 32)),
}  # fmt: skip


def _blocks(m: int, d: int, b: int) -> Tensor:
    q = torch.randn(m, d // b, b, b) * 0.05
    return cayley(q - q.mT)


def _row(title: str, op: Op, call: Callable[[], object], example: tuple[object, ...], bytes_moved: float,
         case: dict[str, object], args: argparse.Namespace) -> Row:  # fmt: skip
    candidates, refused = on_backends(op, args.backends or default_backends(args.device), example, call)
    claims = [Claim("eager", [c.name], ["reference"]) for c in candidates if c.name != "reference"]
    return Row(title, {"op": OP, **case, "refused": refused}, {}, claims, None, bytes_moved, candidates=candidates)


def _linear_row(d: int, m: int, dtype: str, device: str) -> Row:
    """OFT's layer on whatever backend is chosen: as one operator, as two, and the layer alone."""
    weight = subjects.quant_copies(d, d, 1)[0].to(device)
    x = torch.randn(m, d, device=device).to(subjects.DTYPES[dtype]).requires_grad_()
    dy, r = torch.randn_like(x), _blocks(1, d, 32).to(device).requires_grad_()
    calls: dict[str, Callable[[], object]] = {
        "one": lambda: torch.autograd.grad(butterfly_linear(x, weight, r), [x, r], dy),
        "two": lambda: torch.autograd.grad(lora_linear(butterfly_rotate(x, r), weight), [x, r], dy),
        "frozen": lambda: torch.autograd.grad(lora_linear(x, weight), x, dy),
    }
    case = {"op": OP, "what": "forward+backward", "kind": "butterfly_linear", "M": m, "d": d, "dtype": dtype}
    candidates = [Candidate(name, [call]) for name, call in calls.items()]
    claims = [Claim("two calls", ["one"], ["two"]), Claim("the layer", ["one"], ["frozen"])]
    return Row(f"OFT b=32 NF4 linear {m}x{d} {dtype}", case, {}, claims, 4.0 * m * d * d, candidates=candidates)


def rows(args: argparse.Namespace) -> Iterator[Row]:
    sizes = [k for k, _ in args.shapes] if args.shapes else SIZES[: 1 if args.quick else None]
    for d in sizes:
        for kind, (op, make, function, raw) in KINDS.items():
            for m in args.m or M[-1:]:
                for dtype in args.dtype[:1] if args.quick else args.dtype:
                    torch.manual_seed(0)
                    x = torch.randn(m, d, device=args.device).to(subjects.DTYPES[dtype]).requires_grad_()
                    dy, parts = torch.randn_like(x), [t.to(args.device).requires_grad_() for t in make(d)]

                    def call(x: Tensor = x, dy: Tensor = dy, parts: list[Tensor] = parts,
                             function: Callable[..., Tensor] = function) -> object:  # fmt: skip
                        return torch.autograd.grad(function(x, *parts), [x, *parts], dy)

                    # read x, write y; read x and dy, write dx
                    moved = 5.0 * m * d * x.element_size()
                    case = {"what": "forward+backward", "kind": kind, "M": m, "d": d, "dtype": dtype}
                    example = raw(*(t.detach() for t in (x, *parts)))
                    yield _row(f"{kind} {m}x{d} {dtype}", op, call, example, moved, case, args)
        for m in args.m or M[-1:]:
            yield _linear_row(d, m, args.dtype[0], args.device)
        for b, terms in ((4, None), (32, 5)):
            q = torch.randn(d // b, b, b, device=args.device) * 0.05
            q = (q - q.mT).requires_grad_()

            def turn(q: Tensor = q, terms: int | None = terms) -> object:
                return torch.autograd.grad(cayley(q, terms).sum(), q)

            case = {"what": "forward+backward", "kind": "cayley", "b": b, "d": d, "terms": terms or 0}
            yield _row(f"cayley b={b} d={d} terms={terms or 'exact'}", cayley_op.forward_op, turn,
                       (q.detach(), terms or 0), 5.0 * q.numel() * 4, case, args)  # fmt: skip
