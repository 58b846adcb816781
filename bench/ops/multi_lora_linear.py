"""Rows of multi_lora_linear: one base for 1, 8 and 64 adapters, beside the base alone and PEFT's mixed batch."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from peft_kernels import AdapterStack, QuantWeight, lora_linear, multi_lora_linear, use_backend
from peft_kernels.ops.multi_lora_linear import forward_op

from .. import subjects
from ..gpu import others
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed, warm_everything
from ..results import Claim, Row
from . import default_backends, reason

OP = "multi_lora_linear"
SHAPES = [(2048, 2048), (576, 576)]
M = [64, 8, 1]
RANK = 16
ADAPTERS = (1, 8, 64)
Weight = Tensor | QuantWeight


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for k, n in args.shapes or SHAPES[: 1 if args.quick else None]:
        for m in args.m or M[: 1 if args.quick else None]:
            for dtype in args.dtype:
                for kind in ("dense", "nf4"):
                    yield row(kind, k, n, m, dtype, False, args)
                    if m == M[0]:
                        yield row(kind, k, n, m, dtype, True, args)


def adapter_stack(n: int, k: int, count: int, dtype: torch.dtype, device: str) -> AdapterStack:
    g = torch.Generator().manual_seed(count)

    def small(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * 0.02).to(device, dtype)

    return AdapterStack.pack([(small(RANK, k), small(n, RANK), 2.0) for _ in range(count)])


def _weights(kind: str, n: int, k: int, count: int, dtype: torch.dtype, device: str) -> list[Weight]:
    if kind == "nf4":
        return list(subjects.quant_copies(n, k, count, device=device))
    return [(torch.randn(n, k) * 0.02).to(device, dtype) for _ in range(count)]


def _call(
    x: Tensor, w: Weight, stack: AdapterStack | None, index: Tensor, dy: Tensor | None, backend: str
) -> Callable[[], object]:
    """Forward; with dy forward and backward, the stack training. stack None: the base alone."""
    leaves = (
        [t.requires_grad_() for t in (x, *((stack.a, stack.b) if stack is not None else ()))] if dy is not None else []
    )

    def run() -> Tensor:
        return lora_linear(x, w) if stack is None else multi_lora_linear(x, w, stack, index)

    def call() -> object:
        with use_backend(backend):
            if dy is not None:
                return torch.autograd.grad(run(), leaves, dy)
            with torch.no_grad():
                return run()

    return call


def row(kind: str, k: int, n: int, m: int, dtype: str, backward: bool, args: argparse.Namespace) -> Row:
    """Theirs: PEFT's forward with adapter_names, on the same layer."""
    device, t = args.device, subjects.DTYPES[dtype]
    size = n * k // 2 if kind == "nf4" else n * k * t.itemsize
    # every copy has adapters of its own, so that they come from memory too
    count = copies_needed(size, last_cache_bytes(device), 2 if args.quick else 8)
    weights = _weights(kind, n, k, count, t, device)
    g = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(m, d, generator=g).to(device, t) for d in (k, n))
    several = sorted({min(c, m) for c in ADAPTERS})
    indices = {c: torch.arange(m, device=device) % c for c in several}
    stacks = {c: [adapter_stack(n, k, c, t, device) for _ in weights] for c in several}
    refused, candidates, claims = {}, [], []
    most = several[-1]
    theirs = "PEFT, " + _label(most)
    for backend in args.backends or default_backends(device):
        s = stacks[most][0]
        flat = weights[0].flatten() if isinstance(weights[0], QuantWeight) else (weights[0], *(None,) * 4, 0, 64, 256)
        why = reason(forward_op, backend, (x, *flat, n, s.a, s.b, indices[most], s.starts, s.ranks, s.scaling,
                                           s.max_rank, None, 0.0, None))  # fmt: skip
        if why is not None:
            refused[backend] = why
            continue
        grad = dy if backward else None

        def add(
            name: str, of: Sequence[AdapterStack | None], index: Tensor, backend: str = backend,
            grad: Tensor | None = grad,
        ) -> None:  # fmt: skip
            calls = [_call(x.clone(), w, p, index, grad, backend) for w, p in zip(weights, of, strict=True)]
            candidates.append(Candidate(name, calls))

        if backend == "reference":
            add(f"eager, {_label(most)}", stacks[most], indices[most])
            continue
        add(f"{backend}, base alone", [None] * count, indices[1])
        for c in several:
            add(f"{backend}, {_label(c)}", stacks[c], indices[c])
        ours = f"{backend}, {_label(most)}"
        if 8 in several:
            claims.append(Claim("cost of the base", [f"{backend}, {_label(8)}"], [f"{backend}, base alone"], 1 / 1.15))
        if most > 1:
            claims.append(Claim("cost of one adapter", [ours], [f"{backend}, {_label(1)}"], 1 / 1.5))
        claims += [Claim("a user's", [ours], [theirs]), Claim("eager", [ours], [f"eager, {_label(most)}"])]
    if not backward:  # PEFT's mixed batch is for inference
        candidates += others.optional(refused, theirs, "bitsandbytes" if kind == "nf4" else "peft",
                                      lambda: peft_calls(weights, x, indices[most], most))  # fmt: skip
    warm_everything(candidates)
    times, low = 2 if backward else 1, 2.0 * m * RANK * (n + k)
    case = {"op": OP, "what": "forward+backward" if backward else "forward", "weight": kind, "K": k, "N": n, "M": m,
            "r": RANK, "dtype": dtype, "refused": refused}  # fmt: skip
    title = f"{'forward+backward' if backward else 'forward'} {kind} {k}x{n} M={m} {dtype}"
    return Row(title, case, {}, claims, times * 2.0 * m * n * k + (3 if backward else 1) * low,
               times * (size + m * (n + k) * t.itemsize), candidates=candidates)  # fmt: skip


def _label(adapters: int) -> str:
    return f"{adapters} adapter{'s' if adapters > 1 else ''}"


def peft_calls(weights: list[Weight], x: Tensor, index: Tensor, adapters: int) -> others.Calls:
    import peft

    layers: list[nn.Module] = []
    for w in weights:
        if isinstance(w, QuantWeight):
            layers.append(subjects.bnb_layer(w, x.dtype))
            continue
        with torch.device("meta"):
            layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
        layer.weight = nn.Parameter(w, requires_grad=False)
        layers.append(layer)
    holder = nn.ModuleDict({f"n{i}": nn.ModuleDict({"lin": layer}) for i, layer in enumerate(layers)})
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["lin"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(adapters):
            peft.inject_adapter_in_model(config, holder, adapter_name=f"a{i}")
    for name, p in holder.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(x.dtype)
    names = [f"a{i}" for i in index.tolist()]
    holder.eval()

    def call(layer: nn.Module) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return layer(x, adapter_names=names)

        return run

    return [call(holder[f"n{i}"]["lin"]) for i in range(len(layers))]  # type: ignore[index]
