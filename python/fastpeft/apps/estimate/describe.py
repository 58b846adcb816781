"""A run worked out without training: its parameters, memory, steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ..training import gguf_base, models
from ..training.config import TrainConfig
from ..training.errors import UserError
from ..training.measure import memory_now
from ..training.run import Prepared, adapter_config
from .machines import CUDA_BYTES
from .parts import estimate
from .shapes import configuration


def describe(config: TrainConfig, prepared: Sequence[Prepared]) -> dict[str, Any]:
    """The plan of a run. Builds the model without weights; a run of several adapters has ``adapters`` by name.

    Memory is that of `estimate`, for rows as the data fills them; of a run that cannot be estimated ``memory_bytes`` is
    empty, and ``memory_unknown`` says why.
    """
    started = time.monotonic()
    first = prepared[0]
    total, counts = _counted(prepared)
    adapters = {p.name: _adapter(p, counts[p.name]) for p in prepared}
    trainable = sum(counts.values())
    return {
        "model": first.source.note,
        "device": str(first.device),
        "dtype": str(first.dtype).removeprefix("torch."),
        "quantize": config.quantize,
        "parameters": total,
        **({"trainable_parameters": trainable, "adapters": adapters} if config.adapters else adapters[first.name]),
        **_memory(config, prepared),
        "seconds_to_plan": time.monotonic() - started,
        "config": config.to_dict(),
    }


def _counted(prepared: Sequence[Prepared]) -> tuple[int, dict[str, int]]:
    """The parameters of the base, and the trained ones of each adapter."""
    from ... import get_peft_model

    first = prepared[0]
    model = models.empty_model(first.source, first.dtype)
    total = gguf_base.elements(model)
    counts: dict[str, int] = {}
    for p in prepared:
        if p is first:
            model = get_peft_model(model, adapter_config(p.config), p.name)
        else:
            model.add_adapter(p.name, adapter_config(p.config))
            model.set_adapter(p.name)
        counts[p.name] = sum(t.numel() for t in model.parameters() if t.requires_grad)
    return total, counts


def _memory(config: TrainConfig, prepared: Sequence[Prepared]) -> dict[str, Any]:
    """Bytes by part, their sum at the highest point of a step, and the peak with loading."""
    first = prepared[0]
    on_gpu = first.device.type == "cuda"
    # this process has imported what a run does, and holds its data
    process = CUDA_BYTES if on_gpu else memory_now(first.device)
    lengths = (p.config.max_length if p.config.packing else p.train.longest for p in prepared)
    # of a preference both answers are rows
    rows = sum(p.config.batch_size * (2 if p.config.objective == "dpo" else 1) for p in prepared)
    try:
        found = estimate(
            config, configuration(config.model), first.dtype, process, both=False, on_gpu=on_gpu,
            rows=(rows, max(lengths)),
        )  # fmt: skip
    except UserError as error:
        return {"memory_bytes": {}, "memory_total_bytes": None, "memory_unknown": error.problem}
    return {
        "memory_bytes": found["memory_bytes"],
        "memory_total_bytes": found["step_peak_bytes"],
        "loading_peak_bytes": found["loading_peak_bytes"],
    }


def _adapter(prepared: Prepared, trainable: int) -> dict[str, Any]:
    from ..training.optim import warmup_steps
    from ..training.track import make_plan

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
