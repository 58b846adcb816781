"""Mistral."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Mistral", Attention(), Mlp(), Norm())
