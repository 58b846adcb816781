"""EXAONE 4: layers without windows turn nothing where others have them."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "Exaone4",
    Attention(norms=("q_norm", "k_norm"), heads_first=True,
              turned=lambda module: module.sliding_window is None or module.is_sliding),
    Mlp(), Norm(),
)  # fmt: skip
