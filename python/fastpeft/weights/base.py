"""Reading and writing the weight of a base layer, whatever stores it.

One class per kind of storage, found by `weight_of(module)`. Each gives the weight as the law names it: a dense matrix
W [out_features, in_features] (an embedding as the matrix that acts on one-hot rows), for convolutions
[out, in / groups, *kernel]. The classes hold no state; a layer keeps only the class.

`take` and `put_back` keep the very objects that a module held, so that unmerging restores the exact bytes and any
sharing of a Parameter with another module. `write` always installs new objects for the same reason: a weight that is
tied to another layer must not change there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels
from peft_kernels import QuantWeight

from ..method import LayerInfo
from .rows import WeightRows, quant_rows
from .rows import wide as wide

Weight = tuple[Tensor, "Tensor | None"]
Part = tuple[str, nn.Module, str, nn.Module, "type[BaseWeight] | None"]


def _has_base(module: nn.Module, class_name: str, package: str) -> bool:
    """Whether `module` is of a class named so in a package, without importing that package."""
    return any(c.__name__ == class_name and c.__module__.split(".")[0] == package for c in type(module).__mro__)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


class BaseWeight(WeightRows):
    """Interface, and what the dense kinds share."""

    kind: ClassVar[str] = "linear"
    label: ClassVar[str] = "Linear"  # as in PEFT's `lora.Linear`
    quantized: ClassVar[str | None] = None  # PEFT's name of the backend
    fan_in_fan_out: ClassVar[bool] = False  # whether the module stores W transposed
    transient: ClassVar[bool] = False  # whether the module reads the weight itself: see read_by_module.py
    attributes: ClassVar[frozenset[str]] = frozenset()  # of the module, that code asks the adapter layer for

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        raise NotImplementedError

    @classmethod
    def info(cls, module: nn.Module, name: str = "") -> LayerInfo:
        shape = cls.shape(module)
        return LayerInfo(
            name=name, kind=cls.kind, shape=shape, in_features=cls.in_features(module, shape), out_features=shape[0],
            has_bias=getattr(module, "bias", None) is not None, dtype=cls.dtype(module),
            device=module.weight.device, module=module, groups=int(getattr(module, "groups", 1)),  # type: ignore[arg-type]
            quantized=cls.quantized,
        )  # fmt: skip

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, ...]:
        return tuple(module.weight.shape)  # type: ignore[arg-type]

    @classmethod
    def in_features(cls, module: nn.Module, shape: tuple[int, ...]) -> int:
        return shape[1]

    @classmethod
    def dtype(cls, module: nn.Module) -> torch.dtype:
        return module.weight.dtype  # type: ignore[return-value]

    @classmethod
    def check(cls, module: nn.Module) -> None:
        """Raise ValueError for a module of this kind that no adapter can serve."""

    @classmethod
    def read(cls, module: nn.Module) -> Weight:
        """W and b, in the dtype that the module stores (quantised: decoded to at least float32). May alias."""
        return module.weight, getattr(module, "bias", None)  # type: ignore[return-value]

    @classmethod
    def write(cls, module: nn.Module, w: Tensor, b: Tensor | None) -> float | None:
        """Store W and b in the module's own format and dtype. Returns the relative error of requantising, if any."""
        install(module, "weight", w)
        cls._write_bias(module, b)
        return None

    @classmethod
    def _write_bias(cls, module: nn.Module, b: Tensor | None) -> None:
        old = getattr(module, "bias", None)
        if b is None:
            return
        if old is None:
            raise ValueError("the adapter adds a bias, and the base layer has none to hold it")
        if b is not old:
            install(module, "bias", b)

    @classmethod
    def take(cls, module: nn.Module) -> dict[str, Any]:
        """The objects that hold the weight, to be put back later."""
        return {name: module._parameters.get(name) for name in ("weight", "bias")}

    @classmethod
    def put_back(cls, module: nn.Module, taken: dict[str, Any]) -> None:
        for name, parameter in taken.items():
            if name not in module._parameters:
                continue
            current = module._parameters[name]
            # The module may have moved, or changed its dtype, in between.
            if parameter is not None and current is not None and not _alike(parameter, current):
                parameter = nn.Parameter(parameter.data.to(current), parameter.requires_grad)
            module._parameters[name] = parameter

    @classmethod
    def apply(cls, module: nn.Module, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """What the module would compute with W and b."""
        return F.linear(x, w, b)

    @classmethod
    def call(cls, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own output."""
        return module(x, *args, **kwargs)  # type: ignore[no-any-return]

    @classmethod
    def attribute(cls, module: nn.Module, name: str) -> Any:
        """The answer of the adapter layer for one of `attributes`."""
        return getattr(module, name)

    @classmethod
    def parts(cls, module: nn.Module) -> Iterator[Part]:
        """(path, parent, name, module, kind) of modules below `module` that this layer's adapters go into as well."""
        return iter(())

    @classmethod
    def replaced(cls, module: nn.Module, w: Tensor, b: Tensor | None) -> AbstractContextManager[None]:
        """Within this, the module computes with W and b. Only `transient` kinds need it."""
        raise NotImplementedError

    @classmethod
    def frozen(cls, module: nn.Module) -> Callable[[], Tensor] | None:
        """A function that reads W of a layer that is not trained and that nothing watches; None for others."""
        weight = module._parameters.get("weight")
        trained = weight is not None and weight.requires_grad
        if cls.kind == "embedding" or cls.transient or trained or _has_hooks(module):
            return None
        return lambda: cls.read(module)[0].detach()

    @classmethod
    def fast(cls, module: nn.Module) -> Callable[[], Tensor | QuantWeight | None] | None:
        """A function that gives the weight as `peft_kernels.lora_linear` takes it, or None while it must not be used
        (trainable, hooked). None in place of the function where the kind has no such form."""
        return None


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype


def install(module: nn.Module, name: str, value: Tensor) -> None:
    """A new Parameter in the place of the old one, whose dtype, device and `requires_grad` it keeps."""
    old = module._parameters[name]
    assert old is not None
    value = value.detach().to(device=old.device, dtype=old.dtype).contiguous()
    module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)


class LinearWeight(BaseWeight):
    """nn.Linear and subclasses of it that store a plain weight."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    @classmethod
    def frozen(cls, module: nn.Module) -> Callable[[], Tensor] | None:
        return super().frozen(module) if type(module).forward is nn.Linear.forward else None

    @classmethod
    def fast(cls, module: nn.Module) -> Callable[[], Tensor | QuantWeight | None] | None:
        if type(module).forward is not nn.Linear.forward:
            return None
        parameters, hooks, pre = module._parameters, module._forward_hooks, module._forward_pre_hooks
        backward = module._backward_hooks

        def weight() -> Tensor | None:
            w = parameters.get("weight")
            return None if w is None or w.requires_grad or hooks or pre or backward else w

        return weight


class Conv1DWeight(BaseWeight):
    """transformers' Conv1D (GPT-2): a linear layer that stores W transposed."""

    fan_in_fan_out = True

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return _has_base(module, "Conv1D", "transformers")

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, ...]:
        return tuple(reversed(module.weight.shape))  # type: ignore[arg-type]

    @classmethod
    def read(cls, module: nn.Module) -> Weight:
        return module.weight.t(), module.bias  # type: ignore[operator, return-value]

    @classmethod
    def write(cls, module: nn.Module, w: Tensor, b: Tensor | None) -> float | None:
        return super().write(module, w.t(), b)


