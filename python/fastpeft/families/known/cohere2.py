"""Command R7B: layers with windows are turned, those without are not."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "Cohere2", Attention(turn="neighbours", turned=lambda module: module.sliding_window is not None), Mlp(),
    Norm(mean=True),
)  # fmt: skip
