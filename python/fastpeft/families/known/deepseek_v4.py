"""DeepSeek-V4: keys are values, also of many tokens at once; each head has a sink; MLPs cut their gates."""

from ..description import Experts, Mlp, Norm, Together, family

PARTS = family(
    "DeepseekV4", Together(names=("q_a_proj", "kv_proj"), eager=True), Mlp(limit="limit"), Norm(),
    DeepseekV4UnweightedRMSNorm=Norm(eps="eps"), DeepseekV4Experts=Experts(limit="limit"),
)  # fmt: skip
