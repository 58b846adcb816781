"""Falcon-H1: attention beside a state space, which stays its own code."""

from ..description import Attention, Norm, family

PARTS = family("FalconH1", Attention(key_scale="key_multiplier"), None, Norm())
