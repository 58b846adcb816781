"""Command R: neighbours are turned, attention and MLP stand side by side."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "Cohere", Attention(norms=("q_norm", "k_norm"), turn="neighbours"), Mlp(), Norm(mean=True)
)
