"""LoRA+: B learns faster than A (arXiv 2402.12354)."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...layer.layer import AdapterLayer


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer with lr for A and lr * loraplus_lr_ratio for B and for vectors.

    loraplus_lr_embedding: the rate of adapters of embeddings, 1e-6 by default. loraplus_weight_decay: of all but biases
    and the vectors of normalisations, 0 by default. Other arguments go to `optimizer_cls`.
    """
    of_embeddings = set()
    undecayed = set()
    for module in model.modules():
        if isinstance(module, AdapterLayer) and module.base.kind == "embedding":
            of_embeddings |= {id(p) for _, c in module.containers() for p in c.parameters()}
        if isinstance(module, nn.LayerNorm):
            undecayed |= {id(p) for p in module.parameters(recurse=False)}
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B_no_decay": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in of_embeddings:
            group = "embedding"
        elif "lora_B" in name or p.ndim == 1:
            group = "B_no_decay" if "bias" in name or id(p) in undecayed else "B"
        else:
            group = "A"
        groups[group].append(p)
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    rates = {"A": lr, "embedding": kwargs.pop("loraplus_lr_embedding", 1e-6)}
    made: Any = optimizer_cls
    optimizer: Optimizer = made(
        [
            {"params": params, "weight_decay": 0.0 if group == "B_no_decay" else decay,
             "lr": rates.get(group, lr * loraplus_lr_ratio)}
            for group, params in groups.items()
        ],
        lr=lr,
        **kwargs,
    )  # fmt: skip
    if optimizer_cls.__name__ in ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"):
        optim: Any = importlib.import_module("bitsandbytes.optim")
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                optim.GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
