"""Triton backend of dora_norm and squared_row_norms: the host side of `triton_kernels.py`.

One pass over W; the parts of the sums, float64 [parts, N], are added in their order. `base_sq` is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import formats, tuning
from ...dispatch import FLOATS
from ...triton_lib import host
from ..lora_linear.triton import _cdiv, _options, _rank_tile, _split, _Weight


def _sums(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, a: Tensor | None, b: Tensor | None,
    scaling: float, n: int, k: int,
) -> Tensor:  # fmt: skip
    """|W + scaling b a|^2 of each row, float64 [N]; without a and b |W|^2."""
    from .triton_kernels import norm_kernel

    r = 0 if a is None else a.shape[0]
    if n == 0 or k == 0:
        return torch.zeros((n,), dtype=torch.float64, device=weight.device)
    w = _Weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, n, k,
                torch.float32)  # fmt: skip
    halves = quant_type in formats.QUANT_NAMES and k % blocksize == 0
    arch = tuning.arch_of(weight.device)
    c = tuning.choose("dora_norm", arch, tuning.Shape(n, n, k, r, 32, halves, w.blocksize))
    br = _rank_tile(r, c.BR)
    parts, steps = _split(k, c.BK, _cdiv(n, c.BN), c.programs, 4)
    out = torch.empty((parts, n), dtype=torch.float64, device=weight.device)
    host.launch(
        norm_kernel, (_cdiv(n, c.BN), parts), *w.pointers,
        weight if a is None else a.contiguous(), weight if b is None else b.contiguous(), out, n, k, r,
        *w.strides, steps, scaling, ADAPTER=r > 0, HALVES=halves, **w.constants, BN=c.BN, BK=c.BK, BR=br, **_options(c),
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def squared_row_norms(weight: Tensor, *rest: Any) -> Tensor:
    """|W|^2 of each row, float64 [N]."""
    *flat, n, k = rest
    return _sums(weight, *flat, None, None, 1.0, n, k)


def dora_norm(weight: Tensor, *rest: Any) -> Tensor:
    """|W + scaling b a| of each row, float32 [N]."""
    *flat, a, b, scaling, _ = rest
    return _sums(weight, *flat, a, b, scaling, b.shape[0], a.shape[1]).sqrt().float()


def _when(weight: Tensor, *rest: Any) -> str | None:
    for name, t in zip(("a", "b"), rest[7:9], strict=False):
        if isinstance(t, Tensor) and t.dtype not in FLOATS:
            return f"does not serve {name} in {t.dtype}"
    return host.wrong_mode(weight)


BACKENDS = host.backends(
    {"squared_row_norms": squared_row_norms, "dora_norm": dora_norm}, _when, dtypes=FLOATS | {torch.uint8}
)
