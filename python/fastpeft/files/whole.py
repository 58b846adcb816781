"""Tensors of a model that FSDP2 shards (`distributed.fully_shard_model`): whole ones out of them and into them.

torch.distributed is imported on use only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, without importing torch.distributed for a tensor that is none."""
    return type(tensor) is not Tensor and hasattr(tensor, "full_tensor")


def gathered(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The whole tensors, on every process; all of them must call this if one is sharded."""
    return {key: t.full_tensor() if is_sharded(t) else t for key, t in tensors.items()}


def copy_into(target: Tensor, value: Tensor) -> None:
    """`target.copy_(value)`, where a whole value fills a sharded target."""
    if is_sharded(target) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        held: Any = target
        value = value.to(held.device, held.dtype)
        value = distribute_tensor(value, held.device_mesh, held.placements, src_data_rank=None)
    with torch.no_grad():
        target.copy_(value)


def may_write(sharded: bool, is_main_process: bool) -> bool:
    """True in a process that writes files: of a sharded model in the first one only, though all of them gather."""
    return is_main_process and (not sharded or torch.distributed.get_rank() == 0)
