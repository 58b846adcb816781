"""The class for the storage that a module has."""

from __future__ import annotations

from torch import nn

from .aqlm import AqlmWeight
from .base import BaseWeight
from .bnb import Bnb4bitWeight
from .bnb_int8 import Bnb8bitFloatWeight, Bnb8bitWeight
from .dense import Conv1DWeight, ConvWeight, EmbeddingWeight, LinearWeight, NormWeight
from .gptq import AwqOpaqueWeight, AwqWeight, GptqOpaqueWeight, GptqWeight
from .hqq import HqqDecodedWeight, HqqWeight
from .megatron import MegatronWeight
from .nf4 import Quant4bitWeight
from .own_forward import EetqWeight, IncWeight, TeWeight
from .read_by_module import AttentionWeight
from .torchao import TorchaoDecodedWeight, TorchaoWeight

# The more special ones first.
STORAGES: tuple[type[BaseWeight], ...] = (
    Quant4bitWeight, Bnb4bitWeight, Bnb8bitWeight, Bnb8bitFloatWeight, GptqWeight, AwqWeight, AwqOpaqueWeight,
    GptqOpaqueWeight, HqqWeight, HqqDecodedWeight, TorchaoWeight, TorchaoDecodedWeight, AqlmWeight, EetqWeight,
    IncWeight, TeWeight, Conv1DWeight, EmbeddingWeight, ConvWeight, AttentionWeight, LinearWeight, MegatronWeight,
    NormWeight,
)  # fmt: skip


def weight_of(module: nn.Module) -> BaseWeight | None:
    """A module's weight, or None if no adapter can act on it."""
    return next((storage(module) for storage in STORAGES if storage.accepts(module)), None)
