"""Falcon: q, k and v in one projection, in an order for each generation; models with ALiBi stay as they are."""

from ..description import Attention, Mlp, Module, family


def _order(module: Module) -> str:
    return "parts" if module.multi_query and not module.new_decoder_architecture else "heads"


PARTS = family(
    "Falcon",
    Attention(qkv=("query_key_value",), order=_order, out="dense", scale="inv_norm_factor", dropout="no_dropout",
              served=lambda module: not module.config.alibi),
    Mlp(up=("dense_h_to_4h",), down="dense_4h_to_h", act="act"), None,
)  # fmt: skip
