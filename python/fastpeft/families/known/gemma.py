"""Gemma: its norms multiply by one plus their weight."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Gemma", Attention(), Mlp(), Norm(eps="eps", offset=1.0))
