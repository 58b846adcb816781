"""Mixtral."""

from ..description import Attention, Norm, family

PARTS = family("Mixtral", Attention(), None, Norm())
