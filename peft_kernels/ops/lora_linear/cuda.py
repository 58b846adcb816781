"""The CUDA backend of lora_linear: few rows of x on a 4-bit weight, where the bytes of W decide.

With more rows Triton's kernels serve. The struct of the call is the CPU library's; three more fields hold the table of
the codes, on the host, and a workspace for partial sums, which torch allocates here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from ctypes import byref, c_int64
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...checks import moved
from ...cuda_rt import backend, launching
from ...dispatch import INT4
from ...formats import table
from .native import backward_arguments, forward_arguments, pack, refusal

ROWS = 512  # PK_MMA_ROWS of csrc/cuda/lora.cuh
BACKWARD_ROWS = 64  # PK_BACKWARD_ROWS
_OWN = struct.Struct("=3q")  # table, workspace, workspace_bytes of pk_lora_args
_OWN_AT = 34 * 8  # bytes of the fields before them
DTYPES = frozenset({torch.bfloat16, torch.float16})


def refuse_rows(most: int, x: Tensor) -> str | None:
    return f"serves up to {most} rows of x, these are {x.shape[0]}" if x.shape[0] > most else None


def refuse_weight(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, columns: int, a: Tensor | None,
    b: Tensor | None, bias: Tensor | None,
) -> str | None:  # fmt: skip
    if quant_type == 0:
        return "serves 4-bit weights only, this one is dense"
    if quant_type == INT4:
        if nested_code is not None:
            return "serves groups of neighbouring columns only, this weight has an index of groups (act-order)"
        if not (32 <= blocksize <= 4096 and blocksize & (blocksize - 1) == 0) or columns % blocksize:
            return (
                "serves groups of a power of two from 32 to 4096 columns that divide a row, "
                f"these are of {blocksize} in {columns}"
            )
    elif nested_absmax is not None and nested_blocksize & (nested_blocksize - 1):
        return f"serves nested blocksizes that are powers of two, this one is {nested_blocksize}"
    return refusal(weight, quant_type, a, b, bias)


def _when_forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> str | None:  # fmt: skip
    return refuse_rows(ROWS, x) or refuse_weight(weight, absmax, nested_absmax, nested_code, offset, quant_type,
                                                 blocksize, nested_blocksize, x.shape[1], a, b, bias)  # fmt: skip


def _when_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor | None, b: Tensor | None, s: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None,
    need_dx: bool, need_ab: bool,
) -> str | None:  # fmt: skip
    return refuse_rows(BACKWARD_ROWS, dy) or refuse_weight(
        weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, x.shape[1], a, b,
        None,
    )


def with_tail(packed: bytes, quant_type: int, workspace: int = 0, workspace_bytes: int = 0) -> bytes:
    """pk_lora_args from `pack`, with the fields of the GPU: the table of the codes and the workspace."""
    values = 0 if quant_type == INT4 else table(quant_type, "cpu").data_ptr()
    own = _OWN.pack(values, workspace, workspace_bytes)
    return packed[:_OWN_AT] + own + packed[_OWN_AT + _OWN.size :]


def _queue(
    ask: Callable[..., int], launch: Callable[..., int], calls: Sequence[tuple[bytes, int]], like: Tensor
) -> None:
    needed = c_int64(0)
    with launching(like) as (device, stream):
        call = b"".join([with_tail(*one) for one in calls])
        native.check(ask(call, byref(needed)), "cuda")
        if needed.value:
            # freed at the end of this call: torch's allocator hands it on in the order of the stream
            workspace = torch.empty(needed.value, dtype=torch.uint8, device=like.device)
            call = with_tail(*calls[0], workspace.data_ptr(), needed.value) + call[len(calls[0][0]) :]
        native.check(launch(call, device, stream), "cuda")


def queue(
    launch: Callable[..., int], packed: bytes, quant_type: int, backward: bool, like: Tensor, weight: Tensor
) -> None:
    """Queue the call on the stream of `like`, x or dy, with as much workspace as it asks for."""
    native.say_misaligned(**{"dy" if backward else "x": like, "weight": weight})
    ask = native.cuda().pk_cuda_lora_workspace
    _queue(lambda call, needed: ask(call, backward, needed), launch, [(packed, quant_type)], like)


def queue_stack(calls: Sequence[tuple[bytes, int]], x: Tensor, weights: Sequence[Tensor]) -> None:
    """`queue` for the forward of several projections of one x. calls: `pack` and quant_type of each."""
    native.say_misaligned(x=x, **{f"weight of projection {i}": weight for i, weight in enumerate(weights)})
    lib, count = native.cuda(), len(calls)
    _queue(lambda call, needed: lib.pk_cuda_lora_stacked_workspace(call, count, needed),
           lambda call, *where: lib.pk_cuda_lora_linear_stacked(call, count, *where), calls, x)  # fmt: skip


def seed_beside(t: Tensor | None, like: Tensor) -> Tensor | None:
    return None if t is None else moved("dropout", "seed", t, like.device)


def forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(y [M, N], s [M, r]); s is empty without an adapter."""
    x = x.contiguous()
    args = (*args[:-1], seed_beside(args[-1], x))  # the seed is read by the kernel
    own, y, s = forward_arguments(x, *args)
    queue(native.cuda().pk_cuda_lora_linear, pack(0, x, *own, y=y, s=s), own[5], False, x, own[0])
    return y, s


def backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [M, K], da [r, K], db [N, r]); empty where not needed."""
    *args, dropout_p, seed, need_dx, need_ab = args
    own, dy, s, da, db = backward_arguments(dy, *args, dropout_p, seed_beside(seed, dy), need_ab)
    dx = x.new_empty(x.shape if need_dx else (0,))
    x = x.contiguous()
    packed = pack(0, x, *own, s=s, dy=dy, dx=dx if need_dx else None, da=da if need_ab else None,
                  db=db if need_ab else None)  # fmt: skip
    queue(native.cuda().pk_cuda_lora_linear_backward, packed, own[5], True, dy, own[0])
    return dx, da, db


BACKENDS = {
    "lora_linear": backend(forward, dtypes=DTYPES, when=_when_forward),
    "lora_linear_backward": backend(backward, dtypes=DTYPES, when=_when_backward),
}
