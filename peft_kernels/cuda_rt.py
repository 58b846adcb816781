"""Shared parts of the cuda.py backends: whether the CUDA library can run here, and the device and stream of a launch.

On CPU tensors the same backends run a host build of the CUDA sources (csrc/simt): when forced, and when a test
has loaded one (`native.use_simt`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native
from .dispatch import FLOATS, FOUR_BIT, INT4, Backend

READS = FOUR_BIT | {INT4}  # numbers of formats of weights; dense ones are refused where they come
_BLOCKS = 264  # a launch should have: two on each multiprocessor of a large GPU, and the same number on every GPU


def ready(gpu: int = 0) -> str | None:
    """Why the CUDA library cannot launch anything on a GPU, by its index; None where it can."""
    if native.simt():
        return "a host build of the CUDA sources stands in for the CUDA library, on CPU tensors alone"
    return native.gpu_refusal(gpu)


def backend(
    fn: Callable[..., Any],
    *,
    dtypes: frozenset[torch.dtype] = FLOATS,
    when: Callable[..., str | None] | None = None,
) -> Backend:
    """The `Backend` of a function of the CUDA library: GPUs from sm_80, and CPU tensors as the top of this file says.

    dtypes and when as in `Backend`.
    """

    def refuse(*args: Any) -> str | None:
        if args[0].device.type == "cuda":
            why = ready(args[0].get_device())
        elif native.simt():
            why = None
        else:
            why = "serves CPU tensors by a host build of the CUDA sources alone (native.use_simt), and none is loaded"
        return why if why is not None or when is None else when(*args)

    return Backend(
        "cuda",
        fn,
        devices=frozenset({"cuda"}),
        dtypes=dtypes,
        forced_devices=frozenset({"cpu"}),
        min_capability=(8, 0),
        when=refuse,
        formats=READS,
    )


class launching:
    """`with launching(t) as (device, stream)`: what the launchers take, with the GPU of `t` as torch's current one.

    stream is torch's current stream there; device 0 and no stream on CPU tensors, for a host build.
    """

    def __init__(self, t: Tensor) -> None:
        self._guard = torch.cuda.device(t.get_device()) if t.is_cuda else None

    def __enter__(self) -> tuple[int, int | None]:
        if self._guard is None:
            if not native.simt():
                raise native.NativeError("the CUDA library takes tensors on a GPU, got one on the CPU")
            return 0, None
        self._guard.__enter__()
        device = torch.cuda.current_device()
        return device, int(torch.cuda.current_stream(device).cuda_stream)

    def __exit__(self, *error: Any) -> None:
        if self._guard is not None:
            self._guard.__exit__(*error)


def queue(function: str, like: Tensor, *args: Any) -> None:
    """`function` of the CUDA library with `args`, on the device and the stream of `like`."""
    with launching(like) as (device, stream):
        native.check(getattr(native.cuda(), function)(*args, device, stream), "cuda")


def parts(work: int, across: int) -> int:
    """How many parts a sum over `work` pieces is cut into where `across` blocks stand side by side: at least one."""
    return max(1, min(work, _BLOCKS // max(1, across)))
