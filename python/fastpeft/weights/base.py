"""Reading and writing the weight of a base layer, whatever stores it.

One class for each way to store it; `find.weight_of(module)` makes the object for a module. It gives the weight as the
law names it: a dense matrix W [out_features, in_features] (an embedding as the matrix that acts on one-hot rows), for
convolutions [out, in / groups, *kernel]. An object holds its module and no tensor, so it stays right when the module
moves or its parameters are replaced.

`save` and `restore` keep the very objects that a module held, so that unmerging restores the exact bytes and any
sharing of a Parameter with another module. `write` always installs new objects for the same reason: a weight that is
tied to another layer must not change there.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import QuantWeight

from ..files.offloaded import brought, device_of
from ..files.whole import is_unit
from .lookups import Lookups

Weight = tuple[Tensor, "Tensor | None"]
Saved = dict[str, Any]  # what `BaseWeight.save` gives

TILE = 1 << 22  # elements of W that are decoded at a time


def widened(values: Tensor) -> Tensor:
    return values.to(wide(values.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to merge in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class LayerInfo:
    """Description of the layer that a method adapts.

    kind: "linear", "embedding", "conv1d", "conv2d", "conv3d", "norm" or "experts" (E matrices in one
    parameter, [E, out_features, in_features]). transient: the module reads the weight itself, so that only `merged`
    acts and inputs are never seen (MultiheadAttention, `target_parameters`). shape: of W as the law names it. dtype: of
    the layer's arithmetic (a quantised layer's compute dtype). times: how often PEFT's LoRA adds its update here (twice
    in an attention's out_proj). base: the weight itself, for initialisations that read it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    in_features: int
    out_features: int
    has_bias: bool
    dtype: torch.dtype
    device: torch.device
    base: BaseWeight
    groups: int = 1
    quantized: str | None = None
    transient: bool = False
    times: int = 1

    @property
    def module(self) -> nn.Module:
        """The base layer, for the shapes of convolutions."""
        return self.base.module  # type: ignore[no-any-return]

    def weight(self) -> Tensor:
        """W, detached, in at least float32. May be on the meta device."""
        return widened(self.base.read()[0].detach())


class Wrapping(nn.Module):
    """A module that computes with the weight of another, which it changes: an adapter layer, as weights see it."""

    base_layer: nn.Module

    @abstractmethod
    def current_weight(self) -> Weight:
        """W and b with which the module computes now, in the base weight's own dtype."""


def innermost(module: nn.Module) -> nn.Module:
    """The module below any adapter layers."""
    while isinstance(module, Wrapping):
        module = module.base_layer
    return module


