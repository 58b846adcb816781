"""OPT: positions are added to the input, attention alone is a module."""

from ..description import Attention, family

PARTS = family("OPT", Attention(out="out_proj", turn=None, dropout="dropout"), None, None)
