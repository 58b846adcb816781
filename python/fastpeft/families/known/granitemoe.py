"""Granite's mixture of experts: its factors of residuals and logits are in its layers' own forward."""

from ..description import Attention, Norm, family

PARTS = family("GraniteMoe", Attention(), None, Norm())
