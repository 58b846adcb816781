"""Gemma 4, the language part: layers share keys and values, so what is around our attention is its own code."""

from ..description import Mlp, Norm, Together, family

PARTS = family(
    "Gemma4Text", Together(names=("q_proj", "k_proj", "v_proj")), Mlp(), None, Gemma4RMSNorm=Norm(eps="eps")
)
