"""BLOOM: ALiBi, and blocks that add the residual themselves."""

from ..description import Attention, Mlp, Module, family


def _whole(module: Module) -> bool:
    return not (module.pretraining_tp > 1 and module.slow_but_exact)


PARTS = family(
    "Bloom",
    Attention(
        qkv=("query_key_value",), order="heads", out="dense", turn=None, alibi="alibi", scale="inv_norm_factor",
        residual="hidden_dropout", eager=True, served=_whole,
    ),
    Mlp(up=("dense_h_to_4h",), down="dense_4h_to_h", act="gelu_impl", residual="hidden_dropout", served=_whole), None,
)  # fmt: skip
