"""OLMo: some of its models clip q, k and v, which stays their own code."""

from ..description import Attention, Mlp, family

PARTS = family("Olmo", Attention(served=lambda module: module.config.clip_qkv is None), Mlp(), None)
