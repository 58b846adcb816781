"""Qwen2 and Qwen2.5."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Qwen2", Attention(), Mlp(), Norm())
