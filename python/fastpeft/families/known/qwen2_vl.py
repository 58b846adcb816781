"""Qwen2-VL, the language part."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Qwen2VL", Attention(), None, Norm(), Qwen2MLP=Mlp())
