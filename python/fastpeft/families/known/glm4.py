"""GLM-4 of 2025: GLM with norms before and after each block."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "Glm4", Attention(turn="neighbours", angles="halves"),
    Mlp(up=("gate_up_proj",), act="activation_fn", halves=True), Norm(),
)  # fmt: skip
