"""DeepSeek-V2: keys and values are projected down first."""

from ..description import Mlp, Norm, Together, family

PARTS = family("DeepseekV2", Together(names=("q_a_proj", "q_proj", "kv_a_proj_with_mqa")), Mlp(), Norm())
