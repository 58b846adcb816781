"""StarCoder2: projections have biases, the MLP has no gate."""

from ..description import Attention, Mlp, family

PARTS = family(
    "Starcoder2", Attention(after="residual_dropout"),
    Mlp(up=("c_fc",), down="c_proj", act="act", after="residual_dropout"), None,
)  # fmt: skip
