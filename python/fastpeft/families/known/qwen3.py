"""Qwen3: norms of each head of q and k."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Qwen3", Attention(norms=("q_norm", "k_norm")), Mlp(), Norm())
