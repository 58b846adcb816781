"""Llama 4, the language part: its rotation stays its own code."""

from ..description import Mlp, Norm, Together, family

PARTS = family(
    "Llama4Text", Together(names=("q_proj", "k_proj", "v_proj")), Mlp(act="activation_fn"), Norm(eps="eps")
)
