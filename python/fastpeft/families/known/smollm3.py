"""SmolLM3: every fourth layer turns nothing."""

from ..description import Attention, Mlp, Norm, family

PARTS = family("SmolLM3", Attention(turned=lambda module: bool(module.use_rope)), Mlp(), Norm())
