"""Nemotron and Minitron: squared ReLU, a part of each head is turned, LayerNorm multiplies by one plus its weight."""

from ..description import Attention, Mlp, family

PARTS = family("Nemotron", Attention(), Mlp(up=("up_proj",)), None)
