"""Gemma 3, the language part: norms of each head of q and k, windows in most layers."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Gemma3", Attention(norms=("q_norm", "k_norm"), heads_first=True), Mlp(), Norm(eps="eps", offset=1.0))
