"""GLM-4V, the language part."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "Glm4vText", Attention(), Mlp(up=("gate_up_proj",), act="activation_fn", halves=True), None, Glm4vRMSNorm=Norm()
)
