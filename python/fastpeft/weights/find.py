"""The class for the storage that a module has."""

from __future__ import annotations

from torch import nn

from .base import BaseWeight
from .bnb import Bnb4bitWeight, Bnb8bitWeight
from .dense import Conv1DWeight, ConvWeight, EmbeddingWeight, LinearWeight, NormWeight
from .megatron import MegatronWeight
from .nf4 import Quant4bitWeight
from .read_by_module import AttentionWeight

# The more special ones first.
STORAGES: tuple[type[BaseWeight], ...] = (
    Quant4bitWeight, Bnb4bitWeight, Bnb8bitWeight, Conv1DWeight, EmbeddingWeight, ConvWeight, AttentionWeight,
    LinearWeight, MegatronWeight, NormWeight,
)  # fmt: skip


def weight_of(module: nn.Module) -> BaseWeight | None:
    """A module's weight, or None if no adapter can act on it."""
    return next((storage(module) for storage in STORAGES if storage.accepts(module)), None)
