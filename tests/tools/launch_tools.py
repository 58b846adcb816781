"""Launches of a GPU counted without one: tensors without memory stand for those of a GPU, and nothing runs.

Triton's backends are told that they serve meta tensors, so that operators are chosen as on a GPU without the CUDA
library and their own host code runs; what it would launch is noted down, and so is every operator of torch's that
computes. Torch's attention is one launch each way, as its flash kernel is.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from fastpeft.families import ways
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_kernels import dispatch, tuning
from peft_kernels.formats import tables
from peft_kernels.triton_lib import host

_NO_LAUNCH = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided"}  # nothing is computed


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, seen: Counter[str], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen["attention"] += 1
        ctx.seen, ctx.like = seen, (q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.seen["attention_backward"] += 1
        return None, *map(torch.empty_like, ctx.like)


class _AttentionIsOne(TorchFunctionMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(self.seen, *args[:3])
        return func(*args, **(kwargs or {}))


class _Counting(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")
        if name[0] == dispatch.NAMESPACE:
            with self:  # what its host code computes counts, too
                return dispatch.ops()[name[2]]._call(*args)
        result = func(*args, **(kwargs or {}))
        given, made = (set(map(_storage, tree_leaves(t))) for t in ((args, kwargs), result))
        if name[2] not in _NO_LAUNCH and (func._schema.is_mutable or made - given):  # otherwise all are views
            self.seen[name[2]] += 1
        return result


def _storage(t: Any) -> int | None:
    return t.untyped_storage()._cdata if isinstance(t, Tensor) else None


@contextmanager
def meta_is_a_gpu(capability: int = 90) -> Iterator[None]:
    """Within, Triton's backends serve meta tensors and no other backend does, for a GPU of this compute capability.

    What the tables of tiles would change in the launches is fixed: no sum is split, and W is decoded for the vendor's
    product from 2048 rows on, 2^23 elements at a time.
    """
    with ExitStack() as stack:
        for kernel in ("project", "outer", "forward", "backward"):
            stack.enter_context(tuning.override(kernel, programs=1))
        many = {"from_M": 2048, "from_M_backward": 2048, "from_M_dense": 2048, "elements": 1 << 23}
        stack.enter_context(tuning.override("panels", **many))
        stack.enter_context(tuning.assuming(capability))
        stack.enter_context(patch.object(ways, "_known", (None, {})))  # what was found holds for neither side
        # torch knows no autocast for meta tensors, and raises where it is asked for one
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *device: False))
        stack.enter_context(patch.dict(dispatch._SERVING, meta=("triton",)))
        meta = torch.device("meta")  # on a GPU they were made with the weights
        stack.enter_context(patch.dict(tables._tables, {meta: tables._make(meta)}))
        for op in dispatch.ops().values():
            backend = op.load("triton")
            if isinstance(backend, dispatch.Backend):
                served = dataclasses.replace(backend, devices=frozenset({"cuda", "meta"}))
                stack.enter_context(patch.dict(op._loaded, triton=served))
        yield


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Within `meta_is_a_gpu`: what was launched, by the kernel's or operator's name."""
    seen: Counter[str] = Counter()

    with _noted(seen, lambda *args, **options: None), _AttentionIsOne(seen), _Counting(seen):
        yield seen


@contextmanager
def kernels_run() -> Iterator[Counter[str]]:
    """The kernels of ours that run within, on a GPU or in Triton's interpreter."""
    seen: Counter[str] = Counter()
    with _noted(seen, host.launch):
        yield seen


def _noted(seen: Counter[str], run: Callable[..., object]) -> Any:
    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if 0 not in grid:
            op = kernel.fn.__module__.split(".")[2]  # peft_kernels.ops.<op>
            seen[f"{op}.{kernel.fn.__name__.removesuffix('_kernel')}"] += 1
        run(kernel, grid, *args, **options)

    return patch.object(host, "launch", launch)
