"""Settings of a run that fit into a given memory, changed in the order in which they cost least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from typing import Any

import torch

from ... import checkpoint_layers
from ..training import gguf_base
from ..training.config import TrainConfig
from ..training.errors import UserError
from .parts import estimate

_SHORTEST, _LARGEST_BATCH = 128, 64
_KEEPS = signature(checkpoint_layers).parameters["keeps"].default
_PREFIXES = frozenset({"prefix_tuning", "cartridge"})  # keys and values in a cache, which checkpoints have not


def fitting(
    config: TrainConfig, base: Any, dtype: torch.dtype, process: int, room: int, on_gpu: bool = False
) -> tuple[TrainConfig, dict[str, Any], dict[str, Any]]:
    """Settings whose peak is at most `room` bytes: (the run's, what to set for them, their estimate).

    In this order, until they fit: gradient checkpointing of some layers, then of all, 4 bits, the embedding and the
    head in 8, fewer rows (more passes a step make up for them), activations on disk, a lower rank, shorter rows. Where
    the given settings fit, as many more rows as do. Raises UserError where nothing fits.
    """

    def at_peak(tried: TrainConfig) -> dict[str, Any]:
        return estimate(tried, base, dtype, process, both=False, on_gpu=on_gpu)

    least, tables = None, True
    for changes in _attempts(config):
        if not tables:
            changes = {key: value for key, value in changes.items() if key != "quantize_embeddings"}
        tried = replace(config, **changes)
        try:
            found = at_peak(tried)
        except (UserError, ValueError, TypeError):
            if changes.get("checkpointing_keeps"):
                continue  # its layers checkpoint together or not at all
            if not tried.quantize_embeddings or config.quantize_embeddings:
                raise
            tables = False  # its tables, or the adapters on them, have no such form
            continue
        least = found["peak_bytes"] if least is None else min(least, found["peak_bytes"])
        if found["peak_bytes"] <= room:
            tried, found = _more_rows(config, tried, found, at_peak, room)
            return tried, _told(config, tried), estimate(tried, base, dtype, process, on_gpu=on_gpu)
    needed = (least or 0) / 1e9
    raise UserError(f"no settings of this model fit {room / 1e9:.2f} GB: the least found takes {needed:.2f} GB",
                    "choose a smaller model or a larger machine")  # fmt: skip


def _attempts(config: TrainConfig) -> Iterator[dict[str, Any]]:
    changes: dict[str, Any] = {}
    yield changes
    checkpoints = _PREFIXES.isdisjoint(one.method.lower() for one in config.each().values())
    if checkpoints and not config.gradient_checkpointing:
        yield {**changes, "gradient_checkpointing": True, "checkpointing_keeps": _KEEPS}
    if checkpoints and (not config.gradient_checkpointing or config.checkpointing_keeps):
        changes = {**changes, "gradient_checkpointing": True, "checkpointing_keeps": 0.0}
        yield changes
    if config.quantize == "none":
        changes = {**changes, "quantize": "nf4"}
        yield changes
    if not config.quantize_embeddings and config.quantize != gguf_base.STORAGE:
        changes = {**changes, "quantize_embeddings": True}
        yield changes
    rows = config.batch_size
    while rows > 1:
        rows = rows // 2
        passes = config.gradient_accumulation * -(-config.batch_size // rows)
        changes = {**changes, "batch_size": rows, "gradient_accumulation": passes}
        yield changes
    if checkpoints and config.offload_activations == "none":
        changes = {**changes, "offload_activations": "disk"}
        yield changes
    rank = config.lora.get("r") if config.method.lower() in ("lora", "dora") else None
    if isinstance(rank, int) and rank > 8:
        changes = {**changes, "lora": {**config.lora, "r": 8, "lora_alpha": 16}}
        yield changes
    length = config.max_length
    while length > _SHORTEST:
        length = max(_SHORTEST, length // 2)
        changes = {**changes, "max_length": length}
        yield changes


def _more_rows(
    config: TrainConfig, fits: TrainConfig, found: dict[str, Any], at_peak: Callable[[TrainConfig], dict[str, Any]],
    room: int,
) -> tuple[TrainConfig, dict[str, Any]]:  # fmt: skip
    """Twice the rows as long as they fit, where none were taken away."""
    while fits.batch_size >= config.batch_size and fits.batch_size < _LARGEST_BATCH:
        more = replace(fits, batch_size=2 * fits.batch_size)
        tried = at_peak(more)
        if tried["peak_bytes"] > room:
            break
        fits, found = more, tried
    return fits, found


def _told(config: TrainConfig, fits: TrainConfig) -> dict[str, Any]:
    """Settings that the command has to have: what differs from the defaults, as ``key`` or ``lora.key``."""
    plain = TrainConfig(model=config.model, data="-")
    told: dict[str, Any] = {}
    for key, value in fits.to_dict().items():
        if key in ("model", "data", "output") or value == getattr(plain, key):
            continue
        if key in ("lora", "adapter"):
            known = getattr(plain, key)
            told |= {f"{key}.{name}": one for name, one in value.items() if known.get(name) != one}
        else:
            told[key] = value
    return told
