"""Qwen3.5's mixture of experts: full attention has a gate."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Qwen3_5Moe", Attention(norms=("q_norm", "k_norm"), gated=True), Mlp(), Norm(eps="eps", offset=1.0))
