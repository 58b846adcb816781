"""Qwen3-VL, the language part."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Qwen3VLText", Attention(norms=("q_norm", "k_norm")), Mlp(), Norm())
