"""GLM-4.5 and 4.6: a mixture of experts, a part of each head is turned."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Glm4Moe", Attention(norms=("q_norm", "k_norm")), Mlp(), Norm())
