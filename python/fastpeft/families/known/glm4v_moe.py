"""GLM-4.5V, the language part: a mixture of experts, a part of each head is turned."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("Glm4vMoeText", Attention(), Mlp(), Norm(), Glm4vMoeRMSNorm=Norm())
