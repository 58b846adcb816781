"""Granite: its factors of residuals and logits are in its layers' own forward."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Granite", Attention(), Mlp(), Norm())
