"""Activations for a backward pass, held in the host's memory (of a GPU) or in a scratch file meanwhile.

With gradient checkpointing they are little more than the input of each layer, which is written once in the forward pass
and read once in the backward pass. What a checkpointed layer keeps while it runs again never leaves the device.
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..files.write_errors import named_write_errors

Place = Literal["cpu", "disk"]
_LEAST = 1 << 16  # bytes: what is smaller stays where it is


class OffloadActivations:
    """A context: what autograd keeps of computations made within it lies elsewhere until a backward pass asks for it.

    The backward pass may be made within it or after it, the context entered again for each step. Gradients are the
    same bits as without. moved: bytes that were moved so far; room: bytes of the scratch file.
    """

    def __init__(self, model: nn.Module, to: Place, folder: Path | None) -> None:
        own = [*model.parameters(), *model.buffers()]
        self._model, self._to = weakref.ref(model), to
        self._scratch = _Scratch(folder) if to == "disk" else None
        self._devices = {t.device.type for t in own}
        self._entered: list[Any] = []
        self.moved = 0
        if to == "cpu" and self._devices <= {"cpu"}:
            raise ValueError('offload_activations: to="cpu" is for a model on a GPU, this one is in the host\'s memory '
                             'already; use to="disk"')  # fmt: skip

    @property
    def room(self) -> int:
        return 0 if self._scratch is None else self._scratch.size

    def __enter__(self) -> OffloadActivations:
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:  # type: ignore[attr-defined]
            raise RuntimeError("offload_activations inside another context of saved tensors, as of rows_assigned, "
                               "which it would switch off: enter it first")  # fmt: skip
        model = self._model()
        own = [] if model is None else [*model.parameters(), *model.buffers()]
        # torch has one object of each storage
        weights = {t.untyped_storage() for t in own if type(t) in (Tensor, nn.Parameter)}

        def pack(tensor: Tensor) -> Any:
            return self._pack(tensor, weights)

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, _unpack)
        hooks.__enter__()
        self._entered.append(hooks)
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.pop().__exit__(*error)

    def _pack(self, tensor: Tensor, weights: set[Any]) -> Any:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.nbytes < _LEAST or (tensor.requires_grad and tensor.is_leaf):
            return _Kept(tensor)
        if (self._to == "cpu" and tensor.device.type == "cpu") or tensor.untyped_storage() in weights:
            return _Kept(tensor)
        self.moved += tensor.nbytes
        if self._scratch is not None:
            return _OnDisk(self._scratch, tensor)
        return _InHost(tensor)


def offload_activations(model: nn.Module, to: Place = "disk", folder: str | Path | None = None) -> OffloadActivations:
    """A context in which what autograd keeps of `model`'s computations lies in the host's memory, or on disk.

    to: "cpu" for a model on a GPU; "disk" for a scratch file in `folder` (default: the system's for temporary files),
    which has no name where the system allows that, and is gone when the context and its graphs are, or the process.
    Weights stay where they are, as does what has less than 64 KiB. A full disk is a `WriteError` in the forward pass
    that names the folder. Raises ValueError for "cpu" where the model is not on a GPU.

    Example: ``with offload_activations(model): model(ids, labels=ids).loss.backward()``
    """
    if to not in get_args(Place):
        raise ValueError(f"offload_activations: to: expected one of {', '.join(get_args(Place))}, got {to!r}")
    return OffloadActivations(model, to, None if folder is None else Path(folder))


def _unpack(packed: Any) -> Tensor:
    found: Tensor = packed.tensor()
    return found


class _Kept:
    """A tensor that stays. It may not be written to meanwhile: torch looks at that only where there are no hooks."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def tensor(self) -> Tensor:
        if self._tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self._tensor.type()} {list(self._tensor.shape)}] is at version {self._tensor._version}; expected "
                f"version {self._version} instead."
            )
        return self._tensor


class _InHost:
    """A copy of a GPU's tensor in pinned memory of the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._device = tensor.device
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._copy.copy_(tensor)

    def tensor(self) -> Tensor:
        return self._copy.to(self._device, non_blocking=True)


class _OnDisk:
    """The bytes of a tensor in the scratch file; its place is free again when nothing asks for it any more."""

    def __init__(self, scratch: _Scratch, tensor: Tensor) -> None:
        self._scratch, self._device, self._dtype, self._shape = scratch, tensor.device, tensor.dtype, tensor.shape
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        self._size = flat.nbytes
        data: Any = flat.view(torch.uint8).numpy()
        self._start = scratch.write(memoryview(data))
        weakref.finalize(self, scratch.free, self._start, self._size)

    def tensor(self) -> Tensor:
        data = torch.empty(self._size, dtype=torch.uint8)
        place: Any = data.numpy()
        self._scratch.read(self._start, memoryview(place))
        return data.view(self._dtype).view(self._shape).to(self._device)


class _Scratch:
    """A file of pieces of memory. It is written to and read from, not mapped: a page of a mapping for which the disk
    has no room ends the process. Threads may use it at once."""

    def __init__(self, folder: Path | None) -> None:
        self._where = str(folder or tempfile.gettempdir())
        with named_write_errors(self._where):
            self._file: Any = tempfile.TemporaryFile(  # noqa: SIM115  # for as long as a graph asks for it
                prefix="fastpeft-activations-", dir=folder, buffering=0
            )
        self._lock = threading.RLock()  # a finalizer may run while this thread holds it
        self._places: dict[int, list[int]] = {}  # places that are free, by their size
        self.size = 0

    def write(self, data: memoryview) -> int:
        """Put bytes where there is room, at the end if nowhere else; returns where that is."""
        with self._lock:
            places = self._places.get(len(data))
            start = places.pop() if places else self.size
            self.size = max(self.size, start + len(data))
            with named_write_errors(self._where):
                self._file.seek(start)
                while data:
                    data = data[self._file.write(data) :]
        return start

    def read(self, start: int, into: memoryview) -> None:
        with self._lock:
            self._file.seek(start)
            while into:
                count = self._file.readinto(into)
                if not count:
                    raise OSError(f"the scratch file of activations in {self._where} ends before what was written")
                into = into[count:]

    def free(self, start: int, size: int) -> None:
        with self._lock:
            self._places.setdefault(size, []).append(start)
