"""Many small matrices transposed in one call: a stack of adapters holds lora_B transposed, and so are its gradients.

Nothing is computed: the bits are those of `Tensor.copy_`, which is a call for each matrix and reads across the grain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .native import transpose


def copy_transposed(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """`to.copy_(source.t())` for each (to, source), without gradients. A source must not overlap any `to`.

    Two dimensions, any dtypes, devices and strides; dense CPU tensors of one dtype of 2 or 4 bytes are one call of the
    native library, where that is built. Raises RuntimeError where shapes do not fit, as `copy_` does.
    """
    if pairs and not transpose(pairs):
        with torch.no_grad():
            torch._foreach_copy_([to for to, _ in pairs], [source.t() for _, source in pairs])
