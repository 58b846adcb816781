"""Rows of lora_mixture: eight adapters mixed per token, beside one adapter and the base, and PEFT's X-LoRA layer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight, lora_linear, lora_mixture, use_backend
from peft_kernels.ops.lora_linear import _flops as one_flops
from peft_kernels.ops.lora_linear import _flops_backward as one_flops_backward
from peft_kernels.ops.lora_mixture import _flops, _flops_backward, backward_op, forward_op

from .. import subjects
from ..gpu import others
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed, warm_everything
from ..results import Claim, Row
from . import default_backends, reason

OP = "lora_mixture"
SHAPES = [(2048, 2048), (576, 576)]
M = [512]
TOKENS = 128  # of a sequence
RANK, ADAPTERS, TOP = 16, 8, 2
# Times the cost of one adapter, forward and backward: of layers of 2048 features and more, and of smaller ones times
# the ratio of the FLOPs.
MOST_WIDE, MOST_NARROW = 1.5, 1.3
Weight = Tensor | QuantWeight


def rows(args: argparse.Namespace) -> Iterator[Row]:
    for k, n in args.shapes or SHAPES[: 1 if args.quick else None]:
        for m in args.m or M:
            for dtype in args.dtype:
                for kind in ("dense", "nf4"):
                    for backward in (False, True):
                        yield row(kind, k, n, m, dtype, backward, args)


def flops(k: int, n: int, m: int, adapters: int | None, backward: bool) -> float:
    """Multiplications and additions of a call, as torch's counter has them; adapters None: of lora_linear's one."""
    x, dy, rest = torch.empty(m, k, device="meta"), torch.empty(m, n, device="meta"), [None] * 9
    if adapters is None:
        a = torch.empty(RANK, k, device="meta")
        found = one_flops(x, *rest[:8], n, a)
        return found + (one_flops_backward(dy, x, *rest[:8], a, True, True) if backward else 0)
    a = torch.empty(adapters, RANK, k, device="meta")
    found = _flops(x, *rest[:8], n, a)
    return found + (_flops_backward(dy, x, *rest[:8], a, True, True, True) if backward else 0)


class Layer:
    """A layer's tensors: W and the adapters A [r, K] and B [N, r], which require gradients."""

    def __init__(self, w: Weight, k: int, n: int, dtype: torch.dtype, device: str) -> None:
        g = torch.Generator().manual_seed(5)

        def small(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=g) * 0.02).to(device, dtype).requires_grad_()

        self.w = w
        self.a, self.b = [small(RANK, k) for _ in range(ADAPTERS)], [small(n, RANK) for _ in range(ADAPTERS)]

    def joined(self) -> tuple[Tensor, Tensor]:
        """Of all adapters, without gradients: A [n, r, K] and B [N, n, r], as the operator takes them."""
        return torch.stack(self.a).detach(), torch.stack(self.b, 1).detach()


def _call(layer: Layer, x: Tensor, dy: Tensor | None, mix: Tensor | None, count: int, masked: bool, backend: str
          ) -> Callable[[], object]:  # fmt: skip
    """Forward; with dy forward and backward. mix None: lora_linear of `count` adapters, 0 or 1."""
    leaves = [x, *layer.a[:count], *layer.b[:count], *([] if mix is None else [mix])]

    def run() -> Tensor:
        if mix is not None:
            return lora_mixture(x, layer.w, layer.a, layer.b, mix, 2.0, masked=masked)
        return lora_linear(x, layer.w, *((layer.a[0], layer.b[0], 2.0) if count else ()))

    def call() -> object:
        with use_backend(backend):
            if dy is not None:
                return torch.autograd.grad(run(), leaves, dy)
            with torch.no_grad():
                return run()

    return call


