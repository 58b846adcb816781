"""Qwen3-VL's mixture of experts, the language part."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Qwen3VLMoeText", Attention(norms=("q_norm", "k_norm")), Mlp(), Norm())
