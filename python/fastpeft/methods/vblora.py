"""VB-LoRA: a LoRA whose A and B are made of short vectors, each a mixture of a few from a bank that all layers share
(arXiv 2405.15179).

For every piece of `vector_length` numbers of A and B there are `num_vectors` logits; the piece is the sum of the bank's
`topk` vectors with the largest logits, weighted by their softmax.

Cost: A and B are made once a call, k r (in + out) products, which is nothing beside the T r (in + out) of LoRA; the
gradient of the bank is that of a gather. So it costs what LoRA does, 1 + 3 r (in + out) / (2 in out).

The small file format and PEFT's count of what a file holds take a third of this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import HasBias, HasFanInFanOut, TargetConfig
from ..config.targets import DEFAULT_TARGETS
from ..config.types import PeftType
from .adapted import AdaptedLayer
from .fused import Fused
from .math.factored import FactoredMethod, dropout
from .method import LayerInfo, State
from .registry import register

INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


@dataclass
class VBLoRAConfig(HasFanInFanOut, HasBias, TargetConfig):
    """r: the rank. num_vectors, vector_length: the bank's size; the length divides both sizes of every layer. topk: of
    how many vectors a piece is a mixture. save_only_topk_weights: files hold the mixtures and not the logits, which is
    small, and enough to compute with but not to train on. vblora_dropout: of the input. init_vector_bank_bound,
    init_logits_std: of the uniform bank and the normal logits at the start."""

    own_type = PeftType.VBLORA

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
    config = tuner.peft_config[adapter]
    named = list(tuner.named_parameters())
    logits = sum(p.numel() for n, p in named if "vblora_logits" in n)
    bank = sum(p.numel() for n, p in named if "vblora_vector_bank" in n)
    others = sum(p.numel() for n, p in named if "vblora_" not in n and p.requires_grad)
    if not config.save_only_topk_weights:
        return bank + logits, others
    pieces = logits / config.num_vectors
    index_size = _index_dtype(config.num_vectors).itemsize / 4
    return int(bank + pieces * (config.topk - 1) + pieces * config.topk * index_size), others


def print_saved(tuner: Any) -> None:
    """Print what `get_nb_savable_parameters` counts."""
    own, others = count_saved(tuner)
    print(
        f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {(own + others):,d}"
    )


@register
class VBLoRA(FactoredMethod):
    prefix = "vblora_"
    config_class = VBLoRAConfig
    tensors = ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")
    dropout = "vblora_dropout"
    default_targets: ClassVar[dict[str, Any]] = {
        **DEFAULT_TARGETS,
        "t5": ["q", "k", "v", "o", "wi", "wo"],
        "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    }
    counts = ("r", "num_vectors", "vector_length", "topk")
    examples = (
        {"r": 2, "num_vectors": 6, "vector_length": 4},
        {"r": 3, "num_vectors": 5, "vector_length": 2, "topk": 3, "save_only_topk_weights": True},
    )
    model_methods: ClassVar[dict[str, Any]] = {
        "get_nb_savable_parameters": count_saved, "print_savable_parameters": print_saved,
    }  # fmt: skip

    def check_config(self, config: VBLoRAConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        if config.topk > config.num_vectors:
            raise ValueError(f"`topk`={config.topk} should be at most `num_vectors`={config.num_vectors}")
        for field in ("init_logits_std", "init_vector_bank_bound"):
            if getattr(config, field) < 0:
                raise ValueError(f"`{field}` should not be negative, got {getattr(config, field)!r}.")

    def check_layer(self, config: VBLoRAConfig, info: LayerInfo) -> None:
        super().check_layer(config, info)
        for name in ("in_features", "out_features"):
            if getattr(info, name) % config.vector_length:
                raise ValueError(
                    f"`{name}` {getattr(info, name)} of {info.name!r} must be divisible by `vector_length` "
                    f"{config.vector_length}"
                )

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
        return {
            "r": config.r,
            "topk": config.topk,
            "vblora_dropout": dropout(config.vblora_dropout),
            "vblora_logits_A": nn.Parameter(a),
            "vblora_logits_B": nn.Parameter(b),
        }

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor]:
        logits_a, logits_b, bank = s.vblora_logits_A, s.vblora_logits_B, shared.vblora_vector_bank
        if s.vblora_dropout.training and not torch.compiler.is_compiling() and logits_a[0, 0].isinf().any():
            raise RuntimeError(
                "Found infinity values in VB-LoRA logits. Ensure training was not resumed from a "
                "`save_only_topk_weights` model."
            )
        bank = bank.to(logits_a.device)
        a, b = (_mixture(logits, bank, s.topk) for logits in (logits_a, logits_b))
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        plan = super().fused(layer, s, shared)
        # Logits have gradients that are small differences of large ones, to which the kernel's rounding is noise.
        return None if plan is None else lambda x: None if torch.is_grad_enabled() else plan(x)

    # Files with `save_only_topk_weights`: indices and weights, of which the last is one minus the others.

    def pack(self, config: VBLoRAConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not config.save_only_topk_weights:
            return tensors
        packed = {}
        for key, value in tensors.items():
            if "vblora_logits_" not in key:
                packed[key] = value
                continue
            top, indices = value.topk(config.topk)
            packed[key + INDICES] = indices.to(_index_dtype(config.num_vectors))
            packed[key + WEIGHTS] = torch.softmax(top, dim=-1)[..., :-1].contiguous()
        return packed

    def unpack(self, config: VBLoRAConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {k: v for k, v in tensors.items() if not k.endswith((INDICES, WEIGHTS))}
        for key, value in tensors.items():
            if not key.endswith(INDICES):
                continue
            name, indices = key.removesuffix(INDICES), value.long()
            if value.is_floating_point() or (indices < 0).any() or (indices >= config.num_vectors).any():
                raise ValueError(f"{key} should be indices below num_vectors={config.num_vectors}")
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
