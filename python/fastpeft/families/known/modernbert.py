"""ModernBERT: one projection makes q, k and v, two thirds of the layers see a window on both sides."""

from ..description import Attention, Mlp, family

PARTS = family(
    "ModernBert", Attention(qkv=("Wqkv",), out="Wo", scale="", after="out_drop"),
    Mlp(up=("Wi",), down="Wo", act="act", halves=True, between="drop"), None,
)  # fmt: skip