class BaseWeight:
    """The weight of one module: the interface, and what dense ones share."""

    modules: ClassVar[type[nn.Module] | tuple[str, str]]  # their class, or its name and its package's: see `has_base`
    kind: str = "linear"
    label: str = "Linear"  # as in PEFT's `lora.Linear`
    quantized: ClassVar[str | None] = None  # PEFT's name of the backend
    fan_in_fan_out: ClassVar[bool] = False  # the module stores W transposed
    refusal: ClassVar[str | None] = None  # the reason why nothing can be merged into it
    transient: ClassVar[bool] = False  # the module reads the weight itself: see read_by_module.py
    times: ClassVar[int] = 1  # as in LayerInfo
    attributes: ClassVar[frozenset[str]] = frozenset()  # of the module, that code asks the adapter layer for
    names: tuple[str, str | None] = ("weight", "bias")  # of the parameters that hold W and b
    parallel: ClassVar[str] = ""  # processes compute parts of it, by "tensor" parallelism or "megatron": see split.py

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """True for a module that stores its weight in this way."""
        of = cls.modules
        return isinstance(module, of) if isinstance(of, type) else has_base(module, *of)

    def of(self, module: nn.Module) -> BaseWeight:
        """The same weight of another module, which took this one's place or wraps it."""
        other = copy.copy(self)
        other.module = module
        return other

    def info(self, name: str = "") -> LayerInfo:
        shape = self.shape
        out_features, in_features = self.features(shape)
        return LayerInfo(
            name=name, kind=self.kind, shape=shape, in_features=in_features, out_features=out_features,
            has_bias=self._bias is not None, dtype=self.dtype, device=device_of(self.holder, self.tensor), base=self,
            groups=1 if self.transient else int(getattr(self.module, "groups", 1)),
            quantized=self.quantized, transient=self.transient, times=self.times,
        )  # fmt: skip

    @property
    def holder(self) -> Any:
        """The module that has the parameters."""
        return self.module

    @property
    def tensor(self) -> Tensor:
        """W as the module holds it."""
        return getattr(self.holder, self.names[0])  # type: ignore[no-any-return]

    @property
    def _bias(self) -> Tensor | None:
        return getattr(self.holder, self.names[1], None) if self.names[1] else None

    @property
    def bias(self) -> Tensor | None:
        if (b := self._bias) is None or not b.is_meta:
            return b
        with brought(self.holder):
            return self._bias

    @property
    def transposed(self) -> bool:
        """True where a matrix W is the transpose of the module's tensor."""
        return self.fan_in_fan_out or self.kind == "embedding"

    def turned(self, w: Tensor) -> Tensor:
        """The module's tensor as W, and W as the module's tensor."""
        return w.t() if self.transposed else w

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.turned(self.tensor).shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def computes_in(self) -> torch.dtype | None:
        """The dtype that a quantised layer computes in whatever x has; None for that of x."""
        return getattr(self.module, "compute_dtype", None) if self.quantized else None

    def features(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """out_features and in_features of a W of this shape."""
        return shape[-2], shape[-1]

    def check(self) -> None:
        """Raise ValueError for a module of this class that no adapter can serve."""

    def read(self) -> Weight:
        """W and b, in the dtype that the module stores (quantised: decoded to at least float32). May alias."""
        with brought(self.holder):
            return self.turned(self.tensor), self._bias

    def tensors(self) -> list[Tensor]:
        """Tensors that W is stored in, and maybe others: W is as it was while they are."""
        stores = self.holder._parameters, self.holder._buffers, vars(self.holder)
        return [t for store in stores for t in store.values() if isinstance(t, Tensor)]

    def rows(self, index: slice | Tensor) -> Tensor:
        """Some rows of W as [rows, columns], in at least float32, without decoding the others."""
        return widened(self.read()[0][index]).flatten(1)

    def tiles(self) -> list[slice]:
        """Rows to read together, so that what needs all of W (norms, products) never holds a dense copy of it."""
        n, *others = self.shape
        step = max(1, TILE // max(1, math.prod(others)))
        return [slice(i, i + step) for i in range(0, n, step)]

    def write(self, w: Tensor, b: Tensor | None) -> float | None:
        """Store W and b in the module's own format and dtype. Returns the relative error of requantising, if any."""
        self._write_bias(b)
        install(self.holder, self.names[0], self.turned(w))
        return None

    def _write_bias(self, b: Tensor | None) -> None:
        if b is None or b is self.bias:
            return
        if self.bias is None or self.names[1] is None:
            raise ValueError("the adapter adds a bias, and the base layer has none to hold it")
        install(self.holder, self.names[1], b)

    def save(self) -> Saved:
        """The objects that hold the weight, to be restored later."""
        return {name: self.holder._parameters.get(name) for name in self.names if name}

    def restore(self, saved: Saved) -> None:
        put_back(self.holder, saved)

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """Output of the module if it had W and b."""
        return F.linear(x, w, b)

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own output."""
        return self.module(x, *args, **kwargs)  # type: ignore[no-any-return]

    def enter(self, x: Tensor) -> Tensor:
        """Input of this process's part of a `parallel` layer."""
        return x

    def leave(self, y: Tensor) -> Any:
        """Output of a `parallel` layer for that of this process's part."""
        return y

    def own(self, tensor: Tensor) -> Tensor:
        """An adapter's tensor as this process computes with it."""
        return tensor

    @property
    def parameters(self) -> Any:
        """The module's parameters by name, as kernels take them."""
        return self.module._parameters

    def attribute(self, name: str) -> Any:
        """The answer of the adapter layer for one of `attributes`."""
        return getattr(self.module, name)

    def parts(self) -> dict[str, BaseWeight]:
        """The weights of modules below that this one's adapters go into as well, by their names in the module."""
        return {}

    def replaced(self, w: Tensor, b: Tensor | None) -> AbstractContextManager[None]:
        """Within this, the module computes with W and b."""
        raise TypeError(f"a {self.label} is called with its weight as it is: only `transient` ones replace it")

    def alone(self) -> AbstractContextManager[Any]:
        """Within this, no other thread has another W in the module."""
        return nullcontext()

    def frozen(self) -> Callable[[], Tensor] | None:
        """A function that reads W of a layer that is not trained and that nothing watches; None for others."""
        weight = self.module._parameters.get("weight")
        trained = weight is not None and weight.requires_grad
        if self.kind == "embedding" or self.transient or trained or has_hooks(self.module):
            return None
        return lambda: self.read()[0].detach()

    def fast(self) -> Callable[[], Tensor | QuantWeight | None] | None:
        """A function that gives the weight as `peft_kernels.lora_linear` takes it, or None while it must not be used
        (trainable, hooked). None in place of the function where it has no such form."""
        return None

    def note(self, lookups: Lookups) -> None:
        """Note what the function that `fast` gave looks at."""
        lookups.refuse()

    def fused(self, call: Callable[..., Tensor | None]) -> Callable[[Tensor], Tensor | None] | None:
        """`call(x, W, bias)` as a function of x alone, with W as `fast` gives it and x in the layer's compute dtype.

        The function returns None while W must not be used; None in its place where it has no such W.
        """
        get_weight, parameters = self.fast(), self.parameters
        compute = self.computes_in
        if get_weight is None:
            return None

        def run(x: Tensor) -> Tensor | None:
            if (w := get_weight()) is None:
                return None
            y = call(x if compute is None else x.to(compute), w, parameters.get("bias"))
            return y if y is None or compute is None else y.to(x.dtype)

        return run


def has_base(module: nn.Module, class_name: str, package: str) -> bool:
    """True if `module` is of a class named so in a package, which is not imported to tell."""
    return any(c.__name__ == class_name and c.__module__.split(".")[0] == package for c in type(module).__mro__)


def is_listened_to(module: nn.Module) -> bool:
    """True if someone listens to this module's calls, which a way around them would not make."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def acts_in_calls(module: nn.Module) -> bool:
    """True if somebody acts in this module's calls, by hooks or by a forward in the place of its class's."""
    return "forward" in module.__dict__ or is_listened_to(module)


def has_hooks(module: nn.Module) -> bool:
    """True for a module that has to be called, since somebody acts in its call: a hook, a forward of its own (those of
    accelerate bring its weight) or FSDP1, which has plain attributes in the places of its parameters."""
    return acts_in_calls(module) or "weight" in vars(module) or is_unit(module)


def install(module: nn.Module, name: str, value: Tensor) -> None:
    """A new Parameter in the place of the old one, whose dtype, device and `requires_grad` it keeps."""
    old = module._parameters[name]
    assert old is not None
    value = value.detach().to(device=old.device, dtype=old.dtype).contiguous()
    module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)


def put_back(module: nn.Module, saved: Saved) -> None:
    """Parameters that a module had, in their places again."""
    for name in saved.keys() & module._parameters.keys():
        parameter, current = saved[name], module._parameters[name]
        place = None if current is None else (current.device, current.dtype)
        if parameter is not None and place not in (None, (parameter.device, parameter.dtype)):
            # The module has moved, or changed its dtype, in between.
            parameter = nn.Parameter(parameter.data.to(current), parameter.requires_grad)
        module._parameters[name] = parameter


def relative_error(stored: Tensor, exact: Tensor) -> float:
    """|stored - exact| / |exact| in the Frobenius norm."""
    norm = float(exact.float().norm())
    return float((stored.float() - exact.float()).norm()) / norm if norm else 0.0
