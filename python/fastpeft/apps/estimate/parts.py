"""The estimate of a run: memory by part, its peaks, and the work of a step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..training.config import TrainConfig
from ..training.errors import UserError
from ..training.forward import CompletionLoss
from ..training.packing import Batch
from . import shapes, trace

HEAP = 1.2  # bytes that the C library's heap holds for one of activations that are kept: pieces lie between others
_SMALL = 4096  # elements: bitsandbytes keeps the states of smaller tensors in float32
_STATES = {"adamw": 2, "adam": 2, "sgd": 1, "rmsprop": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1}


def estimate(
    config: TrainConfig, base: Any, dtype: torch.dtype, process: int, both: bool = True, on_gpu: bool = False,
    rows: tuple[int, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Bytes and FLOPs of a run with full rows (batch_size x max_length tokens in a forward pass), every token learned.

    base: transformers' configuration. process: bytes of the process beside its model; on a GPU what CUDA takes there.
    rows: how many there are in a forward pass, and tokens of each, where the settings do not say it.
    ``memory_bytes`` sums up to ``step_peak_bytes``; ``activations`` are what lives at the step's highest point beside
    the model, its adapters, gradients and states; ``heap`` what the C library holds between them. ``kept_bytes`` is
    what waits for the backward pass, with gradient checkpointing and without (both), where the method has both.
    """
    started = time.monotonic()
    each = config.each().values()
    rows = rows or (sum(one.batch_size for one in each), max(one.max_length for one in each))
    shape, found = _traced(config, base, dtype, rows)
    kept = {config.gradient_checkpointing: found.kept}
    if both:
        other = replace(config, gradient_checkpointing=not config.gradient_checkpointing, checkpointing_keeps=0.0,
                        offload_activations="none")  # fmt: skip
        with contextlib.suppress(ValueError):  # a prefix is refused with checkpoints
            kept[other.gradient_checkpointing] = _traced(other, base, dtype, rows)[1].kept
    trained = [p for p in shape.model.parameters() if p.requires_grad]
    adapters = shapes.bytes_of(shape.model) - shape.base_bytes
    gradients = sum(p.nbytes for p in trained)
    memory = {
        **({"process": process} if process else {}),
        "base": shape.base_bytes,
        "adapter": adapters,
        "gradients": gradients,
        "optimizer": _states_of_all(config, shape.model),
        "activations": max(0, found.peak - gradients),
    }
    if process and not on_gpu and not config.gradient_checkpointing:
        memory["heap"] = round((HEAP - 1) * memory["activations"])
    step = sum(memory.values())
    # a tensor that is quantised is there beside what becomes of it; others are mapped, and read when they are needed
    loading = process + shape.base_bytes + adapters + shape.beside
    return {
        "parameters": shape.parameters,
        "trainable_parameters": sum(p.numel() for p in trained),
        "dtype": str(dtype).removeprefix("torch."),
        "memory_bytes": memory,
        "kept_bytes": {"with checkpointing" if one else "without": count for one, count in kept.items()},
        "step_peak_bytes": step,
        "loading_peak_bytes": loading,
        "peak_bytes": max(step, loading),
        "step_flops": found.flops * config.gradient_accumulation,
        "tokens_per_step": rows[0] * rows[1] * config.gradient_accumulation,
        "seconds_to_estimate": time.monotonic() - started,
    }


def _states_of_all(config: TrainConfig, model: Any) -> int:
    """Bytes of the optimizers' states: each adapter has its own."""
    each, trained = config.each(), [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if len(each) == 1:
        return sum(states(config.optimizer, p) for _, p in trained)
    return sum(states(one.optimizer, p) for own, one in each.items() for name, p in trained if f".{own}." in f"{name}.")


def states(optimizer: str, parameter: Tensor) -> int:
    """Bytes of an optimizer's states for a parameter."""
    if optimizer == "adafactor":  # a row's and a column's
        rows = parameter.shape[0] if parameter.dim() > 1 else 0
        return 4 * (rows + parameter.numel() // max(1, rows))
    count = _STATES[optimizer]
    if "8bit" in optimizer and parameter.numel() >= _SMALL:
        return count * (parameter.numel() + 4 * math.ceil(parameter.numel() / 256))
    return count * (4 * parameter.numel() if "8bit" in optimizer else parameter.nbytes)


def _traced(
    config: TrainConfig, base: Any, dtype: torch.dtype, size: tuple[int, int]
) -> tuple[shapes.Shape, trace.Trace]:  # fmt: skip
    """The run's model, and a forward and a backward pass of it. size: rows, and tokens of each."""
    rows, length = size
    with _values_wanted(), _unchecked():
        shape = shapes.run_shape(config, base, dtype)
        model = shape.model
        square = length if config.fast_layers else 0
        with shape.mode:
            ids = torch.zeros(rows, length, dtype=torch.long)
            positions = torch.arange(length).expand(rows, -1)
            where = torch.arange(rows * (length - 1))
            batch = Batch(ids, positions, where, where.clone(), rows * length)
            loss = CompletionLoss(model, config.loss_chunk_vocab, config.loss_chunk_tokens)
            found = trace.step(model, lambda: loss(batch), square, config.offload_activations != "none")
    return shape, found


@contextlib.contextmanager
def _values_wanted() -> Iterator[None]:
    """Inside, what needs the values of weights is a UserError: AdaMSS, FRoD and SHiRA, whose shapes come from them."""
    errors = torch._subclasses.fake_tensor
    try:
        yield
    except (
        errors.DynamicOutputShapeException, errors.DataDependentOutputException, errors.UnsupportedFakeTensorException,
        NotImplementedError, ValueError,
    ) as error:  # fmt: skip
        if isinstance(error, ValueError) and "meta device" not in str(error):
            raise
        raise UserError("this run's tensors depend on the values of the model's weights, which are not read",
                        "use fastpeft train --plan, which takes three steps") from error  # fmt: skip


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Inside, torch's distributions do not look at the values of their parameters: there are none."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)