def row(kind: str, k: int, n: int, m: int, dtype: str, backward: bool, args: argparse.Namespace) -> Row:
    """Theirs: PEFT's layer of X-LoRA, with the same weights of the adapters."""
    device, t = args.device, subjects.DTYPES[dtype]
    size = n * k // 2 if kind == "nf4" else n * k * t.itemsize
    count = copies_needed(size, last_cache_bytes(device), 2 if args.quick else 4)
    weights: list[Weight] = (
        list(subjects.quant_copies(n, k, count, device=device)) if kind == "nf4"
        else [(torch.randn(n, k) * 0.02).to(device, t) for _ in range(count)]
    )  # fmt: skip
    layers = [Layer(w, k, n, t, device) for w in weights]
    g = torch.Generator().manual_seed(3)
    shape = (m // TOKENS, TOKENS) if m % TOKENS == 0 else (1, m)
    x, dy = (torch.randn(*shape, d, generator=g).to(device, t) for d in (k, n))
    mix = torch.randn(*shape, ADAPTERS, generator=g).softmax(-1).to(device)
    top = mix[:, :1].topk(TOP).indices  # one choice per sequence
    few = torch.zeros_like(mix).scatter(-1, top.expand(*shape, TOP), 1 / TOP)
    x, mix, few = (leaf.requires_grad_(backward) for leaf in (x, mix, few))
    refused: dict[str, str] = {}
    candidates, claims, theirs = [], [], f"PEFT, X-LoRA of {ADAPTERS}"
    grad, first = dy if backward else None, layers[0]
    joined_a, joined_b = first.joined()
    flat = weights[0].flatten() if isinstance(weights[0], QuantWeight) else (weights[0], *(None,) * 4, 0, 64, 256)
    given = (*flat, n, joined_a, joined_b, mix.detach().view(m, -1), False, None, 0.0, None)
    for backend in args.backends or default_backends(device):
        why = reason(forward_op, backend, (x.detach().view(m, k), *given))
        if why is None and backward:
            s = torch.empty(m, ADAPTERS, RANK, device=device)
            why = reason(backward_op, backend, (dy.view(m, n), x.detach().view(m, k), *flat, joined_a, joined_b, s,
                                                given[11], False, 0.0, None, True, True, True))  # fmt: skip
        if why is not None:
            refused[backend] = why
            continue
        ours = f"{backend}, {ADAPTERS} adapters"
        kinds = {ours: (mix, ADAPTERS, False), f"{backend}, base alone": (None, 0, False),
                 f"{backend}, 1 adapter": (None, 1, False), f"{backend}, {TOP} of {ADAPTERS}": (few, ADAPTERS, True)}
        if backend == "reference":
            kinds = {"eager": kinds[ours]}
        for name, (weighing, adapters, masked) in kinds.items():
            candidates.append(Candidate(name, [_call(layer, x, grad, weighing, adapters, masked, backend)
                                               for layer in layers]))  # fmt: skip
        if backend != "reference":
            ratio = flops(k, n, m, ADAPTERS, backward) / flops(k, n, m, None, backward)
            most = MOST_WIDE if min(k, n) >= 2048 else MOST_NARROW * ratio
            claims += [Claim("cost of one adapter", [ours], [f"{backend}, 1 adapter"], 1 / most if backward else None),
                       Claim("those left out", [f"{backend}, {TOP} of {ADAPTERS}"], [ours]),
                       Claim("a user's", [ours], [theirs]), Claim("eager", [ours], ["eager"])]  # fmt: skip
    candidates += others.optional(refused, theirs, "bitsandbytes" if kind == "nf4" else "peft",
                                  lambda: peft_calls(layers, x, grad, mix))  # fmt: skip
    warm_everything(candidates)
    one, eight = (flops(k, n, m, adapters, backward) for adapters in (None, ADAPTERS))
    what = "forward+backward" if backward else "forward"
    case = {"op": OP, "what": what, "weight": kind, "K": k, "N": n, "M": m, "r": RANK, "adapters": ADAPTERS,
            "dtype": dtype, "flops_ratio": round(eight / one, 3), "refused": refused}  # fmt: skip
    found = Row(f"{what} {kind} {k}x{n} M={m} {dtype}", case, {}, claims, eight,
                (2 if backward else 1) * (size + m * (n + k) * t.itemsize), candidates=candidates)  # fmt: skip
    found.notes.append(f"FLOPs of {ADAPTERS} adapters are {eight / one:.3f} times those of one")
    return found


def peft_calls(layers: list[Layer], x: Tensor, dy: Tensor | None, mix: Tensor) -> others.Calls:
    import peft
    from peft.tuners.xlora.layer import XLoraLinearLayer

    def base(w: Weight) -> nn.Module:
        if isinstance(w, QuantWeight):
            return subjects.bnb_layer(w, x.dtype)
        with torch.device("meta"):
            layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
        layer.weight = nn.Parameter(w, requires_grad=False)
        return layer

    holder = nn.ModuleDict({f"n{i}": nn.ModuleDict({"lin": base(layer.w)}) for i, layer in enumerate(layers)})
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["lin"], init_lora_weights=False)
    for i in range(ADAPTERS):
        peft.inject_adapter_in_model(config, holder, adapter_name=f"a{i}")
    x_config = SimpleNamespace(top_k_lora=None, enable_softmax_topk=False, global_scaling_weight=1.0)

    def call(layer: Layer, target: nn.Module) -> Callable[[], object]:
        target._active_adapter = [f"a{i}" for i in range(ADAPTERS)]  # set_adapter would freeze and thaw them
        for i in range(ADAPTERS):
            target.lora_A[f"a{i}"].weight, target.lora_B[f"a{i}"].weight = (
                nn.Parameter(t.detach().clone()) for t in (layer.a[i], layer.b[i])
            )
        weights = mix[:, :, None].to(x.dtype)  # as its classifier gives them
        mixed = XLoraLinearLayer(SimpleNamespace(disabled=False), target, target.forward, 0, x_config)
        parts = [target.lora_A, target.lora_B]
        leaves = [x, mix, *(part[f"a{i}"].weight for part in parts for i in range(ADAPTERS))]

        def run() -> object:
            if dy is not None:
                return torch.autograd.grad(mixed.forward(x, scalings=weights), leaves, dy)
            with torch.no_grad():
                return mixed.forward(x, scalings=weights)

        return run

    return [call(layer, holder[f"n{i}"]["lin"]) for i, layer in enumerate(layers)]  # type: ignore[index]
