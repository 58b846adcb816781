"""Phi-3 and Phi-4: one projection makes q, k and v, one makes gate and up."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "Phi3", Attention(qkv=("qkv_proj",)), Mlp(up=("gate_up_proj",), act="activation_fn", halves=True), Norm()
)
