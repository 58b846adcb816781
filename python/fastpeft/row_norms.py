"""|W + B A| of each row of a base weight, with no dense W + B A.

|W + B A|^2 = |W|^2 + 2 rowsum(B * U) + rowsum((B G) * B), with U = W A^T (r more tokens through the layer), G = A A^T.
|W|^2 is kept for each base weight. Where the three terms cancel, the sum has lost its digits: rows below 1e-2 |W|^2 are
computed anew from W + B A, a tile of rows at a time. Which rows these are depends on data, and a compiled graph keeps
no |W|^2: there every row is computed from W + B A, which decodes W once and not twice.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .sharded import is_sharded
from .weights import BaseWeight, wide

CANCELLED = 1e-2
TILE = 256
SAMPLED = 64  # elements by which a write without a version is noticed


@torch.no_grad()
def norms(kind: type[BaseWeight], module: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """|W + b a| of each row, in at least float32, under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return _norms(kind, module, a, b)


def _norms(kind: type[BaseWeight], module: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(wide(kind.dtype(module)), wide(a.dtype))
    a, b = a.flatten(1).to(dtype), b.flatten(1).to(dtype)
    if torch.compiler.is_compiling():
        tiles = kind._tiles(module)
        return torch.cat([torch.addmm(kind.rows(module, t).to(dtype), b[t], a).square().sum(1) for t in tiles]).sqrt()
    base = _kept_norms(kind, module)
    # The sums are small, and in float64 they lose nothing that the products had.
    left = b.double()
    squares = base.double() + 2 * (left * kind.times(module, a)).sum(1)
    squares += ((left @ (a @ a.t()).double()) * left).sum(1)
    lost = (squares < CANCELLED * base).nonzero().flatten()
    for index in torch.split(lost, TILE):
        rows = kind.rows(module, index).to(dtype)
        squares[index] = torch.addmm(rows, b[index], a).square().sum(1).double()
    return squares.sqrt().to(dtype)


_NORMS: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any, Any, Tensor]] = weakref.WeakKeyDictionary()


def _kept_norms(kind: type[BaseWeight], module: nn.Module) -> Tensor:
    """|W|^2 of each row, computed again when the module holds another weight, or other memory for it, or wrote into it.

    `weight.data.mul_(2)` writes without a new version; it is noticed by a few of the weight's elements on the CPU,
    where reading them does not wait for a device. A tensor made in inference mode has no version and is not kept.
    """
    weight: Any = module._parameters.get("weight", module._buffers.get("weight"))
    if weight.is_inference():
        return kind.squared_norms(module)
    # The reference holds no memory, but keeps the address from being given to another storage.
    storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
    key = (weight._version, storage.cdata, weight.storage_offset())
    some = None
    if weight.device.type == "cpu" and not is_sharded(weight) and weight.is_contiguous():
        some = weight.detach().view(-1)[:: weight.numel() // SAMPLED + 1].clone()
    found = _NORMS.get(module)
    if found is not None and found[0] == key and (some is None or torch.equal(some, found[2])):
        return found[3]
    value = kind.squared_norms(module)
    _NORMS[module] = key, storage, some, value
    return value
