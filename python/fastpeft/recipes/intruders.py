"""Intruder dimensions: singular vectors of the adapted weight that are like none of the base weight's, and fade them
(arXiv 2410.21228)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..methods.registry import get_method, method_of
from ..model.combine import factors_of
from ..weights.base import widened


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any, old_adapter_name: str = "default", new_adapter_name: str = "intruder_reduced", top_k: int = 10,
    threshold_epsilon: float = 0.5, mitigation_lambda: float = 0.75, logging_sink: Callable[[str], Any] | None = print,
) -> None:  # fmt: skip
    """Add a LoRA that is an existing one with its intruder dimensions scaled by `mitigation_lambda`; it becomes active.

    Of the adapted weight's `top_k` left singular vectors, those are intruders whose cosine with every one of the base
    weight's is below `threshold_epsilon`. Less of them restores what the base knew, at a cost for the task.
    """
    say = logging_sink or (lambda text: None)
    if peft_model.peft_type != "LORA":
        raise ValueError("The provided model is not using LoRA and is therefore not supported.")
    config = copy.copy(peft_model.peft_config[old_adapter_name])
    config.init_lora_weights = True  # A and B come from the old one, and so does what it took from the base
    if method_of(config) is not get_method("LORA"):
        raise ValueError("A variant of LoRA has no A and B that its intruder dimensions could be taken from.")
    layers = list(peft_model.base_model.adapter_layers(old_adapter_name))
    for name, layer in layers:
        if layer.info.kind not in ("linear", "embedding"):
            raise ValueError(f"{name}: intruder dimensions are those of a matrix, not of a {layer.base.label}")
    single = any(factors_of(layer, old_adapter_name)[0].dtype is torch.float32 for _, layer in layers)
    peft_model.add_adapter(new_adapter_name, config, autocast_adapter_dtype=single)  # the old one's dtype
    for name, layer in layers:
        old = factors_of(layer, old_adapter_name)
        factors = _mitigated(layer, old_adapter_name, old[0].shape[0], top_k, threshold_epsilon, mitigation_lambda)
        say(f"{name}: No intruders" if factors is None else f"{name}: Intruders: {factors[2]}")
        for target, value in zip(factors_of(layer, new_adapter_name), factors[:2] if factors else old, strict=True):
            target.copy_(value)
    say(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


def _mitigated(
    layer: Any, adapter: str, r: int, top_k: int, threshold: float, scale: float
) -> tuple[Tensor, Tensor, int] | None:
    """A, B and the number of intruders, or None without any."""
    w = widened(layer.unmerged_weight()[0])
    adapted = layer.merged_weight([adapter], (w, None))[0]
    base = torch.linalg.svd(w, full_matrices=False)[0]
    u, s, vh = torch.linalg.svd(adapted, full_matrices=False)
    cosines = (u.T @ base).abs().amax(dim=1)[:top_k]
    found = torch.where(cosines < threshold)[0]
    if not len(found):
        return None
    faded = adapted + (scale - 1) * ((u[:, found] * s[found]) @ vh[found])
    u, s, vh = torch.linalg.svd((faded - w) / layer.scaling[adapter], full_matrices=False)
    root = s[:r].sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root, len(found)
