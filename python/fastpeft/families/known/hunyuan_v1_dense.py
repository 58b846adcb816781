"""Hunyuan: norms of each head after the rotation."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "HunYuanDenseV1", Attention(norms=("query_layernorm", "key_layernorm"), heads_first=True, normed="turned"),
    Mlp(), Norm(),
)  # fmt: skip
