"""Checks of arguments that all operators share, beside what each asks of its own; the one form of argument errors."""

from __future__ import annotations

from operator import mul
from typing import Any

import torch
from torch import Tensor

PLAIN = frozenset({Tensor, torch.nn.Parameter})  # a subclass may do anything
_strided = torch.strided


def arg_error(op: str, arg: str, expected: str, got: object, error: type[Exception] = ValueError) -> Exception:
    """The one form of argument errors: the op, the argument, what was expected, what came."""
    return error(f"{op}: {arg} must be {expected}, got {got}")


def check_alike(op: str, arg: str, got: Tensor, x: Tensor, name: str = "x") -> None:
    """ValueError unless `got` has the dtype, shape and device of `x`, which the message calls `name`."""
    if got.dtype != x.dtype or got.shape != x.shape or got.device != x.device:
        raise arg_error(op, arg, f"{x.dtype} {tuple(x.shape)} on {x.device} like {name}",
                        (got.dtype, tuple(got.shape), got.device))  # fmt: skip


def check_floating(op: str, **tensors: Tensor) -> None:
    """TypeError unless each is a floating-point tensor, of a dtype of its own."""
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise arg_error(op, name, "a floating-point tensor", t.dtype, TypeError)


def capturing() -> bool:
    """True while a CUDA graph is captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def moved(op: str, arg: str, t: Tensor, device: torch.device) -> Tensor:
    """`t` on `device`. RuntimeError where that is a copy and a CUDA graph is captured, which cannot hold it."""
    if t.device != device and capturing():
        where = f"on {device} where a CUDA graph is captured (move it there before)"
        raise arg_error(op, arg, where, f"one on {t.device}", RuntimeError)
    return t.to(device)


def in_memory(t: Tensor) -> bool:
    """True if the storage of a dense `t` holds all of its elements: it may have been freed or cut under it."""
    count = t.numel()
    if not count:
        return True
    end = t.storage_offset() + count
    if not t.is_contiguous():
        strides = t.stride()
        end += 1 - count + sum(map(mul, t.shape, strides)) - sum(strides)
    return t.untyped_storage().nbytes() >= end * t.itemsize


def whole(t: Tensor) -> bool:
    """`in_memory`, of any tensor: one that stands for another is left to whoever computes with that."""
    stands_for_another = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return type(t) not in PLAIN or stands_for_another or in_memory(t)


def check_memory(op: str, **tensors: Tensor | None) -> None:
    """ValueError unless each tensor is dense and `whole`: for what a public function reads before its operator does."""
    for name, t in tensors.items():
        if t is not None and t.layout is not torch.strided:
            raise arg_error(op, name, "a dense tensor (strided)", t.layout)
        if t is not None and not whole(t):
            raise arg_error(op, name, f"in memory: {tuple(t.shape)} of {t.dtype} do not fit its storage, which was "
                            "freed or cut", f"{t.untyped_storage().nbytes()} bytes")  # fmt: skip


def as_autocast(op: str, x: Tensor) -> Tensor:
    """x in autocast's dtype where that is on; float64 stays."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype is torch.float64:
        return x
    check_memory(op, x=x)
    return x.to(torch.get_autocast_dtype(device))


def rows_of(op: str, x: Tensor, k: int) -> Tensor:
    """x [..., K] as contiguous [M, K]."""
    if not x.is_contiguous():
        check_memory(op, x=x)  # it is copied; what is not, the operator looks at
    return (x if x.dim() == 2 else x.reshape(-1, k)).contiguous()


class Operands:
    """The tensors among an operator's arguments, and what every operator asks of them: asked here once.

    schema: torch's. Dense tensors, on the device of the first, in memory as `whole` says. The seed is apart: it may be
    on a CPU whatever the device is.
    """

    def __init__(self, op: str, schema: Any) -> None:
        types = {argument.name: str(argument.type) for argument in schema.arguments}
        self.op, self.names = op, [*types]
        tensors = [i for i, kind in enumerate(types.values()) if "Tensor" in kind]
        self.lists = [i for i in tensors if "List" in types[self.names[i]]]
        self.singles = [i for i in tensors if i not in self.lists]
        self.optional = {i for i in tensors if "Optional" in types[self.names[i]]}
        self.written = [i for i, argument in enumerate(schema.arguments) if argument.is_write]

    def record(self, args: tuple[Any, ...]) -> bool:
        """True if a tensor of `args` records gradients."""
        return any((t := args[i]) is not None and t.requires_grad for i in self.singles) or any(
            t is not None and t.requires_grad for i in self.lists for t in args[i]
        )

    def check(self, args: tuple[Any, ...], memory: bool = True) -> None:
        """Raise ValueError where one is not as they have to be. memory: false for tensors that have none."""
        first = args[0]
        on_cpu = memory and first is not None and first.is_cpu
        for i in self.singles:
            t = args[i]
            if t is None:
                if i not in self.optional:
                    raise arg_error(self.op, self.names[i], "a tensor", None, TypeError)
                continue
            if on_cpu and t.is_cpu and t.layout is _strided:  # almost all pass here, in a fraction of a microsecond
                size = t.untyped_storage().nbytes()
                if size == t.nbytes and t.is_contiguous() and not t.storage_offset():
                    continue
                if in_memory(t):  # keys of a cache, heads of a fused projection
                    continue
            self._check(self.names[i], t, first, memory)
        for i in self.lists:
            for j, t in enumerate(args[i]):
                if t is not None:
                    self._check(f"{self.names[i]}[{j}]", t, first, memory)

    def _check(self, name: str, t: Tensor, first: Tensor, memory: bool) -> None:
        if t.layout is not _strided:
            raise arg_error(self.op, name, "a dense tensor (strided)", t.layout)
        if t.device != first.device and not (name.startswith("seed") and t.is_cpu):
            raise arg_error(self.op, name, f"on {first.device} like {self.names[0]}", t.device)
        if memory:
            check_memory(self.op, **{name: t})
