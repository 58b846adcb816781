"""Layers of other quantisers: what their classes share. Their packages are not imported to read them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import peft_kernels
from peft_kernels import Fingerprint, QuantWeight

from ..files.offloaded import brought
from .base import BaseWeight, Saved, Weight, acts_in_calls, relative_error
from .lookups import Lookups
from .nf4 import Quant4bitWeight
from .quantised_rows import quantised_rows


class _Seen:
    """Tensors as they were when something was made of them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._fingerprint = list(tensors), Fingerprint(tensors)
        self._lookups = Lookups()
        # Elements are compared in the CPU's memory. Elsewhere that would wait for the device: versions and places tell.
        self._readable = any(t.is_cpu for t in tensors) or any(t.is_inference() for t in tensors)
        if not self._readable:
            self._versions = [t._version for t in tensors]
            for t in tensors:
                if not t.is_meta:
                    self._lookups.memory_of(t)

    def same(self, tensors: Sequence[Tensor]) -> bool:
        if self._readable:
            return self._fingerprint.same(tensors)
        mine = self._tensors
        return (
            len(mine) == len(tensors) and all(a is b for a, b in zip(mine, tensors, strict=True))
            and [t._version for t in mine] == self._versions and self._lookups.hold()
        )  # fmt: skip


_views: WeakKeyDictionary[nn.Module, tuple[_Seen, QuantWeight]] = WeakKeyDictionary()


def narrowed(scales: Tensor) -> Tensor:
    """Scales as kernels read them: `model.double()` widens those that are buffers, and changes no value."""
    return scales.float() if scales.dtype is torch.float64 else scales


class _Attributes:
    """A module's attributes as its dict of parameters, where others keep a bias as a buffer or a plain attribute."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self._module, name, default)


class ForeignWeight(BaseWeight):
    """A layer of another quantiser, linear in x."""

    @property
    def parameters(self) -> Any:
        return _Attributes(self.module)

    @property
    def shape(self) -> tuple[int, ...]:
        return int(self.module.out_features), int(self.module.in_features)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self.module, "compute_dtype", None) or torch.float32

    def tensors(self) -> list[Tensor]:
        return self.lying()

    def lying(self) -> list[Tensor]:
        """The tensors that hold W, as they lie in the module."""
        return [self.tensor]

    def write(self, w: Tensor, b: Tensor | None) -> float | None:
        if self.refusal is not None:
            raise TypeError(f"the weight of a {type(self.module).__name__} cannot be written: {self.refusal}")
        w = w.detach().to(torch.float32)
        self.store(w)
        self._write_bias(b)
        return relative_error(self.read()[0], w)

    def store(self, w: Tensor) -> None:
        """Quantise W [out_features, in_features] float32 by the owner's package, in the module's own settings."""
        raise TypeError(f"a {type(self.module).__name__} cannot quantise")

    def _write_bias(self, b: Tensor | None) -> None:
        old = self.bias
        if b is None or b is old:
            return
        if old is None:
            raise ValueError("the adapter adds a bias, and the base layer has none to hold it")
        value = b.detach().to(device=old.device, dtype=old.dtype)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        self.module.bias = value

    def save(self) -> Saved:
        return {name: getattr(self.module, name) for name in self.names if name and hasattr(self.module, name)}

    def restore(self, saved: Saved) -> None:
        for name, value in saved.items():
            if getattr(self.module, name) is not value:
                setattr(self.module, name, value)

    def frozen(self) -> Callable[[], Tensor] | None:
        return None if acts_in_calls(self.module) else lambda: self.read()[0].detach()


class CodedWeight(ForeignWeight, Quant4bitWeight):
    """A layer whose codes our kernels read, by a view that is made once of the tensors in the module, and again when
    one of them was replaced, moved or written to."""

    names = ("qweight", "bias")
    refusal: ClassVar[str | None] = None

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        raise NotImplementedError

    @abstractmethod
    def view(self) -> QuantWeight:
        """W as kernels read it, made of what `lying` gives."""

    @property
    def shape(self) -> tuple[int, ...]:
        return ForeignWeight.shape.fget(self)  # type: ignore[attr-defined, no-any-return]

    def quant(self) -> QuantWeight:
        with brought(self.module):
            tensors = self.lying()
            held = _views.get(self.module)
            if held is None or not held[0].same(tensors):
                # the fingerprint first: who writes meanwhile is noticed
                held = _views[self.module] = _Seen(tensors), self.view()
            return held[1]

    def read(self) -> Weight:
        return peft_kernels.dequantize_4bit(self.quant(), dtype=torch.float32), self.bias

    def rows(self, index: slice | Tensor) -> Tensor:
        found = quantised_rows(self.quant(), index)
        return self.read()[0][index] if found is None else found

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module = self.module
        if args or kwargs or acts_in_calls(module):
            return module(x, *args, **kwargs)  # type: ignore[no-any-return]
        compute = self.computes_in or x.dtype
        bias = None if (b := self.bias) is None else b.to(compute)
        return peft_kernels.lora_linear(x.to(compute), self.quant(), bias=bias).to(x.dtype)

    def fast(self) -> Callable[[], Tensor | QuantWeight | None] | None:
        module = self.module
        return lambda: None if acts_in_calls(module) else self.quant()

    def note(self, lookups: Lookups) -> None:
        lookups.refuse()


class DecodedWeight(ForeignWeight):
    """A layer whose weight no format of ours describes: its own forward computes, and W is what `decoded` gives."""

    names = ("qweight", "bias")

    @abstractmethod
    def decoded(self) -> Tensor:
        """W [out_features, in_features] in at least the precision that the owner decodes to."""

    def read(self) -> Weight:
        with brought(self.module):
            return self.decoded().detach().to(torch.float32), self.bias


class OpaqueWeight(DecodedWeight):
    """A layer of which only its forward is known, which is linear in x: W is its answer to the rows of the identity."""

    refusal = "only its package can store a weight in it"
    # W is rounded together with the bias, in the layer's dtype: times this, a power of two, the bias takes fewer of
    # its bits. 1 where the layer quantises its inputs, which would not be the same for large ones.
    factor: ClassVar[float] = 256.0

    def decoded(self) -> Tensor:
        dtype, bias = self.dtype, self.bias
        factor = 1.0 if bias is None else self.factor
        eye = torch.eye(self.shape[1], dtype=dtype, device=self.tensor.device) * factor
        with torch.no_grad(), torch.autocast(eye.device.type, enabled=False):
            y = self.call(eye).float()
            return ((y if bias is None else y - bias.float()) / factor).t()

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(x, *args, **kwargs)  # type: ignore[no-any-return]
