"""One call of a kernel between the profiler's marks: `python -m bench.gpu.profiled NAME`, as ncu runs it.

Everything before the marks (weights, compilation) is not profiled; between them every launch of the call is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .device import Device, find

# name -> (what, backend, rows of x): over a weight [14336, 4096]
CASES = {
    "gemv": ("forward", "cuda", 1), "Tile16": ("forward", "cuda", 16), "Tile128": ("forward", "cuda", 128),
    "input": ("backward", "cuda", 64), "decode": ("decode", "cuda", 0), "Tile128 at 512": ("forward", "cuda", 512),
    "Triton at 1": ("forward", "triton", 1), "Triton at 128": ("forward", "triton", 128),
    "Triton at 1024": ("forward", "triton", 1024), "Triton backward at 512": ("backward", "triton", 512),
}  # fmt: skip


def call_of(name: str, device: Device) -> Callable[[], Any]:
    """The call of a case, on the device, with its backend forced."""
    from functools import partial

    import torch

    from peft_kernels import dequantize_4bit, tuning, use_backend
    from peft_kernels.ops.lora_linear import backward_op, forward_op

    from .operands import layer
    from .rows import PANELS, SCALING, normal

    what, backend, m = CASES[name]
    of = layer(device, *((128, 64) if device.small else (14336, 4096)))
    a, b = of.adapter
    if what == "decode":
        run: Callable[[], Any] = partial(dequantize_4bit, of.quants[0], torch.bfloat16)
    else:
        x, dy = normal(device, m, of.k), normal(device, m, of.n, seed=4)
        flat = of.quants[0].flatten()
        run = partial(forward_op, x, *flat, of.n, a, b, SCALING, None, 0.0, None)
        if what == "backward":
            run = partial(backward_op, dy, x, *flat, a, b, x.float() @ a.t(), SCALING, 0.0, None, True, True)

    def forced() -> Any:
        chosen = device.backends[0] if device.fake else backend
        with use_backend(chosen), tuning.override("panels", **PANELS["fused"]):
            return run()

    return forced


def main(name: str) -> None:
    import torch

    call = call_of(name, find(Path(".")))
    call()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(sys.argv[1])
