"""`peft.utils.integrations`."""

from __future__ import annotations

from torch import Tensor, nn

from ..layer import AdapterLayer
from ..weights.find import weight_of


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The dense weight of a layer as its module holds it, dequantised if need be; of an adapter layer the base's.

    Raises TypeError for a module that is no such layer.
    """
    base = module.base if isinstance(module, AdapterLayer) else weight_of(module)
    if base is None:
        raise TypeError(f"{type(module).__name__} has no weight of a layer that adapters act on")
    w = base.read()[0]
    return w.T if base.fan_in_fan_out else w
