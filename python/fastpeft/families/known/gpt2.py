"""GPT-2: positions are added to the input, weights stand transposed."""

from ..description import Attention, Mlp, family

PARTS = family(
    "GPT2",
    Attention(
        qkv=("c_attn",), out="c_proj", turn=None, dropout="attn_dropout", after="resid_dropout",
        served=lambda module: not module.is_cross_attention and not module.reorder_and_upcast_attn,
    ),
    Mlp(up=("c_fc",), down="c_proj", act="act", after="dropout"), None,
)  # fmt: skip
