"""A run worked out without training: its parameters, memory, steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from . import gguf_base, models
from .config import TrainConfig
from .run import Prepared, adapter_config


def describe(config: TrainConfig, prepared: Sequence[Prepared]) -> dict[str, Any]:
    """The plan of a run. Builds the model without weights; a run of several adapters has ``adapters`` by name."""
    from ... import get_peft_model

    started = time.monotonic()
    first = prepared[0]
    model = models.empty_model(first.source, first.dtype)
    base_bytes = _base_bytes(model, config)
    total = gguf_base.elements(model)
    shape = model.config.get_text_config()
    adapters = {}
    for p in prepared:
        if p is first:
            model = get_peft_model(model, adapter_config(p.config), p.name)
        else:
            model.add_adapter(p.name, adapter_config(p.config))
            model.set_adapter(p.name)
        adapters[p.name] = _adapter(p, sum(t.numel() for t in model.parameters() if t.requires_grad))
    trainable = sum(a["trainable_parameters"] for a in adapters.values())
    states = (_STATES_PER_PARAMETER[p.config.optimizer] * adapters[p.name]["trainable_parameters"] for p in prepared)
    memory = {
        "base": base_bytes,
        "adapter": 4 * trainable,
        "gradients": 4 * trainable,
        "optimizer": round(4 * sum(states)),
        "activations": sum(_activation_bytes(shape, p) for p in prepared),
        "loss": 4 * config.loss_chunk_tokens * config.loss_chunk_vocab,
    }
    return {
        "model": first.source.note,
        "device": str(first.device),
        "dtype": str(first.dtype).removeprefix("torch."),
        "quantize": config.quantize,
        "parameters": total,
        **({"trainable_parameters": trainable, "adapters": adapters} if config.adapters else adapters[first.name]),
        "memory_bytes": memory,
        "memory_total_bytes": sum(memory.values()),
        "seconds_to_plan": time.monotonic() - started,
        "config": config.to_dict(),
    }


def _adapter(prepared: Prepared, trainable: int) -> dict[str, Any]:
    from .optim import warmup_steps
    from .track import make_plan

    config, plan = prepared.config, make_plan(prepared.config, prepared.train.examples)
    first = [sum(len(plan.examples[i] or ()) for i in row) for rows in plan.step(0)[1] for row in rows]
    return {
        "trainable_parameters": trainable,
        "examples": len(prepared.train.examples),
        "held_out_examples": len(prepared.held_out.examples),
        "by_estimate": plan.about or prepared.train.about,
        "tokens_per_epoch": prepared.train.tokens,
        "learned_tokens_per_epoch": prepared.train.learned,
        "examples_cut": prepared.train.cut,
        "examples_dropped": prepared.train.dropped,
        "steps": len(plan),
        "warmup_steps": warmup_steps(config, len(plan)),
        "epochs": plan.epochs,
        "rows_per_step": len(first),
        "row_fill": sum(first) / (len(first) * (config.max_length if config.packing else max(first))),
    }


_STATES_PER_PARAMETER = {
    "adamw": 2.0, "adam": 2.0, "sgd": 1.0, "rmsprop": 2.0, "adafactor": 0.1,
    "adamw_8bit": 0.5, "paged_adamw_8bit": 0.5, "lion_8bit": 0.25,
}  # fmt: skip


def _base_bytes(model: Any, config: TrainConfig) -> int:
    """Bytes of the frozen weights: 4 bits and the scales for what will be quantised, the dtype for the rest."""
    import torch

    if config.quantize == "gguf":
        return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    scale_bits = (8 + 32 / 256) / 64 if config.double_quant else 32 / 64
    quantised = set()
    for name, module in model.named_modules():
        skipped = any(name == s or name.endswith("." + s) for s in config.quantize_skip)
        if config.quantize == "none" or skipped:
            continue
        if type(module) is torch.nn.Linear:
            quantised.add(id(module.weight))
        elif config.quantize_experts and type(module).__name__.endswith("Experts"):
            quantised.update(id(p) for p in module.parameters(recurse=False) if p.dim() == 3)
    total = 0.0
    for parameter in model.parameters():
        small = id(parameter) in quantised
        total += parameter.numel() * ((4 + scale_bits) / 8 if small else parameter.element_size())
    return math.ceil(total)


def _activation_bytes(shape: Any, prepared: Prepared) -> int:
    """Bytes kept for the backward of one forward pass: about 8 hidden and 4 intermediate vectors a token and layer."""
    config = prepared.config
    tokens = config.batch_size * (config.max_length if config.packing else prepared.train.longest)
    hidden = int(shape.hidden_size)
    layer = (8 * hidden + 4 * int(getattr(shape, "intermediate_size", None) or 4 * hidden)) * prepared.dtype.itemsize
    layers = int(shape.num_hidden_layers)
    if config.gradient_checkpointing:
        return tokens * (layers * hidden * prepared.dtype.itemsize + layer)
    return tokens * layers * layer
