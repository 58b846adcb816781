"""Ministral 3: its scores have a factor by position, so attention is its own code around one call for q, k and v."""

from ..description import Mlp, Norm, Together, family

PARTS = family("Ministral3", Together(names=("q_proj", "k_proj", "v_proj")), Mlp(), Norm())
