"""Launching Triton kernels, and compiling them for an architecture that is not here.

Imports Triton inside the functions only. Kernels are compiled without fused multiply-add outside of products (the
default of `enable_fp_fusion` differs between Triton's versions, and a fused nested absmax would round differently).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import tuning
from ..dispatch import FLOATS, FOUR_BIT, Backend

READS = FOUR_BIT | frozenset(range(3, 16))  # numbers of formats that `load_weight` of device.py decodes
MOST_BLOCKS = 65535  # of a grid along y, and along z; along x there can be 2^31 - 1


@dataclass
class Compiled:
    """A kernel compiled by `compile_only`, with the launch that asked for it."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)  # by the kernel's own names, tensors included


_recording: list[Compiled] | None = None
_wanted: Callable[[str, dict[str, Any]], bool] | None = None


def interpreting() -> bool:
    """True where Triton runs its kernels in Python on CPU tensors; settled when Triton is first imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def missing() -> str | None:
    """`Backend.available` of every Triton backend."""
    return None if torch.version.hip is None else "has not been tried on ROCm"


def wrong_mode(x: Tensor, *_: Any) -> str | None:
    """`Backend.when` of every Triton backend: why this process cannot run kernels where `x` is."""
    if x.device.type == "cpu" and not interpreting():
        return "CPU tensors need Triton's interpreter: start the process with TRITON_INTERPRET=1"
    if x.device.type == "cuda" and interpreting():
        return "Triton runs in its interpreter in this process (TRITON_INTERPRET=1)"
    return None


def backends(
    functions: dict[str, Callable[..., Any]],
    when: Callable[..., str | None] = wrong_mode,
    dtypes: frozenset[torch.dtype] = FLOATS,
) -> dict[str, Backend]:
    """`BACKENDS` of a Triton module: an operator's function by its name. when: calls `wrong_mode` last."""
    return {
        name: Backend(
            "triton", function, devices=frozenset({"cuda"}), dtypes=dtypes, forced_devices=frozenset({"cpu"}),
            min_capability=(8, 0), package="triton", available=missing, when=when, formats=READS,
        )
        for name, function in functions.items()
    }  # fmt: skip


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **constexprs: Any) -> None:
    """Run `kernel` on the device of its first tensor; nothing to do where the grid is empty."""
    if 0 in grid:
        return
    if max(grid[1:], default=0) > MOST_BLOCKS:
        raise ValueError(f"{kernel.__name__}: the grid must have up to {MOST_BLOCKS} blocks along y and z, got {grid}")
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    if _recording is not None:
        name = kernel.__name__
        if _wanted is None or _wanted(name, constexprs):
            compiled = kernel.warmup(*args, grid=grid, **options, **constexprs)
            arguments = dict(zip(kernel.arg_names, args, strict=False))  # constexprs come by keyword
            _recording.append(Compiled(name, compiled, grid, {**options, **constexprs}, arguments))
        return
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **options, **constexprs)


class _NoDevice:
    """The driver that Triton's `JITFunction` asks for in order to compile: a target, and no device."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # a key of Triton's cache of binders, which must not be shared between architectures
        return -self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(
    capability: int, wanted: Callable[[str, dict[str, Any]], bool] | None = None
) -> Iterator[list[Compiled]]:
    """Within, `launch` compiles for sm_<capability> and runs nothing; yields the list of what was compiled.

    wanted: whether to compile a kernel, by its name and constants; others are passed over. None: all. Needs no GPU.
    The specialisation is Triton's own: what is compiled is what a launch with these arguments would run.
    """
    global _recording, _wanted
    from triton.runtime import driver

    assert not interpreting(), "Triton was imported with TRITON_INTERPRET set: it cannot compile in this process"
    before, kept = driver._active, (_recording, _wanted)
    _recording, _wanted = [], wanted
    driver.set_active(_NoDevice(capability))
    try:
        with tuning.assuming(capability):
            yield _recording
    finally:
        _recording, _wanted = kept
        driver._active = before
