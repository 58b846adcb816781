"""OLMo 3: OLMo 2 with windows."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Olmo3", Attention(norms=("q_norm", "k_norm"), normed="whole"), Mlp(), Norm())
