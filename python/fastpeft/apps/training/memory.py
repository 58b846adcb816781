"""Memory of a training process."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ... import offload_activations
from .config import TrainConfig
from .errors import UserError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more
_LARGE = 1 << 20


def keep_freed_memory(but_large: bool = False) -> bool:
    """Have the C library keep what is freed, for the rest of the process; whether it can (glibc).

    By default it gives large pieces back to the system, which fills every page with zeros when it is asked for them
    again. Gradients are freed after each step and wanted in the next: with four adapters on SmolLM2 that is 15,000
    page faults a step. The process then holds its peak until it ends.
    but_large: pieces of 1 MiB and more go back at once, for runs that trade time for memory: the inputs of layers that
    a checkpoint keeps lie between pieces that were freed, into which larger ones do not fit.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return bool(
        mallopt is not None
        and mallopt(_MMAP_THRESHOLD, _LARGE if but_large else _LARGEST_MMAP_THRESHOLD)
        and mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    )


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
