"""LFM2: some layers have a short convolution, which stays its own code."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "Lfm2", Attention(out="out_proj", norms=("q_layernorm", "k_layernorm"), dropout="no_dropout"),
    Mlp(up=("w1", "w3"), down="w2", act="silu"), Norm(),
)  # fmt: skip
