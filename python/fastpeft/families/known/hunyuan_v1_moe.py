"""Hunyuan's mixture of experts: norms of each head after the rotation."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "HunYuanMoEV1", Attention(norms=("query_layernorm", "key_layernorm"), heads_first=True, normed="turned"),
    Mlp(), Norm(),
)  # fmt: skip
