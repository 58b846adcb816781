"""Gemma 2: scores have a cap, norms stand before and after each block."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Gemma2", Attention(softcap="attn_logit_softcapping", eager=True), Mlp(), Norm(eps="eps", offset=1.0))
