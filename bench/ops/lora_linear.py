"""Rows of lora_linear: forward and forward + backward at a shape, per backend, beside torch and bitsandbytes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight, lora_linear, use_backend
from peft_kernels.ops.lora_linear import backward_op, forward_op

from .. import subjects
from ..gpu import others
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed, warm_everything
from ..results import Claim, Row
from . import default_backends, reason

OP = "lora_linear"
SHAPES = [(576, 576), (576, 1536), (4096, 4096)]
M = [1, 16, 128, 512]
RANK = 16


def _forward(x: Tensor, q: QuantWeight, a: Tensor | None, b: Tensor | None) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return lora_linear(x, q, a, b, 2.0)

    return call


def _step(x: Tensor, q: QuantWeight, a: Tensor, b: Tensor, dy: Tensor, dropout: float) -> Callable[[], object]:
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    seed = torch.tensor([7])

    def call() -> object:
        y = lora_linear(leaves[0], q, leaves[1], leaves[2], 2.0, dropout_p=dropout, seed=seed)
        return torch.autograd.grad(y, leaves, dy)

    return call


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for k, n in args.shapes or (SHAPES[:2] if args.quick else SHAPES):
        for m in args.m or (M[:2] if args.quick else M):
            for dtype in args.dtype:
                for backward in (False, True):
                    yield row(k, n, m, dtype, backward, args)


def row(k: int, n: int, m: int, dtype: str, backward: bool, args: argparse.Namespace) -> Row:
    """Theirs: PEFT + bitsandbytes, forward in eval mode (its fast kernel), forward + backward in train mode."""
    device = args.device
    count = copies_needed(n * k // 2, last_cache_bytes(device), 16 if args.quick else 64)
    weights = subjects.quant_copies(n, k, count, device=device)
    g = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(m, d, generator=g).to(device, subjects.DTYPES[dtype]) for d in (k, n))
    a, b = ((torch.randn(shape, generator=g) * 0.02).to(device) for shape in ((RANK, k), (n, RANK)))
    candidates, refused = [], {}
    for backend in args.backends or default_backends(device):
        why = reason(forward_op, backend, (x, *weights[0].flatten(), n, a, b, 2.0, None, 0.0, None))
        if why is None and backward:  # it may serve fewer rows
            s = torch.empty(m, RANK, device=device)
            why = reason(backward_op, backend, (dy, x, *weights[0].flatten(), a, b, s, 2.0, 0.0, None, True, True))
        if why is not None:
            refused[backend] = why
            continue
        make = (lambda q: _step(x, q, a, b, dy, args.dropout)) if backward else (lambda q: _forward(x, q, a, b))
        candidates.append(Candidate(backend, [_under(backend, make(q)) for q in weights]))
    theirs = _theirs(weights, x, dy, a, b, backward, args, refused)
    everyone = [*candidates, *theirs]
    what = "forward+backward" if backward else "forward"
    ours = [c.name for c in candidates if c.name != "reference"]
    claims = [Claim("a user's", [name], [c.name for c in theirs]) for name in ours]
    claims += [Claim("eager", [name], ["reference"]) for name in ours]
    times = 2 if backward else 1
    case = {"op": OP, "what": what, "K": k, "N": n, "M": m, "r": RANK, "dtype": dtype, "dropout": args.dropout,
            "refused": refused}  # fmt: skip
    return Row(f"{what} {k}x{n} M={m} {dtype}", case, {}, claims,
               times * 2.0 * m * n * k + (3 if backward else 1) * 2.0 * m * RANK * (n + k),
               times * (n * k * 0.5 + m * (n + k) * x.element_size()), candidates=everyone)  # fmt: skip


def _under(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    """`call` with a forced backend. The cost of forcing, about 5 us, is in every candidate of ours alike."""

    def forced() -> object:
        with use_backend(backend):
            return call()

    return forced


def _theirs(
    weights: list[QuantWeight], x: Tensor, dy: Tensor, a: Tensor, b: Tensor, backward: bool, args: argparse.Namespace,
    absent: dict[str, str],
) -> list[Candidate]:  # fmt: skip
    """Candidates of others; `absent` gets what cannot be run here, and why."""

    def layers() -> list[nn.Module]:
        return [subjects.bnb_layer(q, x.dtype) for q in weights]

    def wrapped(train: bool) -> list[nn.Module]:
        import peft

        return subjects.with_adapter(peft, layers(), RANK, args.dropout if train else 0.0, train)

    def peft_calls() -> others.Calls:
        if backward:
            return [subjects.step_call(layer, x, dy) for layer in wrapped(True)]
        return [subjects.forward_call(layer, x) for layer in wrapped(False)]

    def unsloth_calls() -> others.Calls:
        if args.dropout:
            raise ValueError("its kernels have no dropout")
        found = [(layer, others.unsloth(layer)) for layer in wrapped(backward)]
        if backward:
            return [subjects.step_call(layer, x, dy, through) for layer, through in found]
        return [subjects.forward_call(through, x) for _, through in found]

    name = "PEFT+bnb" if backward else "PEFT+bnb eval"
    found = others.optional(absent, name, "bitsandbytes", peft_calls)
    if args.device != "cpu":
        found += others.optional(absent, "unsloth", "unsloth", unsloth_calls)
        if not backward:
            found += others.optional(
                absent, "vLLM+bnb", "vllm", lambda: [others.vllm(layer, x, a, b, 2.0) for layer in layers()]
            )
    if not backward:
        warm_everything(found)
    return found
