"""Phi-1 and Phi-2: a part of each head is turned, attention and MLP stand side by side."""

from ..description import Attention, Mlp, family

PARTS = family(
    "Phi", Attention(out="dense", norms=("q_layernorm", "k_layernorm"), heads_first=True),
    Mlp(up=("fc1",), down="fc2", act="activation_fn"), None,
)  # fmt: skip
