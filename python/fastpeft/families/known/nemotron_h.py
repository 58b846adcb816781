"""Nemotron-H: state spaces, which stay their own code, and attention that turns nothing."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("NemotronH", Attention(turn=None), Mlp(up=("up_proj",)), Norm())
