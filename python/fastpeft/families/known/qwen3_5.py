"""Qwen3.5: full attention has a gate; linear attention stays its own code."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Qwen3_5", Attention(norms=("q_norm", "k_norm"), gated=True), Mlp(), Norm(eps="eps", offset=1.0))
