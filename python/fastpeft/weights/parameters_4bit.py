"""Parameters of a module that are kept in 4 bits: 3-D ones, such as the experts of a mixture, as it reads them.

Two forms of it: ours (`nf4_experts.py`) and bitsandbytes' (`bitsandbytes.nn.parametrize`). `packed_of` finds either.
Bytes and scales are those of the parameter as it lies in its module.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from peft_kernels import QuantWeight, dequantize_4bit, quantize_4bit
from peft_kernels.formats import QUANT_TYPES, decode_absmax

from .bnb import is_view
from .nf4_store import NF4Store
from .quantised_rows import quantised_rows, requantised, size_of_one

CHILD = "_4bit"  # after the parameter's name: that of the module below that keeps its bytes, in our form


class Decoded(Tensor):
    """A 4-bit weight [E, ...] as the dense tensor that it stands for, which holds the 4 bits.

    W[e] decodes one matrix, every other operation all of them: code that goes from expert to expert, as transformers'
    eager forward does, has one dense matrix at a time.
    """

    weight: QuantWeight
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, weight: QuantWeight) -> Decoded:
        shape, dtype = weight.shape, weight.dtype
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=weight.device)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, weight: QuantWeight) -> None:
        self.weight = weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Decoded({self.weight.quant_type}, {tuple(self.shape)}, {self.dtype})"

    def dense(self) -> Tensor:
        return dequantize_4bit(self.weight, self.dtype)

    def _matrix(self, e: int) -> Tensor:
        e %= len(self)
        found = quantised_rows(self.weight, slice(e, e + 1))
        return self.dense()[e] if found is None else found[0].to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        aten = torch.ops.aten
        if func is aten.select.int and args[1] == 0:
            return args[0]._matrix(int(args[2]))
        if func is aten.detach.default:
            return cls(args[0].weight)
        args, kwargs = tree_map(lambda t: t.dense() if isinstance(t, cls) else t, (args, kwargs or {}))
        return func(*args, **kwargs)


class Packed:
    """Our form: a child of the module holds the bytes, and the module's class reads them."""

    label = "nf4"

    def __init__(self, module: nn.Module, name: str, store: Any) -> None:
        self.module, self.name, self.store = module, name, store

    @property
    def counted(self) -> int:
        """Elements of what holds the bytes that is a parameter itself."""
        return 0

    def quant(self) -> QuantWeight:
        return self.store.quant_weight()  # type: ignore[no-any-return]

    def save(self) -> Any:
        return self.quant()

    def restore(self, saved: Any) -> None:
        # the module may have moved, or changed its dtype, in between
        self.store.set_quant_weight(replace(saved.to(self.quant().device), dtype=self.quant().dtype))

    def write(self, w: Tensor) -> None:
        like, w = self.quant(), w.to(torch.float32).contiguous()
        if like.quant_type in QUANT_TYPES:
            new = quantize_4bit(w, like.quant_type, like.blocksize, like.nested, like.nested_blocksize)
        else:
            new = requantised(w, like)
        self.store.set_quant_weight(replace(new.to(like.device), dtype=like.dtype))

    @contextmanager
    def replaced(self, w: Tensor) -> Iterator[None]:
        """Within this, the module reads a dense tensor."""
        parameters: dict[str, Any] = self.module._parameters
        parameters[self.name] = w
        try:
            yield
        finally:
            parameters[self.name] = None


