"""LFM2: some layers have a short convolution, which stays its own code."""

from ..description import Attention, Norm, family

PARTS = family(
    "Lfm2", Attention(out="out_proj", norms=("q_layernorm", "k_layernorm"), dropout="no_dropout"), None, Norm()
)
