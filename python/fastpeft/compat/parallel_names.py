"""PEFT's names for models that processes share: tensor parallelism, Megatron, DeepSpeed's ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..inject.modules import walk
from ..inject.split import style_of
from ..methods.lora.variants.megatron import ALLOWED
from ..methods.registry import get_method
from .layer_classes import layer_class

LoraParallelLinear: Any = layer_class(get_method("LORA"), "LoraParallelLinear")


def get_default_module_allowlist() -> list[str]:
    """The packages that `LoraConfig.megatron_core` may name."""
    return list(ALLOWED)


@dataclass
class TpInfo:
    """A tensor parallel plan by names of modules, the mesh of its processes, and how many they are."""

    tp_plan: dict[str, str]
    device_mesh: Any
    tp_size: int


class LoraEmbeddingATPHolder(nn.Embedding):
    """The A [r, num_embeddings] of a LoRA on an embedding as an embedding of its own, whose weight is A^T (a copy).

    A name of PEFT's, which gives it to transformers' tensor parallelism; the layers here split A itself.
    """

    def __init__(self, lora_embedding_A_weight: Tensor) -> None:
        weight = lora_embedding_A_weight
        super().__init__(weight.shape[1], weight.shape[0], _weight=weight.detach().t().contiguous())
        self.weight.requires_grad_(weight.requires_grad)


def get_tp_plan_and_mesh(model: nn.Module, current_key: str) -> tuple[str | None, Any]:
    """(style, DeviceMesh) that transformers' tensor parallelism has for a module, by name; (None, None) without one."""
    sites = {site.name: site for site in walk(model)}
    mesh: Any = getattr(model, "_device_mesh", None)
    style = None if mesh is None else style_of(model, sites, current_key)
    if style is None or "tp" not in (mesh.mesh_dim_names or ("tp",)):
        return None, None
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    return (style, mesh) if mesh.size() > 1 else (None, None)


def check_deepspeed_zero3_enabled() -> bool:
    """True while transformers was told of a DeepSpeed configuration with ZeRO-3."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """Within this, parameters that ZeRO-3 partitions are whole. What the process `modifier_rank` writes to them is
    kept; None for no writing. Without ZeRO-3 it does nothing."""
    if not check_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield
