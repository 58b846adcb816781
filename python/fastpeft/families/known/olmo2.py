"""OLMo 2: norms of all heads of q, and of k, at once."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Olmo2", Attention(norms=("q_norm", "k_norm"), normed="whole"), Mlp(), Norm())
