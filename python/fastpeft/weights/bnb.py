"""bitsandbytes' quantised layers as base weights. bitsandbytes is imported only to write one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels
from peft_kernels import QuantWeight

from .base import BaseWeight, Quant4bitWeight, Weight, _has_base, _has_hooks, relative_error


class Bnb4bitWeight(Quant4bitWeight):
    """Linear4bit: its bytes are read in place by the kernels.

    bitsandbytes' own forward repacks the bytes for its CPU kernel, with a loss in nested scales, whenever it runs in
    eval mode on a CPU with AVX512-BF16. So the base is computed by `peft_kernels`, which reads the standard layout; a
    layer that was already repacked is converted back once.
    """

    label = "Linear4bit"
    quantized = "bnb 4bit"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return _has_base(module, "Linear4bit", "bitsandbytes")

    @classmethod
    def check(cls, module: nn.Module) -> None:
        if getattr(module.weight, "quant_state", None) is None and module.weight.device.type != "meta":
            raise ValueError("a bitsandbytes Linear4bit that is not quantised: move the model to its device first")

    @classmethod
    def quant(cls, module: nn.Module) -> QuantWeight:
        weight: Any = module.weight
        if weight.quant_state is None:
            weight.quant_state = getattr(module, "quant_state", None)
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            undo_cpu_packing(weight)
        return QuantWeight.from_bnb(weight)

    @classmethod
    def _set(cls, module: nn.Module, qw: QuantWeight) -> None:
        raise NotImplementedError("a Params4bit is written as a whole")

    @classmethod
    def write(cls, module: nn.Module, w: Tensor, b: Tensor | None) -> float | None:
        bnb: Any = importlib.import_module("bitsandbytes")
        old: Any = module.weight
        qw = cls.quant(module)
        w = w.detach().to(torch.float32)
        new = bnb.nn.Params4bit(
            w.to("cpu", qw.dtype), requires_grad=False, blocksize=qw.blocksize, compress_statistics=qw.nested,
            quant_type=qw.quant_type, quant_storage=old.quant_storage, module=module,
        )  # fmt: skip
        _replace_4bit(module, new.to(old.device))
        cls._write_bias(module, b)
        return relative_error(cls.read(module)[0], w)

    @classmethod
    def take(cls, module: nn.Module) -> dict[str, Any]:
        cls.quant(module)  # undoes a repacking, so that what is kept is the standard layout
        return BaseWeight.take(module)

    @classmethod
    def put_back(cls, module: nn.Module, taken: dict[str, Any]) -> None:
        _replace_4bit(module, taken["weight"].to(module.weight.device))
        BaseWeight.put_back(module, {"bias": taken["bias"]})

    @classmethod
    def call(cls, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or _has_hooks(module) or module.weight.requires_grad:
            return module(x, *args, **kwargs)  # type: ignore[no-any-return]
        compute = getattr(module, "compute_dtype", None) or x.dtype
        bias: Any = None if module.bias is None else module.bias.to(compute)
        return peft_kernels.lora_linear(x.to(compute), cls.quant(module), bias=bias).to(x.dtype)

    @classmethod
    def fast(cls, module: nn.Module) -> Callable[[], Tensor | QuantWeight | None] | None:
        parameters, hooks, pre = module._parameters, module._forward_hooks, module._forward_pre_hooks
        held: Any = None
        state: Any = None
        qw: QuantWeight | None = None

        def weight() -> QuantWeight | None:
            nonlocal held, state, qw
            w: Any = parameters.get("weight")
            if w is None or w.requires_grad or hooks or pre:
                return None
            # The state object tells a requantised or repacked weight from the one that was seen last.
            if w is not held or w.quant_state is not state or getattr(state, "packing_format_for_cpu", False):
                qw = cls.quant(module)
                held, state = w, w.quant_state
            return qw

        return weight


def undo_cpu_packing(weight: Any) -> None:
    """Bring a `Params4bit` that bitsandbytes repacked for its CPU kernel back into the standard layout, in place.

    The packing rounded the scales to bfloat16 and dropped the nested ones; they stay plain float32 here, since
    quantising them again would lose more. (bitsandbytes' own way back leaves plain scales transposed.)
    """
    functional: Any = importlib.import_module("bitsandbytes.functional")
    state = weight.quant_state
    scales = state.absmax.T.reshape(-1).float()
    state.original_nested = False
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    weight.quant_state.absmax, weight.quant_state.nested, weight.quant_state.state2 = scales, False, None


def _replace_4bit(module: nn.Module, weight: Any) -> None:
    module._parameters["weight"] = weight
    module.quant_state = weight.quant_state
    weight.module = module


class Bnb8bitWeight(BaseWeight):
    """Linear8bitLt: int8 rows with a float32 scale each, W = CB * SCB / 127."""

    label = "Linear8bitLt"
    quantized = "bnb 8bit"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return _has_base(module, "Linear8bitLt", "bitsandbytes")

    @classmethod
    def check(cls, module: nn.Module) -> None:
        if module.weight.dtype is not torch.int8 and not module.state.has_fp16_weights:  # type: ignore[union-attr]
            raise ValueError("a bitsandbytes Linear8bitLt that is not quantised: move the model to its device first")

    @classmethod
    def dtype(cls, module: nn.Module) -> torch.dtype:
        return torch.float32 if module.weight.dtype is torch.int8 else super().dtype(module)

    @classmethod
    def read(cls, module: nn.Module) -> Weight:
        weight: Any = module.weight
        state: Any = module.state
        if weight.dtype is not torch.int8:
            return super().read(module)
        scales = state.SCB if state.SCB is not None else weight.SCB
        bias: Any = module.bias
        return weight.data.float() * (scales.float() / 127.0).unsqueeze(1), bias

    @classmethod
    def rows(cls, module: nn.Module, index: slice | Tensor) -> Tensor:
        weight: Any = module.weight
        state: Any = module.state
        if weight.dtype is not torch.int8:
            return super().rows(module, index)
        scales = state.SCB if state.SCB is not None else weight.SCB
        decoded: Tensor = weight.data[index].float() * (scales[index].float() / 127.0).unsqueeze(1)
        return decoded

    @classmethod
    def write(cls, module: nn.Module, w: Tensor, b: Tensor | None) -> float | None:
        old: Any = module.weight
        if old.dtype is not torch.int8:
            return super().write(module, w, b)
        bnb: Any = importlib.import_module("bitsandbytes")
        w = w.detach().to(torch.float32)
        new = bnb.nn.Int8Params(w.to("cpu"), requires_grad=False, has_fp16_weights=False).to(old.device)
        _replace_8bit(module, new)
        cls._write_bias(module, b)
        return relative_error(cls.read(module)[0], w)

    @classmethod
    def take(cls, module: nn.Module) -> dict[str, Any]:
        taken = super().take(module)
        state: Any = module.state
        if module.weight.dtype is torch.int8:
            weight: Any = module.weight
            taken["SCB"] = state.SCB if state.SCB is not None else weight.SCB
        return taken

    @classmethod
    def put_back(cls, module: nn.Module, taken: dict[str, Any]) -> None:
        BaseWeight.put_back(module, {"bias": taken["bias"]})
        weight = taken["weight"]
        if "SCB" in taken:
            weight.CB, weight.SCB = weight.data, taken["SCB"]
            _replace_8bit(module, weight.to(module.weight.device))
        else:
            module._parameters["weight"] = weight


def _replace_8bit(module: nn.Module, weight: Any) -> None:
    """Install an int8 weight; the layer's own state takes its scales over on the next forward."""
    module._parameters["weight"] = weight
    state: Any = module.state
    state.CB, state.SCB = None, None
    state.reset_grads()
