"""StableLM: a part of each head is turned, some models have a norm for every head."""

from ..description import Attention, Mlp, family

PARTS = family("StableLm", Attention(norms=("q_layernorm", "k_layernorm"), normed="apart"), Mlp(), None)
