"""Qwen2.5-VL, the language part."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Qwen2_5_VL", Attention(), None, Norm(), Qwen2MLP=Mlp())
