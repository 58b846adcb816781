"""LFM2's mixture of experts: some layers have a short convolution, which stays its own code."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "Lfm2Moe", Attention(out="out_proj", norms=("q_layernorm", "k_layernorm"), dropout="no_dropout"),
    Mlp(up=("w1", "w3"), down="w2", act="silu"), Norm(),
)  # fmt: skip
