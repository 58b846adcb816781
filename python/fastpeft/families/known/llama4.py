"""Llama 4, the language part: its rotation stays its own code; its experts are given every token, or zeros for it."""

from ..description import Experts, Mlp, Norm, Together, family

PARTS = family(
    "Llama4Text", Together(names=("q_proj", "k_proj", "v_proj")), Mlp(act="activation_fn"), Norm(eps="eps"),
    Llama4TextL2Norm=Norm(eps="eps"), Llama4TextExperts=Experts(every=True),
)  # fmt: skip
