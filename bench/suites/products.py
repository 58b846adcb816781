"""The products of a training step of a Llama with LoRA, each by itself: sizes, FLOPs, and calls that do nothing else.

A call goes through more copies of its weight, 4-bit with an adapter of its own, than the caches hold; its input is
warm, as it is in a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_kernels import Projection, QuantWeight, attention, lora_linear, lora_linear_stacked
from peft_kernels.ops.lora_linear import backward_op
from peft_kernels.ops.lora_linear_stacked import backward_op as stacked_backward_op

from .. import subjects
from ..machine import last_cache_bytes
from ..measure import Candidate, copies_needed
from . import bounds

STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that read one input
# Parts of a step: those that are added up, with the lesser of a backward in one call and its two halves; the others
# are for comparison.
FORWARD, DX, DAB, BACKWARD = "forward", "dX", "dA, dB", "backward in one call"
FORWARD_ALONE, DX_ALONE = "forward, no adapter", "dX, no adapter"
Call = Callable[[], object]


@dataclass(frozen=True)
class Product:
    """M x N x K: of the frozen weight or, for dA and dB, of rank K. count: calls in a step; flops: of a call."""

    layers: str
    part: str
    m: int
    n: int
    k: int
    count: int
    flops: float

    @property
    def name(self) -> str:
        return f"{self.layers}: {self.part}"


@dataclass(frozen=True)
class Layers:
    """Linear layers of one input. features: of the output of each."""

    names: tuple[str, ...]
    k: int
    features: tuple[int, ...]
    rank: int

    @property
    def title(self) -> str:
        return ", ".join(name.removesuffix("_proj") for name in self.names)

    def products(self, m: int, count: int) -> Iterator[Product]:
        n = sum(self.features)
        frozen, thin = 2.0 * m * n * self.k, 2.0 * m * self.rank * (n + self.k * len(self.features))
        for part, flops in ((FORWARD, frozen + thin), (DX, frozen + thin), (DAB, thin), (BACKWARD, frozen + 2 * thin),
                            (FORWARD_ALONE, frozen), (DX_ALONE, frozen)):  # fmt: skip
            yield Product(self.title, part, m, n, self.rank if part == DAB else self.k, count, flops)


def layers_of(model: Any) -> Counter[Layers]:
    """Layers with the adapter `default`, those of one input together -> how many of them."""
    found: Counter[Layers] = Counter()
    for _, parent in model.named_modules():
        own = {name: layer for name, layer in parent.named_children() if hasattr(layer, "base_layer")}
        stacks = [names for names in STACKS if set(names) <= set(own)]
        alone = [(name,) for name in own if not any(name in names for names in stacks)]
        for names in sorted([*stacks, *alone], key=lambda names: list(own).index(names[0])):
            first, *_ = bases = [own[name].base_layer for name in names]
            rank = own[names[0]].lora_A["default"].weight.shape[0]
            found[Layers(names, first.in_features, tuple(base.out_features for base in bases), rank)] += 1
    return found


def sizes_of_attention(model: Any) -> tuple[int, int, int, int]:
    """(layers, heads of queries, heads of keys, features of a head)."""
    config = model.config.get_text_config()
    heads: int = config.num_attention_heads
    return config.num_hidden_layers, heads, config.num_key_value_heads, bounds.head_size(config)


def products(model: Any, rows: int, length: int) -> list[Product]:
    """All of a step of rows x length tokens. Raises ValueError where they are not what the step's bound counts."""
    m = rows * length
    found = [product for layers, count in layers_of(model).items() for product in layers.products(m, count)]
    count, heads, _, size = sizes_of_attention(model)
    one = bounds.attention_flops(heads * size, rows, length)
    found += [Product("attention", part, length, length, size, count, times * one)
              for part, times in ((FORWARD, bounds.FORWARD), (BACKWARD, bounds.BACKWARD))]  # fmt: skip
    vocabulary, k = model.get_output_embeddings().weight.shape
    found += [Product("head", part, m, vocabulary, k, 1, 2.0 * m * vocabulary * k) for part in (FORWARD, DX)]
    total = sum(p.count * p.flops for p in found if p.part in (FORWARD, DX, DAB) or p.layers == "attention")
    bound = bounds.costs(model, rows, length)["step_flops"]
    if total != bound:
        raise ValueError(f"expected the products of {bound:.0f} FLOP, found {total:.0f}: the model has other layers "
                         "than a Llama with adapters on all linear layers")  # fmt: skip
    return found


