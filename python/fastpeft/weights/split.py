"""Weights that transformers' tensor parallelism splits among processes.

A process computes with its part of W alone, `enter` and `leave` bring inputs and outputs to and from it: one collective
for the base layer and its adapters together, whatever they are. Of W [out, in] the outputs are split (dim 0: "colwise")
or the inputs (dim 1: "rowwise"). What processes hold whole (LoRA's A beside split outputs) they train alike, by the sum
of their gradients. torch.distributed is imported on use only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files.whole import dtensor_from_local_like
from .base import BaseWeight, Weight
from .dense import EmbeddingWeight, LinearWeight, scaled
from .lookups import Lookups


class _Copied(torch.autograd.Function):
    """x as it is; its gradient is the sum over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _Added(torch.autograd.Function):
    """The sum of x over all processes, each of which gets the gradient of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class Split:
    """How processes split W: over `mesh` (a DeviceMesh of one dimension), along `dim`.

    whole_input, whole_output: inputs are split outside of the layer as W's columns are, and outputs as its rows,
    unless these say that every process has all of them.
    """

    def __init__(self, mesh: Any, dim: int, whole_input: bool, whole_output: bool) -> None:
        self.mesh, self.dim, self.whole_input, self.whole_output = mesh, dim, whole_input, whole_output
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        from torch.distributed.tensor import DTensor

        self._parts: type[Any] = DTensor  # a class, since torch.compile sees no attribute of one as it is

    def __deepcopy__(self, memo: Any) -> Split:
        return self  # groups of processes have no copies

    def span(self, whole: int) -> tuple[int, int]:
        """First and last + 1 of the indices, of `whole` many, that this process has."""
        step = -(-whole // self.size)
        return min(self.rank * step, whole), min((self.rank + 1) * step, whole)

    def narrowed(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of a whole tensor."""
        first, end = self.span(tensor.shape[dim])
        return tensor.narrow(dim, first, end - first)

    def copied(self, tensor: Tensor) -> Tensor:
        """A tensor that all processes have alike and each uses for a part of the result."""
        if not (torch.is_grad_enabled() and tensor.requires_grad):
            return tensor
        return _Copied.apply(tensor, self.group)  # type: ignore[no-any-return, no-untyped-call]

    def added(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if torch.is_grad_enabled() and tensor.requires_grad:
            return _Added.apply(tensor, self.group)  # type: ignore[no-any-return, no-untyped-call]
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def own(self, tensor: Any) -> Tensor:
        """A tensor as this process computes with it: its part of a DTensor, or a whole one."""
        return tensor.to_local() if isinstance(tensor, self._parts) else self.copied(tensor)

    def once(self, tensor: Any) -> Tensor:
        """A tensor that all processes have alike, for a sum over them in which it should be once."""
        whole = self.copied(tensor.to_local() if isinstance(tensor, self._parts) else tensor)
        return whole if self.rank == 0 else whole * 0

    def parted(self, tensor: Tensor, dim: int) -> Tensor:
        """The first process's values of a whole tensor as a DTensor that is split along `dim`."""
        from torch.distributed.tensor import Shard, distribute_tensor

        source = None if tensor.is_meta else 0
        return distribute_tensor(tensor.detach(), self.mesh, [Shard(dim)], src_data_rank=source)

    def alike(self, tensor: Tensor) -> Tensor:
        """The first process's values of a tensor, which is changed."""
        if not tensor.is_meta:
            torch.distributed.broadcast(tensor.detach(), group=self.group, group_src=0)
        return tensor

    def gathered(self, y: Tensor, whole: int) -> Tensor:
        """All of what processes have parts of, along the last dimension."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shape = torch.Size((*y.shape[:-1], whole))
        stride = torch.empty(shape, device="meta").stride()
        parts = DTensor.from_local(y, self.mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride)
        return parts.redistribute(placements=[Replicate()]).to_local()  # type: ignore[no-any-return]


def is_split(module: nn.Module) -> bool:
    """True if a process computes with a part of the module's own weights alone, which FSDP's shards are not."""
    if getattr(module, "_hf_quantized_needs_local_tp", False):  # transformers' mark of quantised ones
        return True
    parameters: Any = module._parameters.values()
    meshes = [p.device_mesh for p in parameters if hasattr(p, "device_mesh")]
    return any("tp" in (mesh.mesh_dim_names or ()) for mesh in meshes)


class SplitWeight(BaseWeight):
    """A weight of which this process has a part, as a layer that has this part alone; `info` tells the whole's sizes.

    The layer around it computes between `enter` and `leave`, merged or not.
    """

    parallel = "tensor"
    split: Split

    def __init__(self, module: nn.Module, split: Split) -> None:
        super().__init__(module)
        self.split = split

    def enter(self, x: Tensor) -> Tensor:
        if self.split.dim == 0 and x.is_floating_point():
            return self.split.copied(x)
        return self.split.narrowed(self.split.copied(x), -1) if self.split.whole_input else x

    def leave(self, y: Tensor) -> Any:
        if self.split.dim == 1:
            return self.split.added(y)
        return self.split.gathered(y, self.shape[0]) if self.split.whole_output else y

    def own(self, tensor: Tensor) -> Tensor:
        return self.split.own(tensor)

    def read(self) -> Weight:
        bias: Any = self._bias
        return self.turned(self._local()), None if bias is None else bias.to_local()

    def _local(self) -> Tensor:
        weight: Any = self.tensor
        return weight.to_local()  # type: ignore[no-any-return]

    def own_bias(self) -> Tensor | None:
        """The bias as this process adds it to its part of the output."""
        if (bias := self.module._parameters.get("bias")) is None:
            return None
        if self.split.dim == 0:
            return bias.to_local()  # type: ignore[no-any-return]
        return self.split.once(bias) if bias.requires_grad or self.split.rank == 0 else None

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.apply(x, self.turned(self._local()), self.own_bias())

    def write(self, w: Tensor, b: Tensor | None) -> float | None:
        parameters = self.module._parameters
        if b is not None:
            if parameters.get("bias") is None:
                raise ValueError("the adapter adds a bias, and the base layer has none to hold it")
            parameters["bias"] = _in_place_of(parameters["bias"], b)
        parameters["weight"] = _in_place_of(parameters["weight"], self.turned(w))
        return None

    def frozen(self) -> Callable[[], Tensor] | None:
        return None


class SplitLinearWeight(SplitWeight, LinearWeight):
    """nn.Linear with a DTensor as its weight."""

    def fast(self) -> Callable[[], Any]:
        parameters = self.module._parameters

        def weight() -> Tensor | None:
            w: Any = parameters.get("weight")
            if w is None or w.requires_grad:
                return None
            with torch.no_grad():
                return w.to_local()  # type: ignore[no-any-return]

        return weight

    def note(self, lookups: Lookups) -> None:
        lookups.refuse()  # the local part is made at each call

    @property
    def parameters(self) -> Any:
        return _OwnBias(self)


class SplitEmbeddingWeight(SplitWeight, EmbeddingWeight):
    """nn.Embedding with a DTensor as its weight. Of W = weight^T a part of the vocabulary (dim 1) or of the vectors."""

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if self.split.dim == 0:
            return super().apply(x, w, b)
        first, end = self.split.span(self.module.num_embeddings)
        inside = (x >= first) & (x < end)
        pad = self.module.padding_idx
        pad = pad - first if pad is not None and first <= pad < end else None
        y = F.embedding(torch.where(inside, x - first, 0), w.t(), padding_idx=pad)
        return scaled(self.module, y.masked_fill(~inside[..., None], 0.0))


class _OwnBias:
    """The base layer's parameters as a kernel takes them: of the bias the part of this process."""

    def __init__(self, weight: SplitWeight) -> None:
        self._weight = weight

    def get(self, name: str) -> Tensor | None:
        return self._weight.own_bias() if name == "bias" else None


def _in_place_of(old: Any, value: Tensor) -> nn.Parameter:
    local = value.detach().to(device=old.device, dtype=old.dtype)
    return nn.Parameter(dtensor_from_local_like(local, old), requires_grad=old.requires_grad)
