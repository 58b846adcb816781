"""Hunyuan: norms of each head after the rotation."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "HunYuanDenseV1", Attention(norms=("query_layernorm", "key_layernorm"), normed="turned"), Mlp(), Norm()
)
