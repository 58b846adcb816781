"""Experts of a mixture whose parameters are kept in 4 bits, or in blocks of a GGUF file.

A module of experts gets a subclass of its class, which reads each of these parameters as a `Decoded` tensor and has the
state dict keys that bitsandbytes' parametrization gives (`gate_up_proj`, `gate_up_proj.absmax`, ...). Its forward stays
transformers' own, decoding, or `accelerate`'s, which takes the 4 bits.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight, quantize_4bit

from .bnb_keys import DTYPES, as_modules, bnb_state, parse_bnb_state
from .nf4_store import NF4Store
from .parameters_4bit import CHILD, Decoded, packed_of
from .read_by_module import TAKES_FACTORS

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


def is_experts(cls: type[nn.Module]) -> bool:
    """True of a class that transformers' `use_experts_implementation` marked."""
    return hasattr(cls, "_apply_gate") and hasattr(cls.forward, "__wrapped__")


class NF4Parameter(NF4Store):
    """A parameter of the module above in 4 bits, in its own layout. It reads as a tensor of the dtype that the model
    has: `.to(dtype)` changes that alone."""

    def __init__(self, weight: QuantWeight) -> None:
        super().__init__()
        self.set_quant_weight(weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        self.__dict__.pop("_quant_weight", None)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        nested = ", nested" if self.nested else ""
        return f"{list(self.shape)}, {self.dtype}, {self.quant_type}, blocksize={self.blocksize}{nested}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        name = prefix.removesuffix(f"{CHILD}.")
        weight = self.quant_weight()
        known = weight if weight.dtype in DTYPES.values() else replace(weight, dtype=torch.float32)
        destination[name] = self.weight if keep_vars else self.weight.detach()
        if not self.is_bnb:
            self.save_parts(destination, f"{name}.")
            return
        destination.update({name + key.removeprefix("weight"): value for key, value in bnb_state(known).items()})

    def _load_from_state_dict(self, *_: Any) -> None:
        """The module above loads it: torch shows this one keys of its own name alone."""

    def load(self, state: dict[str, Tensor], where: str, assign: bool) -> None:
        """Take a weight from bitsandbytes' keys (`weight`, `weight.absmax`, ...). ValueError where they do not fit."""
        if not self.is_bnb:
            self.load_parts({key.removeprefix("weight."): value for key, value in state.items()}, "", assign)
            return
        weight = parse_bnb_state(state, where, sizes=3)
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"size mismatch for {where}: a 4-bit weight of {tuple(weight.shape)}, here {self.shape}")
        self.load_quant_weight(replace(weight, dtype=self.dtype), assign or self.weight.is_meta)


