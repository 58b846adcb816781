"""Memory of a training process."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ... import checkpoint_layers, offload_activations
from .config import TrainConfig
from .errors import UserError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more
_LARGE = 1 << 20


def keep_freed_memory(but_large: bool = False) -> bool:
    """Have the C library keep what is freed, for the rest of the process; whether it can (glibc).

    By default it gives large pieces back to the system, which fills every page with zeros when it is asked for them
    again. Gradients are freed after each step and wanted in the next: with four adapters on SmolLM2 that is 15,000
    page faults a step. The process then holds its peak until it ends. What loading left free goes back first: experts
    that a folder has one by one were put together, in twice their memory.
    but_large: pieces of 1 MiB and more go back at once, for runs that trade time for memory: the inputs of layers that
    a checkpoint keeps lie between pieces that were freed, into which larger ones do not fit.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    mallopt, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
    return bool(
        mallopt is not None
        and mallopt(_MMAP_THRESHOLD, _LARGE if but_large else _LARGEST_MMAP_THRESHOLD)
        and mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    )


def enable_checkpoints(config: TrainConfig, base: Any) -> None:
    """Let the layers of a model of transformers be computed again in the backward, as ``gradient_checkpointing`` and
    ``checkpointing_keeps`` say. Raises UserError for a share of layers of a model that checkpoints none by themselves.
    """
    if not config.gradient_checkpointing:
        return
    if config.checkpointing_keeps:
        try:
            checkpoint_layers(base, config.checkpointing_keeps)
        except ValueError as error:
            raise UserError(f"checkpointing_keeps: {error}", "leave checkpointing_keeps out") from error
        return
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers lets the embeddings' output require gradients, for reentrant checkpoints; here it only costs
    base.disable_input_require_grads()


def offloading(config: TrainConfig, model: Any) -> AbstractContextManager[Any]:
    """The context of a forward pass by ``offload_activations``. Raises UserError where there is no such place."""
    if config.offload_activations == "none":
        return nullcontext()
    try:
        made: AbstractContextManager[Any] = offload_activations(
            model, config.offload_activations, config.offload_folder
        )
        return made
    except (ValueError, OSError) as error:
        raise UserError(str(error), "choose another offload_activations or offload_folder") from error
