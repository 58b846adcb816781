"""Spoiling a sound call: one argument becomes one that no caller should give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_kernels import dispatch

from .draws import Draw


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def freed_view(t: Tensor) -> Tensor:
    """A view that begins inside of a storage that was freed: its address is not 0."""
    whole = torch.cat([t.new_zeros(3), t.reshape(-1)])
    view = whole[3:].view(t.shape)
    whole.untyped_storage().resize_(0)
    return view


def cut_storage(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.nbytes // 2)
    return t


def cut_behind(t: Tensor) -> Tensor:
    """The second half of a storage that now ends where it begins, and holds as many bytes as the view."""
    pair = torch.cat([t.reshape(-1), t.reshape(-1)])
    view = pair[t.numel() :].view(t.shape)
    pair.untyped_storage().resize_(t.nbytes)
    return view


def grown(t: Tensor) -> Tensor:
    return torch.cat([t, t[:1]]) if t.dim() else t.repeat(2)


SPOILERS: dict[str, Callable[[Tensor], Any]] = {
    "freed": freed,
    "a freed view": freed_view,
    "a cut storage": cut_storage,
    "a storage cut before it": cut_behind,
    "shorter": lambda t: t[:-1] if t.dim() else t.new_empty(0),
    "one": lambda t: t[:1] if t.dim() else t.new_zeros(1),
    "narrower": lambda t: t[..., :-1] if t.dim() else t,
    "empty": lambda t: t[:0] if t.dim() else t.new_empty(0),
    "longer": grown,
    "flat": lambda t: t.reshape(-1),
    "deeper": lambda t: t.unsqueeze(0),
    "transposed": lambda t: t.mT if t.dim() > 1 else t.new_zeros(3, 3),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "uint8": lambda t: t.to(torch.uint8),
    "int32": lambda t: t.nan_to_num().int() if t.is_floating_point() else t.int(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse() if t.dim() else t.new_zeros(2).to_sparse(),
    "None": lambda t: None,
    "negative": lambda t: -t - 5 if t.dtype is torch.int64 else t,
    "huge": lambda t: t + 2**40 if t.dtype is torch.int64 else t,
}
INTEGERS = (0, -1, 1, 2, 3, 7, 63, 2**31, -(2**40), 2**62)
FLOATS = (float("nan"), float("inf"), -1.0, 1.0, 1.5, 0.0)


def spoil(d: Draw, op: str, args: list[Any]) -> str:
    """Change one argument in place; says which and how."""
    names = dispatch.ops()[op].operands.names
    i = d.random.randrange(len(args))
    if d.maybe(0.7):  # tensors most of all
        i = d.one([j for j, v in enumerate(args) if isinstance(v, Tensor) or (isinstance(v, list) and v)])
    holder: list[Any] = args
    name = names[i]
    if isinstance(args[i], list) and args[i]:
        if d.maybe(0.15):
            args[i] = args[i][:-1]
            return f"{name} is one shorter"
        holder = args[i] = [*args[i]]
        i = d.random.randrange(len(holder))
        name = f"{name}[{i}]"
    holder[i], how = (d.number(), "another") if name.startswith("scaling") else _spoilt(d, holder[i])
    return f"{name} is {how}"


def _spoilt(d: Draw, value: Any) -> tuple[Any, str]:
    if isinstance(value, Tensor):
        how = d.one([*SPOILERS])
        return SPOILERS[how](value), how
    if isinstance(value, bool):
        return not value, str(not value)
    if isinstance(value, int):
        value = d.one(INTEGERS)
    elif isinstance(value, float):
        value = d.one(FLOATS)
    elif value is None:
        value = torch.zeros(3)
    return value, str(value)