class EmbeddingWeight(BaseWeight):
    """nn.Embedding, as the linear layer that acts on one-hot rows: W = weight^T."""

    kind = "embedding"
    label = "Embedding"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    @classmethod
    def check(cls, module: nn.Module) -> None:
        if module.max_norm is not None:
            raise ValueError("Embedding(max_norm=...) changes its weight in every forward: no adapter of it can merge")

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, ...]:
        return tuple(reversed(module.weight.shape))  # type: ignore[arg-type]

    @classmethod
    def read(cls, module: nn.Module) -> Weight:
        return module.weight.t(), None  # type: ignore[operator]

    @classmethod
    def write(cls, module: nn.Module, w: Tensor, b: Tensor | None) -> float | None:
        return super().write(module, w.t(), b)

    @classmethod
    def apply(cls, module: nn.Module, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return cls.scaled(module, F.embedding(x, w.t(), padding_idx=module.padding_idx))  # type: ignore[arg-type]

    @classmethod
    def scaled(cls, module: nn.Module, y: Tensor) -> Tensor:
        """Rows as the module gives them out: Gemma multiplies those that it looks up."""
        scale = getattr(module, "embed_scale", None)
        return y if scale is None else y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


class ConvWeight(BaseWeight):
    """nn.Conv1d, Conv2d and Conv3d, grouped or not, with any padding mode."""

    types: ClassVar[type[nn.Module]]

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, cls.types) and not getattr(module, "transposed", False)

    @classmethod
    def in_features(cls, module: nn.Module, shape: tuple[int, ...]) -> int:
        return int(module.in_channels)  # type: ignore[arg-type]

    @classmethod
    def apply(cls, module: nn.Module, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return module._conv_forward(x, w, b)  # type: ignore[operator, no-any-return]


class Conv1dWeight(ConvWeight):
    kind, label, types = "conv1d", "Conv1d", nn.Conv1d


class Conv2dWeight(ConvWeight):
    kind, label, types = "conv2d", "Conv2d", nn.Conv2d


class Conv3dWeight(ConvWeight):
    kind, label, types = "conv3d", "Conv3d", nn.Conv3d


class Quant4bitWeight(BaseWeight):
    """A linear layer with the protocol `quant_weight()` and `set_quant_weight(qw)`: fastpeft's NF4Linear."""

    label = "NF4Linear"
    quantized = "nf4"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return hasattr(module, "quant_weight") and hasattr(module, "set_quant_weight")

    @classmethod
    def quant(cls, module: nn.Module) -> QuantWeight:
        return module.quant_weight()  # type: ignore[operator, no-any-return]

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, ...]:
        return tuple(cls.quant(module).shape)

    @classmethod
    def dtype(cls, module: nn.Module) -> torch.dtype:
        return getattr(module, "compute_dtype", None) or cls.quant(module).dtype

    @classmethod
    def read(cls, module: nn.Module) -> Weight:
        qw = cls.quant(module)
        return peft_kernels.dequantize_4bit(qw, dtype=torch.float32), module.bias  # type: ignore[return-value]

    @classmethod
    def rows(cls, module: nn.Module, index: slice | Tensor) -> Tensor:
        found = quant_rows(cls.quant(module), index)
        return super().rows(module, index) if found is None else found

    @classmethod
    def write(cls, module: nn.Module, w: Tensor, b: Tensor | None) -> float | None:
        old = cls.quant(module)
        w = w.detach().to(torch.float32)
        new = peft_kernels.quantize_4bit(
            w, quant_type=old.quant_type, blocksize=old.blocksize, nested=old.nested,
            nested_blocksize=old.nested_blocksize,
        )  # fmt: skip
        cls._set(module, replace(new, dtype=old.dtype))
        cls._write_bias(module, b)
        return relative_error(cls.read(module)[0], w)

    @classmethod
    def _set(cls, module: nn.Module, qw: QuantWeight) -> None:
        module.set_quant_weight(qw)  # type: ignore[operator]

    @classmethod
    def take(cls, module: nn.Module) -> dict[str, Any]:
        # `set_quant_weight` replaces the tensors and never writes into them, so these stay what they are.
        return {"weight": cls.quant(module), "bias": module._parameters.get("bias")}

    @classmethod
    def put_back(cls, module: nn.Module, taken: dict[str, Any]) -> None:
        cls._set(module, taken["weight"].to(cls.quant(module).device))
        BaseWeight.put_back(module, {"bias": taken["bias"]})

    @classmethod
    def fast(cls, module: nn.Module) -> Callable[[], Tensor | QuantWeight | None] | None:
        hooks, pre = module._forward_hooks, module._forward_pre_hooks
        tensors: Any = module._parameters if "weight" in module._parameters else module._buffers  # sharded: parameters
        held, qw = tensors.get("weight"), cls.quant(module)

        def weight() -> QuantWeight | None:
            nonlocal held, qw
            if tensors.get("weight") is not held:
                held, qw = tensors.get("weight"), cls.quant(module)
            return None if hooks or pre else qw

        return weight


