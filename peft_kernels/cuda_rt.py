"""What the cuda.py backends share: whether the CUDA library can run here, and the stream that a launch goes to."""

from __future__ import annotations

from ctypes import byref, c_int64
from functools import lru_cache

import torch
from torch import Tensor

from . import native


@lru_cache(maxsize=1)
def ready() -> str | None:
    """Why the CUDA library cannot launch anything here; None where it can. Asked once: drivers do not come and go."""
    why = native.available("cuda")
    if why is not None:
        return why
    lib, count = native.cuda(), c_int64(0)
    if lib.pk_cuda_device_count(byref(count)):
        return f"the CUDA library finds no usable GPU: {lib.pk_last_error().decode(errors='replace')}"
    return None if count.value else "the CUDA library finds no GPU"


def device_index(t: Tensor) -> int:
    """The index of the GPU that holds `t`."""
    return t.get_device()


def stream(device: int) -> int:
    """torch's current stream on GPU `device`, as the launchers take it."""
    return int(torch.cuda.current_stream(device).cuda_stream)