class NF4Experts:
    """Of the modules that keep parameters in 4 bits: first among their class's bases, their own class the second."""

    _modules: dict[str, Any]

    # As in NF4Linear, for torch.distributed.checkpoint, which takes keys of a state dict for names of modules.
    def _fqn_modifiers(self) -> dict[str, str]:
        return {name: "keys_as_modules" for name in PARAMETERS if name + CHILD in self._modules}

    @property
    def keys_as_modules(self) -> nn.Module:
        """The state dict of what is kept in 4 bits, as modules with buffers."""
        state: dict[str, Any] = {}
        for name in PARAMETERS:
            if name + CHILD in self._modules:
                self._modules[name + CHILD]._save_to_state_dict(state, f"{name}{CHILD}.", False)
        return as_modules(state)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        children: Any = super().named_children()  # type: ignore[misc]
        shown = torch.distributed.is_available() and torch.distributed.is_initialized()
        for name, module in children:
            if not shown or not isinstance(module, NF4Parameter):
                yield name, module
        if shown:
            yield "keys_as_modules", self.keys_as_modules

    def children(self) -> Iterator[nn.Module]:
        return (module for module in dict.fromkeys(self._modules.values()) if module is not None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        rest = dict(state_dict)
        for name in PARAMETERS:
            if name + CHILD not in self._modules:
                continue
            whole = prefix + name
            own = [key for key in rest if key == whole or key.startswith(f"{whole}.")]
            state = {"weight" + key.removeprefix(whole): rest.pop(key) for key in own}
            if "weight" not in state:
                missing_keys.append(whole)
                continue
            try:
                assign = local_metadata.get("assign_to_params_buffers", False)
                self._modules[name + CHILD].load(state, whole, assign)
            except (ValueError, TypeError) as error:
                error_msgs.append(str(error))
        load: Any = super()._load_from_state_dict  # type: ignore[misc]
        load(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


class _Made(type):
    """The type of the classes that `experts_class` makes, which no module has by name: pickled as what they are of."""


def _reader(name: str) -> property:
    def read(self: Any) -> Any:
        # a dense tensor in its place: of experts that keep others in 4 bits, or put there for a call
        dense = self._parameters.get(name)
        if dense is not None:
            return dense
        packed = packed_of(self, name)
        if packed is None:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return Decoded(packed.quant())

    return property(read)


@cache
def experts_class(base: type) -> type:
    """The subclass of a class of experts that reads parameters in 4 bits."""
    members = {name: _reader(name) for name in PARAMETERS} | {"__module__": base.__module__}
    return _Made(f"NF4{base.__name__}", (NF4Experts, base), members)


def _reduced(cls: type) -> Any:
    own = cls.__bases__[0] is NF4Experts
    return (experts_class, (cls.__bases__[1],)) if own else cls.__qualname__


copyreg.pickle(_Made, _reduced)  # type: ignore[arg-type]


def dense_parameters(module: nn.Module) -> list[str]:
    """The parameters of a module of experts that could be kept in 4 bits: dense tensors of all experts."""
    if not is_experts(type(module)):
        return []
    held = ((name, module._parameters.get(name)) for name in PARAMETERS)
    return [name for name, p in held if type(p) in (Tensor, nn.Parameter) and p.dim() == 3 and p.is_floating_point()]  # type: ignore[union-attr]


def why_not_packed(name: str, parameter: Tensor, blocksize: int) -> str | None:
    """The reason why a parameter of experts cannot be kept in 4 bits."""
    size = parameter[0].numel() if parameter.shape[0] else 0
    if size % blocksize == 0 and size % 2 == 0:
        return None
    return (f"{name} has {list(parameter.shape[1:])} = {size} elements of an expert, which are no multiple of the "
            f"blocksize {blocksize}: name a smaller one, or leave the module out by `skip`")  # fmt: skip


def pack(module: nn.Module, name: str, quant_type: str, blocksize: int, nested: bool) -> None:
    """Keep a dense parameter of experts in 4 bits."""
    parameters: dict[str, Any] = module._parameters
    dense = parameters[name].detach()
    hold(module, name, quantize_4bit(dense.contiguous(), quant_type, blocksize, nested))


def hold(module: nn.Module, name: str, weight: QuantWeight) -> None:
    """Keep a quantised weight in the place of a dense parameter of experts."""
    parameters: dict[str, Any] = module._parameters
    parameters[name] = None
    module._modules[name + CHILD] = NF4Parameter(weight).train(module.training)
    if not isinstance(module, NF4Experts):
        cls: Any = type(module)
        module.__class__ = experts_class(cls)


def unpack(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Make all that a module of experts keeps in 4 bits dense again, and its class the one that it had."""
    for name in PARAMETERS:
        store: Any = module._modules.pop(name + CHILD, None)
        if store is not None:
            weight = store.quant_weight()
            dense = Decoded(replace(weight, dtype=dtype or weight.dtype)).dense()
            module._parameters[name] = nn.Parameter(dense, requires_grad=False)
    module.__class__ = type(module).__bases__[1]


def nests(parameter: Tensor, blocksize: int) -> bool:
    """True where each expert has whole blocks of scales, which kernels need to take the experts apart."""
    return parameter[0].numel() % (blocksize * 256) == 0


def packed_parameters(model: nn.Module) -> dict[str, NF4Parameter]:
    """The parameters of experts in 4 bits, by the paths that they have dense."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, NF4Parameter)}
    return {name.removesuffix(CHILD): module for name, module in found.items()}


def is_accelerated(module: nn.Module) -> bool:
    return bool(getattr(type(module), TAKES_FACTORS, False))
