"""Training with LoRA adapters by row: layers that read one input are one node (`peft_kernels.lora_linear_by_row`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peft_kernels import RowProjection

from .call import unnoted
from .names import RowHost


def linears(x: Tensor, layers: Sequence[RowHost]) -> list[Tensor] | None:
    """``layer(x)`` of layers whose rows were assigned, x [rows, ..., K]; None where it takes the ordinary way.

    It does with methods other than LoRA, adapters of several dropouts in a layer, and where the kernel does not serve.
    """
    projections = []
    for layer in layers:
        found = _projection(layer, x)
        if found is None:
            return None
        projections.append(found)
    ys: list[Tensor] | None = unnoted(layers[0].rows.together, x, *projections)
    return ys


def _projection(layer: RowHost, x: Tensor) -> RowProjection | None:
    routed = layer.rows.by_name()
    if routed is None or len(x) != len(routed.rows) or layer.merged_adapters or layer.base.transient:
        return None
    first = routed.first
    if first is None or len(routed.low) != len(routed.methods) or first.compute not in (None, x.dtype):
        return None
    weight, every = first.weight(), [each.adapter() for each in routed.low.values()]
    found = [each for each in every if each is not None]
    if weight is None or len(found) < len(every) or any(each.dropout_p != found[0].dropout_p for each in found):
        return None
    a, b, scaling, chances = zip(*found, strict=True)
    return RowProjection(weight, a, b, scaling, routed.row_plan, first.parameters.get("bias"), chances[0])
