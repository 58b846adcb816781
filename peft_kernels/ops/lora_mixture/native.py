"""The native CPU backend of lora_mixture: lora_linear's kernels of one adapter of all ranks, and the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...native import pointer
from ..lora_linear.native import backend, backward_arguments, forward_arguments, pack, put, refusal


def _one(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a [n, r, K] and b [N, n, r] as one adapter's."""
    r = a.shape[0] * a.shape[1]
    return a.contiguous().view(r, a.shape[2]), b.contiguous().view(b.shape[0], r)


def forward(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor, b: Tensor, mix: Tensor, masked: bool, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [M, N], s [M, n, r])."""
    x, mix = x.contiguous(), mix.contiguous()
    own, y, s = forward_arguments(x, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                                  nested_blocksize, out_features, *_one(a, b), 1.0, bias, dropout_p, seed)  # fmt: skip
    packed = pack(torch.get_num_threads(), x, *own, y=y, s=s)
    code = native.cpu().pk_cpu_lora_mixture(packed, mix.data_ptr(), mix.shape[1], int(masked))
    if code:
        native.check(code)
    return y, s.view(x.shape[0], *a.shape[:2])


def step(packed: tuple[bytes, ...], x: Tensor, n: int, sizes: tuple[int, int], mix: Tensor) -> Tensor:
    """y [M, N] of a prepared call without gradients. x [M, K], mix [M, adapters]: contiguous; sizes: adapters, ranks;
    packed: `lora_linear.native.fields`."""
    m, (count, r) = x.shape[0], sizes
    y, s = x.new_empty((m, n)), x.new_empty((m, count * r), dtype=torch.float32)
    own = put(packed, x, None, m, y.data_ptr(), s.data_ptr())
    code = native.cpu().pk_cpu_lora_mixture(own, mix.data_ptr(), count, 1)
    if code:
        native.check(code)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, s: Tensor, mix: Tensor, masked: bool, dropout_p: float, seed: Tensor | None, need_dx: bool,
    need_ab: bool, need_mix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx [M, K], da [n, r, K], db [N, n, r], dmix [M, n]); empty where not needed."""
    x, mix = x.contiguous(), mix.contiguous()
    own, dy, s, *_ = backward_arguments(dy, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                                        nested_blocksize, *_one(a, b), s, 1.0, dropout_p, seed, False)  # fmt: skip
    dx = x.new_empty(x.shape if need_dx else (0,))
    da, db = (t.new_empty(t.shape if need_ab else (0,)) for t in (a, b))
    dmix = mix.new_empty(mix.shape if need_mix else (0,))
    packed = pack(torch.get_num_threads(), x, *own, s=s, dy=dy, dx=dx if need_dx else None,
                  da=da if need_ab else None, db=db if need_ab else None)  # fmt: skip
    code = native.cpu().pk_cpu_lora_mixture_backward(
        packed, mix.data_ptr(), mix.shape[1], int(masked), pointer(dmix if need_mix else None)
    )
    if code:
        native.check(code)
    return dx, da, db, dmix


def _when_forward(x: Tensor, *args: Any) -> str | None:
    return refusal(args[0], args[5], args[9], args[10], args[13])


def _when_backward(dy: Tensor, x: Tensor, *args: Any) -> str | None:
    return refusal(args[0], args[5], args[8], args[9], None)


BACKENDS = {
    "lora_mixture": backend(forward, _when_forward),
    "lora_mixture_backward": backend(backward, _when_backward),
}
