"""Ministral."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Ministral", Attention(), Mlp(), Norm())
