"""`peft.utils.integrations`."""

from __future__ import annotations

from torch import Tensor, nn

from ..layer import AdapterLayer
from ..weights.base import weight_of


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The dense weight of a layer as its module holds it, dequantised if need be; of an adapter layer the base's.

    Raises TypeError for a module that is no such layer.
    """
    base = module.base_layer if isinstance(module, AdapterLayer) else module
    kind = weight_of(base)
    if kind is None:
        raise TypeError(f"{type(base).__name__} has no weight of a layer that adapters act on")
    w = kind.read(base)[0]
    return w.T if kind.fan_in_fan_out else w
