"""Qwen2's mixture of experts."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Qwen2Moe", Attention(), Mlp(), Norm())
