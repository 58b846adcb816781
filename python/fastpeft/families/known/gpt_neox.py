"""GPT-NeoX and Pythia: q, k and v of a head lie side by side, a part of each head is turned."""

from ..description import Attention, Mlp, family

PARTS = family(
    "GPTNeoX", Attention(qkv=("query_key_value",), order="heads", out="dense", head_size="head_size"),
    Mlp(up=("dense_h_to_4h",), down="dense_4h_to_h", act="act"), None,
)  # fmt: skip
