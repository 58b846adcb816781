"""VB-LoRA: a LoRA whose A and B are made of short vectors, each a mixture of a few from a bank that all layers share
(arXiv 2405.15179).

For every piece of `vector_length` numbers of A and B there are `num_vectors` logits; the piece is the sum of the bank's
`topk` vectors with the largest logits, weighted by their softmax.

Cost: that of LoRA, 1 + 3 r (in + out) / (2 in out), beside which making A and B, k r (in + out), is nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import HasBias, HasFanInFanOut, TargetConfig, check
from ..config.targets import DEFAULT_TARGETS, by_type
from .fused import Fused
from .math.factored import FactoredMethod, dropout
from .method import AdaptedLayer, LayerInfo, State, check_indices

INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


@dataclass
class VBLoRAConfig(HasFanInFanOut, HasBias, TargetConfig, own_type="VBLORA"):
    """r: the rank. num_vectors, vector_length: the bank's size; the length divides both sizes of every layer. topk: of
    how many vectors a piece is a mixture. save_only_topk_weights: files hold the mixtures and not the logits, which is
    small, and enough to compute with but not to train on. vblora_dropout: of the input. init_vector_bank_bound,
    init_logits_std: of the uniform bank and the normal logits at the start."""

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1


def count_saved(tuner: Any, adapter: str = "default") -> tuple[int, int]:
    """(VB-LoRA's numbers in a file, counted in float32, and the other trained ones)."""
    config, named = tuner.peft_config[adapter], list(tuner.named_parameters())
    logits, bank = (sum(p.numel() for n, p in named if f"vblora_{what}" in n) for what in ("logits", "vector_bank"))
    others = sum(p.numel() for n, p in named if "vblora_" not in n and p.requires_grad)
    if not config.save_only_topk_weights:
        return bank + logits, others
    pieces = logits / config.num_vectors
    index_size = _index_dtype(config.num_vectors).itemsize / 4
    return int(bank + pieces * (config.topk - 1) + pieces * config.topk * index_size), others


def print_saved(tuner: Any) -> None:
    """Print what `get_nb_savable_parameters` counts."""
    own, others = count_saved(tuner)
    print(f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + others:,d}")


def redraw(tuner: Any, config: VBLoRAConfig, adapter: str) -> None:
    """Start the bank of an adapter anew."""
    bank, bound = tuner.vblora_vector_bank[adapter], config.init_vector_bank_bound
    nn.init.uniform_(bank, -bound, bound)


class VBLoRA(FactoredMethod, config=VBLoRAConfig):
    tensors = ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")
    dropout = "vblora_dropout"
    default_targets: ClassVar[dict[str, Any]] = DEFAULT_TARGETS | by_type({
        "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt", "q k v o wi wo": "t5", "q k v o wi_0 wi_1 wo": "mt5",
        "query_proj key_proj value_proj dense": "deberta-v2",
    })  # fmt: skip
    counts = ("r", "num_vectors", "vector_length", "topk")
    divisor_error = "`{size}` {whole} must be divisible by `{field}` {part}"
    divisors: ClassVar[dict[str, tuple[str, ...]]] = {"vector_length": ("in_features", "out_features")}
    examples = (
        {"r": 2, "num_vectors": 6, "vector_length": 4},
        {"r": 3, "num_vectors": 5, "vector_length": 2, "topk": 3, "save_only_topk_weights": True},
    )
    model_methods: ClassVar[Any] = {
        "get_nb_savable_parameters": count_saved, "print_savable_parameters": print_saved,
        "_init_vblora_vector_bank": redraw,
    }  # fmt: skip

    def check_config(self, config: VBLoRAConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        if config.topk > config.num_vectors:
            raise ValueError(f"`topk`={config.topk} should be at most `num_vectors`={config.num_vectors}")
        for field in ("init_logits_std", "init_vector_bank_bound"):
            check(config, field, getattr(config, field) >= 0, "at least 0")

    def make_shared(self, config: VBLoRAConfig, layers: Sequence[LayerInfo]) -> State:
        return {"vblora_vector_bank": nn.Parameter(torch.zeros(config.num_vectors, config.vector_length))}

    def make_state(self, config: VBLoRAConfig, info: LayerInfo, shared: Any) -> State:
        a = torch.zeros(config.r, info.in_features // config.vector_length, config.num_vectors)
        b = torch.zeros(info.out_features // config.vector_length, config.r, config.num_vectors)
        if not a.is_meta:
            # PEFT draws the bank anew for every layer, so this gives the same numbers.
            nn.init.uniform_(shared.vblora_vector_bank, -config.init_vector_bank_bound, config.init_vector_bank_bound)
            a.normal_(0, config.init_logits_std)
            b.normal_(0, config.init_logits_std)
        logits = {"vblora_logits_A": nn.Parameter(a), "vblora_logits_B": nn.Parameter(b)}
        return {"r": config.r, "topk": config.topk, "vblora_dropout": dropout(config.vblora_dropout), **logits}

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor]:
        logits_a, logits_b, bank = s.vblora_logits_A, s.vblora_logits_B, shared.vblora_vector_bank
        if s.vblora_dropout.training and not torch.compiler.is_compiling() and logits_a[0, 0].isinf().any():
            why = "Ensure training was not resumed from a `save_only_topk_weights` model."
            raise RuntimeError(f"Found infinity values in VB-LoRA logits. {why}")
        a, b = (_mixture(logits, bank.to(logits.device), s.topk) for logits in (logits_a, logits_b))
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        plan = super().fused(layer, s, shared)
        # Logits have gradients that are small differences of large ones, to which the kernel's rounding is noise.
        return None if plan is None else lambda x: None if torch.is_grad_enabled() else plan(x)

    # Files with `save_only_topk_weights`: indices and weights, of which the last is one minus the others.

    def pack(self, config: VBLoRAConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not config.save_only_topk_weights:
            return tensors
        packed = {key: value for key, value in tensors.items() if "vblora_logits_" not in key}
        for key, value in tensors.items():
            if key not in packed:
                top, indices = value.topk(config.topk)
                packed[key + INDICES] = indices.to(_index_dtype(config.num_vectors))
                packed[key + WEIGHTS] = torch.softmax(top, dim=-1)[..., :-1].contiguous()
        return packed

    def unpack(self, config: VBLoRAConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {k: v for k, v in tensors.items() if not k.endswith((INDICES, WEIGHTS))}
        for key, value in tensors.items():
            if not key.endswith(INDICES):
                continue
            check_indices(key, value, "num_vectors", config.num_vectors)
            name, indices = key.removesuffix(INDICES), value.long()
            weights = tensors[name + WEIGHTS]
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1).clamp(min=0)
            logits = weights.new_full((*indices.shape[:-1], config.num_vectors), float("-inf"))
            found[name] = logits.scatter(-1, indices, weights.log())
        return found


def _mixture(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    top, indices = logits.topk(topk, dim=-1)
    weights = F.softmax(top, dim=-1)
    return (weights.unsqueeze(-2) @ F.embedding(indices, bank)).squeeze(-2)


def _index_dtype(num_vectors: int) -> torch.dtype:
    return torch.uint8 if num_vectors < 1 << 8 else torch.int16 if num_vectors < 1 << 15 else torch.int32
