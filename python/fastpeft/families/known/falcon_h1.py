"""Falcon-H1: attention beside a state space, which stays its own code, as do the factors in its MLP."""

from ..description import Attention, Norm, Together, family

PARTS = family(
    "FalconH1", Attention(key_scale="key_multiplier"), None, Norm(),
    FalconH1MLP=Together(names=("gate_proj", "up_proj"), attends=False),
)  # fmt: skip
