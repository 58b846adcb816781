"""Qwen2.5-VL: the language part, and the MLPs and norms of its vision part."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Qwen2_5_VL", Attention(), Mlp(), Norm(), Qwen2MLP=Mlp())