def relative_error(stored: Tensor, exact: Tensor) -> float:
    """|stored - exact| / |exact| in the Frobenius norm."""
    norm = float(exact.float().norm())
    return float((stored.float() - exact.float()).norm()) / norm if norm else 0.0


def kinds() -> list[type[BaseWeight]]:
    """Every kind, the more special ones first."""
    from .bnb import Bnb4bitWeight, Bnb8bitWeight
    from .norms import NormWeight
    from .read_by_module import AttentionWeight

    return [Quant4bitWeight, Bnb4bitWeight, Bnb8bitWeight, Conv1DWeight, EmbeddingWeight, Conv1dWeight, Conv2dWeight,
            Conv3dWeight, AttentionWeight, LinearWeight, NormWeight]  # fmt: skip


def weight_of(module: nn.Module) -> type[BaseWeight] | None:
    """The kind of a module's weight, or None if no adapter can act on it."""
    return next((kind for kind in kinds() if kind.accepts(module)), None)


def weight_in(info: LayerInfo) -> Tensor:
    """A layer's W, detached, in at least float32: for initialisations that read it. May be on the meta device."""
    kind = weight_of(info.module)
    if kind is None:
        raise ValueError(f"{info.name!r} has no weight of its own to start an adapter from")
    w = kind.read(info.module)[0].detach()
    return w.to(wide(w.dtype))
