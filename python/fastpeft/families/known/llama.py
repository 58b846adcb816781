"""Llama, and the many models that take its classes."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Llama", Attention(), Mlp(), Norm())
