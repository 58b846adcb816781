"""GLM-4V, the language part: neighbours are turned."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "Glm4vText", Attention(turn="neighbours"), Mlp(up=("gate_up_proj",), act="activation_fn", halves=True), None,
    Glm4vRMSNorm=Norm(),
)  # fmt: skip
