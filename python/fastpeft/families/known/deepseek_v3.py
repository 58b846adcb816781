"""DeepSeek-V3 and R1: keys and values are projected down first."""

from ..description import Mlp, Norm, Together, family

PARTS = family("DeepseekV3", Together(names=("q_a_proj", "q_proj", "kv_a_proj_with_mqa")), Mlp(), Norm())
