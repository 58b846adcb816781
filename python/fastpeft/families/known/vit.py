"""Vision Transformer."""

from ..description import Attention, Mlp, family

PARTS = family("ViT", Attention(turn=None), Mlp(up=("fc1",), down="fc2", act="activation_fn"), None)