class BnbPacked(Packed):
    """bitsandbytes' form: a parametrization of torch's decodes the bytes, whole, at each look."""

    label = "bnb 4bit"

    @property
    def counted(self) -> int:
        return self.store._parameters["original"].numel()  # type: ignore[no-any-return]

    def quant(self) -> QuantWeight:
        original, state = self.save()
        held = _views.get(self.store)
        if held is None or held[0]() is not original or held[1] is not state or not is_view(held[2], original, state):
            _views[self.store] = held = ref(original), state, QuantWeight.from_bnb(original, state)
        return held[2]

    def save(self) -> Any:
        return self.store._parameters["original"], self.store[0].quant_state

    def restore(self, saved: Any) -> None:
        original, state = saved
        device = self.store._parameters["original"].device
        if original.device != device:  # the module has moved in between
            original = nn.Parameter(original.data.to(device), requires_grad=False)
            state.to(device)
        self.store._parameters["original"], self.store[0].quant_state = original, state

    def write(self, w: Tensor) -> None:
        bnb: Any = importlib.import_module("bitsandbytes")
        original, state = self.save()
        packed, new = bnb.functional.quantize_4bit(
            w.detach().to("cpu", state.dtype).contiguous(), blocksize=state.blocksize,
            compress_statistics=bool(state.nested), quant_type=state.quant_type, quant_storage=original.dtype,
        )  # fmt: skip
        new.to(original.device)
        self.store._parameters["original"] = nn.Parameter(packed.to(original.device), requires_grad=False)
        self.store[0].quant_state = new

    @contextmanager
    def replaced(self, w: Tensor) -> Iterator[None]:
        stores: Any = self.module._modules["parametrizations"]
        stores._modules[self.name] = _Given(w)
        try:
            yield
        finally:
            stores._modules[self.name] = self.store


_views: WeakKeyDictionary[nn.Module, tuple[Any, Any, QuantWeight]] = WeakKeyDictionary()


class _Given(nn.Module):
    """A tensor in the place of a parametrization, which gives what its module reads."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.held = (tensor,)  # no parameter of this

    def forward(self) -> Tensor:
        return self.held[0]


def packed_of(module: nn.Module, name: str) -> Packed | None:
    """The 4-bit form of a module's parameter; None for a dense one, and while a dense tensor is in its place."""
    modules: dict[str, Any] = module._modules
    own = modules.get(name + CHILD)
    if own is not None:
        return Packed(module, name, own) if isinstance(own, NF4Store) and module._parameters.get(name) is None else None
    stores = modules.get("parametrizations")
    store = None if stores is None else stores._modules.get(name)
    return BnbPacked(module, name, store) if store is not None and _is_bnb(store) else None


def _is_bnb(store: Any) -> bool:
    """True of a list of parametrizations that is bitsandbytes' alone: another's beside would change what is read."""
    if isinstance(store, _Given) or len(store) != 1:
        return False
    cls = type(store[0])
    return cls.__name__ == "Bnb4bitParametrization" and cls.__module__.startswith("bitsandbytes.")


def quant_of(module: nn.Module, name: str) -> QuantWeight | None:
    """The bytes of a module's parameter that is kept in 4 bits, as kernels read them; None for a dense one.

    Kernels go to a matrix of several by its scales. Where scales are quantised themselves and two matrices share a
    block of them, they are kept decoded beside the bytes.
    """
    packed = packed_of(module, name)
    if packed is None:
        return None
    weight = packed.quant()
    if weight.nested_absmax is None or not size_of_one(weight) % (weight.blocksize * weight.nested_blocksize):
        return weight
    plain = _plain.get(weight)
    if plain is None:
        assert weight.absmax is not None
        scales = decode_absmax(weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset,
                               weight.nested_blocksize)  # fmt: skip
        plain = _plain[weight] = replace(weight, absmax=scales, nested_absmax=None, nested_code=None, offset=None)
    return plain


_plain: WeakKeyDictionary[QuantWeight, QuantWeight] = WeakKeyDictionary()


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own parameters by name, those in 4 bits as `Decoded` tensors."""
    packed = {one.name: Decoded(one.quant()) for one in packed_in(module)}
    return {**module._parameters, **packed}


def packed_in(module: nn.Module) -> list[Packed]:
    """A module's own parameters that are kept in 4 bits."""
    stores: Any = module._modules.get("parametrizations")
    names = [*module._parameters, *(() if stores is None else stores._modules)]
    found = (packed_of(module, name) for name in names)
    return [packed for packed in found if packed is not None]
