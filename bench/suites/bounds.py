"""The least that a step and a token of a model with adapters cost: products, and bytes of weights."""

from __future__ import annotations

from typing import Any

from torch import nn


def costs(model: Any, rows: int, length: int, adapters_in_turns: int = 1) -> dict[str, float]:
    """step_flops: of one training step of rows x length tokens; token_bytes: of one decoded token; quantized: layers in
    4 bits; trained: trainable numbers.

    A frozen weight is multiplied forward and for the gradient of its input, an adapter's also for its own gradient.
    Attention: two products forward and four backward over the positions that are seen. Experts count by those that a
    token has; adapters_in_turns: so many of equal size, of which a token has one. Embeddings, norms, state spaces and
    convolutions count nothing, nor does what is computed again: what is left out makes the bound lower.
    """
    frozen = adapters = bytes_read = 0.0
    quantized = trained = heads = 0
    config = model.config.get_text_config()
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if _is_experts(module):
            share = _chosen(config) / len(next(p for p in own if p.dim() == 3))
            frozen += share * sum(p.numel() for p in own if p.dim() == 3)
            bytes_read += share * sum(p.nbytes for p in own)
        elif ".lora_" in name and own:
            count = sum(p.numel() for p in own)
            adapters, trained = adapters + count, trained + count
            bytes_read += sum(p.nbytes for p in own)
        elif isinstance(module, nn.Linear) or type(module).__name__ == "NF4Linear":
            frozen += module.in_features * module.out_features  # type: ignore[operator]
            quantized += not isinstance(module, nn.Linear)
            bytes_read += sum(p.nbytes for p in own)
        elif type(module).__name__.endswith("Attention") and "." in name:
            heads += config.num_attention_heads
    attention = ATTENTION * attention_flops(heads * head_size(config), rows, length)
    step = 2.0 * rows * length * (2 * frozen + 3 * adapters / adapters_in_turns) + attention
    return {"step_flops": step, "token_bytes": bytes_read, "quantized": quantized, "trained": trained}


FORWARD, BACKWARD = 2, 4  # products of attention
ATTENTION = FORWARD + BACKWARD


def attention_flops(features: int, rows: int, length: int) -> float:
    """Of one product of causal attention: over the positions that are seen. features: of all heads that ask."""
    return 2.0 * features * rows * length * (length + 1) / 2


def head_size(config: Any) -> int:
    """Features of a head of attention."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _is_experts(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Experts") and any(p.dim() == 3 for p in module.parameters(recurse=False))


def _chosen(config: Any) -> int:
    """Experts of a token."""
    found = getattr(config, "moe_topk", None) or config.num_experts_per_tok
    return int(found[0] if isinstance(found, list) else found)
