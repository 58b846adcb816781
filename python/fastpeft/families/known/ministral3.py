"""Ministral 3: its scores have a factor by position, so what is around our attention is its own code."""

from ..description import Mlp, Norm, Together, family

PARTS = family("Ministral3", Together(names=("q_proj", "k_proj", "v_proj")), Mlp(), Norm())
