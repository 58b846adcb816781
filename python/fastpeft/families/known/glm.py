"""GLM-4 as first published: neighbours in a half of each head are turned."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "Glm", Attention(turn="neighbours", angles="halves"),
    Mlp(up=("gate_up_proj",), act="activation_fn", halves=True), Norm(),
)  # fmt: skip
