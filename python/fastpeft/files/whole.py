"""Whole tensors out of a sharded model and into it: FSDP2's DTensors, FSDP1's units, DeepSpeed's ZeRO-3 parameters.

torch.distributed and deepspeed are imported on use only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .offloaded import brought

UNIT = "_fsdp_wrapped_module"  # what FullyShardedDataParallel calls the module that it wraps


def is_sharded(tensor: Any) -> bool:
    """True for a DTensor, a parameter of ZeRO-3 and one that an FSDP1 unit keeps in its flat parameter."""
    if tensor is None or type(tensor) is Tensor:
        return False
    return hasattr(tensor, "full_tensor") or is_partitioned(tensor) or hasattr(tensor, "_fsdp_flattened")


def is_partitioned(tensor: Tensor) -> bool:
    """True for a parameter of ZeRO-3."""
    return hasattr(tensor, "ds_id")


def is_unit(module: nn.Module) -> bool:
    """True for torch's FullyShardedDataParallel (FSDP1)."""
    return UNIT in module._modules


def is_in_unit(module: nn.Module) -> bool:
    """True for a module whose own tensors are kept by an FSDP1 unit around it: in its flat parameter, or as plain
    attributes in the parameters' places."""
    flat = any(hasattr(p, "_fsdp_flattened") for p in module._parameters.values())
    if "W_q" in module._parameters:  # HQQ keeps its bias as a plain attribute by itself
        return flat
    return flat or any(isinstance(vars(module).get(name), Tensor) for name in ("weight", "bias"))


def is_apart(module: nn.Module) -> bool:
    """True for a module that has its tensors only while it is called: an FSDP1 unit, one that accelerate offloads."""
    return is_unit(module) or any("_hf_hook" in m.__dict__ for m in module.modules())


def opened(module: nn.Module) -> nn.Module:
    """A stand-in with its tensors for a module that is `is_apart`."""
    if is_unit(module):
        return _opened_unit(module)
    with brought(module):
        held = {name: {**vars(module)[name]} for name in ("_parameters", "_buffers")}
    children = {n: m if m is None or not is_apart(m) else opened(m) for n, m in module._modules.items()}
    own = {n: v for n, v in vars(module).items() if n not in ("forward", "_hf_hook", "_old_forward")}
    return _stand_in(module, {**own, **held, "_modules": children})


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy that has its own tensors, whoever keeps those of the original."""
    return copy.deepcopy(opened(module) if is_apart(module) else module, memo)


def _stand_in(module: nn.Module, attributes: dict[str, Any]) -> nn.Module:
    made: nn.Module = object.__new__(type(module))
    vars(made).update(attributes)
    return made


def _opened_unit(unit: nn.Module) -> nn.Module:
    """Whole copies of a unit's parameters, whose gradients the unit gets. It has them while it computes and at no other
    time, so this has it compute the copies."""
    module: Any = unit._modules[UNIT]

    def copies() -> dict[str, Tensor]:
        held = {name: t for name, t in vars(module).items() if isinstance(t, Tensor)}  # in the parameters' places
        if lost := [name for name, t in held.items() if t.numel() and not t.untyped_storage().nbytes()]:
            raise ValueError(f"{type(module).__name__}: FullyShardedDataParallel has {lost} in two units; wrap one")
        return {name: t.clone() for name, t in held.items()}

    module.forward = copies
    try:
        found = unit()
    finally:
        del module.forward
    none = {name: None for name, p in module._parameters.items() if p is None}
    return _stand_in(module, {**vars(module), "_parameters": none, **found})


def state_of_units(model: nn.Module) -> Mapping[str, Tensor] | None:
    """The state dict of a model that FSDP1 shards, which every process must ask for; None for other models.

    Raises ValueError if a unit around `model` has its tensors: only that one can gather them.
    """
    flat, stack, units = False, [model], False
    while stack:
        module = stack.pop()
        if is_unit(module):
            units = True
            continue
        flat = flat or is_in_unit(module)
        stack += [child for child in module._modules.values() if child is not None]
    if flat:
        raise ValueError(
            "FullyShardedDataParallel keeps these weights for a module around this one: pass the module that it "
            "returned, or state_dict=, which that one gives in every process (`model.state_dict()`)."
        )
    return model.state_dict() if units else None


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape that a tensor has when it is gathered."""
    return getattr(tensor, "ds_shape", tensor.shape)


def gathered(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The whole tensors, detached, on every process; all of them must call this if one is sharded."""
    return {key: _gathered(tensor) for key, tensor in tensors.items()}


def _gathered(tensor: Any) -> Tensor:
    if is_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()  # type: ignore[no-any-return]
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()  # type: ignore[no-any-return]


def copy_into(target: Any, value: Tensor) -> None:
    """`target.copy_(value)`, where a whole value fills a sharded target."""
    if is_partitioned(target):
        import deepspeed

        with deepspeed.zero.GatheredParameters([target], modifier_rank=0), torch.no_grad():
            if torch.distributed.get_rank() == 0:
                target.copy_(value)
        return
    with torch.no_grad():
        target.copy_(sharded_as(target, value.to(target.device, target.dtype)))


def sharded_as(target: Any, value: Any) -> Tensor:
    """A whole value, which every process has, as a DTensor if `target` is one."""
    if not hasattr(target, "full_tensor") or hasattr(value, "full_tensor"):
        return value  # type: ignore[no-any-return]
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def dtensor_from_local_like(local_tensor: Tensor, ref: Any) -> Tensor:
    """This process's part of a tensor as a DTensor of the shape, mesh and placements of another, `ref`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local_tensor.contiguous(), ref.device_mesh, ref.placements, run_check=False, shape=ref.shape,
        stride=ref.stride(),
    )  # fmt: skip


def may_write(sharded: bool, is_main_process: bool) -> bool:
    """True in a process that writes files: of a sharded model in the first one only, though all of them gather."""
    return is_main_process and (not sharded or torch.distributed.get_rank() == 0)
