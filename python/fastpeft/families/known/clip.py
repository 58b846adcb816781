"""CLIP, its text and its vision part."""

from ..description import Attention, Mlp, family

PARTS = family(
    "CLIP", Attention(out="out_proj", turn=None, scale="scale", dropout="dropout"),
    Mlp(up=("fc1",), down="fc2", act="activation_fn"), None,
)  # fmt: skip
