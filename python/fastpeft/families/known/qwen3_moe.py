"""Qwen3's mixture of experts."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Qwen3Moe", Attention(norms=("q_norm", "k_norm")), Mlp(), Norm())