def timed(model: Any, rows: int, length: int, dropout: float) -> list[tuple[Product, Candidate]]:
    """Each product with calls of it, in the dtype of the model."""
    calls: dict[tuple[str, str], Sequence[Call]] = {}
    for layers in layers_of(model):
        parts = _linear(layers, rows * length, model.dtype, dropout)
        calls |= {(layers.title, part): own for part, own in parts.items()}
    calls |= {("attention", part): [own] for part, own in _attention(model, rows, length).items()}
    calls |= {("head", part): [own] for part, own in _head(model, rows * length).items()}
    found = products(model, rows, length)
    return [(product, Candidate(product.name, calls[product.layers, product.part])) for product in found]


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02).to(dtype)


def _linear(layers: Layers, m: int, dtype: torch.dtype, dropout: float) -> dict[str, list[Call]]:
    """Part -> the calls on copies of the weights."""
    size = sum(layers.features) * layers.k // 2
    copies = copies_needed(size, last_cache_bytes())
    weights = zip(*(subjects.quant_copies(n, layers.k, copies) for n in layers.features), strict=True)
    x, dys = _random(m, layers.k, dtype=dtype), [_random(m, n, dtype=dtype) for n in layers.features]
    calls: dict[str, list[Call]] = {}
    for stack in weights:
        plain = [Projection(weight) for weight in stack]
        adapted = [Projection(w, _random(layers.rank, layers.k), _random(n, layers.rank), 2.0, None, dropout,
                              torch.tensor([7])) for w, n in zip(stack, layers.features, strict=True)]  # fmt: skip
        for part, call in ((FORWARD, _forward(x, adapted)), (DX, _backward(x, dys, adapted, True, False)),
                           (DAB, _backward(x, dys, adapted, False, True)),
                           (BACKWARD, _backward(x, dys, adapted, True, True)), (FORWARD_ALONE, _forward(x, plain)),
                           (DX_ALONE, _backward(x, dys, plain, True, False))):  # fmt: skip
            calls.setdefault(part, []).append(call)
    return calls


def _forward(x: Tensor, stack: list[Projection]) -> Call:
    @torch.no_grad()
    def call() -> object:
        return lora_linear(x, *stack[0]) if len(stack) == 1 else lora_linear_stacked(x, stack)

    return call


def _backward(x: Tensor, dys: list[Tensor], stack: list[Projection], need_dx: bool, need_ab: bool) -> Call:
    each = []
    for of in stack:
        assert isinstance(of.weight, QuantWeight)
        s = None if of.a is None else _random(len(x), len(of.a))
        each.append((*of.weight.flatten(), of.a, of.b, s, of.scaling, of.dropout_p, of.seed))
    if len(stack) == 1:
        return lambda: backward_op(dys[0], x, *each[0], need_dx, need_ab)
    lists = [list(values) for values in zip(*each, strict=True)]
    return lambda: stacked_backward_op(x, dys, *lists, need_dx, [need_ab] * len(stack))


def _attention(model: Any, rows: int, length: int) -> dict[str, Call]:
    """With rotary embeddings, as the model's is."""
    _, heads, groups, size = sizes_of_attention(model)
    q, k, v = (_random(rows, length, h, size, dtype=model.dtype).requires_grad_() for h in (heads, groups, groups))
    angles = torch.rand(1, length, size, generator=torch.Generator().manual_seed(1)) * 6
    cos, sin = angles.cos().to(model.dtype), angles.sin().to(model.dtype)

    def ours() -> Tensor:
        return attention(q, k, v, scale=size**-0.5, cos=cos, sin=sin)

    y = ours()
    dy = _random(*y.shape, dtype=model.dtype)
    return {FORWARD: torch.no_grad()(ours),
            BACKWARD: lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)}  # fmt: skip


def _head(model: Any, m: int) -> dict[str, Call]:
    """By slices of the vocabulary and of the tokens, as the chunked loss multiplies."""
    from fastpeft.recipes.chunked_loss import CHUNK_TOKENS, CHUNK_VOCAB

    weight = model.get_output_embeddings().weight.detach()
    slices = weight.split(CHUNK_VOCAB)
    tokens = _random(m, weight.shape[1], dtype=model.dtype).split(CHUNK_TOKENS)
    gradients = {(len(h), len(w)): _random(len(h), len(w), dtype=model.dtype) for h in tokens for w in slices}
    return {FORWARD: lambda: [h @ w.t() for h in tokens for w in slices],
            DX: lambda: [gradients[len(h), len(w)] @ w for h in tokens for w in slices]}  # fmt: skip
