"""OPT: positions are added to the input, the MLP lies in the layer itself."""

from ..description import Attention, Spread, family

PARTS = family("OPT", Attention(out="out_proj", turn=None, dropout="dropout"), None, None,
               OPTDecoderLayer=Spread(up=("fc1",), down="fc2", act="activation_fn"))  # fmt: skip
