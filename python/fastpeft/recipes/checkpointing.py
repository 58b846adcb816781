"""Gradient checkpointing of some layers: those in between keep their activations, and are not computed again."""

from __future__ import annotations

from typing import Any

from torch import nn

KEEPS = 0.36  # of the layers: a third of the cost comes off, and activations stay below 0.45 of all


def checkpoint_layers(model: nn.Module, keeps: float = KEEPS) -> int:
    """Enable gradient checkpointing (without reentrant checkpoints) in a model of transformers, or an adapter model
    around one, but for every n-th layer: the number of layers that are computed again in the backward.

    keeps: the share of layers that keep their activations, 0 to 1, evenly spread and rounded to whole layers. A layer
    that keeps costs memory and no time, any other the reverse, so a share of both is had for each. Raises ValueError on
    another share, and where the model has no layers that checkpoint themselves.
    """
    if not 0.0 <= keeps <= 1.0:
        raise ValueError(f"checkpoint_layers: keeps is a share from 0 to 1, got {keeps}")
    given: Any = model
    base = given.get_base_model() if hasattr(model, "get_base_model") else given
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers lets the embeddings' output require gradients, for reentrant checkpoints; here it only costs
    base.disable_input_require_grads()
    layers = [m for m in base.modules() if "gradient_checkpointing" in m.__dict__ and m.gradient_checkpointing]
    layers = [layer for layer in layers if _checkpoints_itself(layer)]
    if not layers:
        raise ValueError(f"checkpoint_layers: {type(base).__name__} has no layers that checkpoint themselves: use "
                         "gradient_checkpointing_enable")  # fmt: skip
    kept = round(keeps * len(layers))
    for i in range(kept):
        layers[(2 * i + 1) * len(layers) // (2 * kept)].gradient_checkpointing = False
    return len(layers) - kept


def _checkpoints_itself(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)
