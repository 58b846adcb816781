"""Weights that their module's forward reads for itself: MultiheadAttention's projections, and parameters named by
`target_parameters`, such as a mixture's stack of experts.

Nothing can wrap a call here, so the module runs with the merged weight in the parameter's place: one transient weight.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from ..method import LayerInfo
from .base import BaseWeight, LinearWeight, Part, Weight, install


def innermost(module: nn.Module) -> nn.Module:
    """The module below any adapter layers."""
    from ..layer import AdapterLayer

    while isinstance(module, AdapterLayer):
        module = module.base_layer
    return module


class TransientWeight(BaseWeight):
    """weight, bias: the names of the module's parameters that hold them. The module may be an adapter layer itself:
    layers for several parameters of one module are nested."""

    transient = True
    weight: ClassVar[str]
    bias: ClassVar[str | None] = None

    @classmethod
    def parameter(cls, module: nn.Module) -> Tensor:
        return innermost(module)._parameters[cls.weight]  # type: ignore[return-value]

    @classmethod
    def info(cls, module: nn.Module, name: str = "") -> LayerInfo:
        p, shape = cls.parameter(module), cls.shape(module)
        return LayerInfo(
            name=name, kind=cls.kind, shape=shape, in_features=shape[-1], out_features=shape[-2],
            has_bias=cls.read(module)[1] is not None, dtype=p.dtype, device=p.device, module=module, transient=True,
        )  # fmt: skip

    @classmethod
    def shape(cls, module: nn.Module) -> tuple[int, ...]:
        return tuple(cls.read(module)[0].shape)

    @classmethod
    def dtype(cls, module: nn.Module) -> Any:
        return cls.parameter(module).dtype

    @classmethod
    def read(cls, module: nn.Module) -> Weight:
        bias = innermost(module)._parameters.get(cls.bias) if cls.bias else None
        return cls.parameter(module), bias

    @classmethod
    def store(cls, w: Tensor) -> Tensor:
        """W in the layout of the parameter."""
        return w

    @classmethod
    def write(cls, module: nn.Module, w: Tensor, b: Tensor | None) -> float | None:
        target = innermost(module)
        old = cls.read(module)[1]
        if b is not None and old is None:
            raise ValueError("the adapter adds a bias, and there is none beside the parameter to hold it")
        install(target, cls.weight, cls.store(w))
        if b is not None and b is not old and cls.bias is not None:
            install(target, cls.bias, b)
        return None

    @classmethod
    def take(cls, module: nn.Module) -> dict[str, Any]:
        names = [cls.weight, *([cls.bias] if cls.bias else [])]
        return {name: innermost(module)._parameters.get(name) for name in names}

    @classmethod
    def put_back(cls, module: nn.Module, taken: dict[str, Any]) -> None:
        super().put_back(innermost(module), taken)

    @classmethod
    def apply(cls, module: nn.Module, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        with cls.replaced(module, w, b):
            return module(x)  # type: ignore[no-any-return]

    @classmethod
    @contextmanager
    def replaced(cls, module: nn.Module, w: Tensor, b: Tensor | None) -> Iterator[None]:
        """Within this, the module computes with W and b; gradients flow to what they were made of."""
        held = innermost(module)._parameters
        taken = cls.take(module)
        try:
            held[cls.weight] = cls.store(w).to(taken[cls.weight].dtype)  # type: ignore[assignment]
            if b is not None and cls.bias is not None:
                held[cls.bias] = b.to(taken[cls.bias].dtype)  # type: ignore[assignment]
            yield
        finally:
            held.update(taken)


class AttentionOutWeight(LinearWeight):
    """The out_proj of an attention. PEFT adds an update there twice, in forward and merge alike, so that what its files
    hold acts with twice its scaling; to compute what they were trained to compute, so it does here. (PEFT's gradient
    sees it once; ours is the function's.)"""

    @classmethod
    def info(cls, module: nn.Module, name: str = "") -> LayerInfo:
        return replace(super().info(module, name), times=2)


class AttentionWeight(TransientWeight):
    """nn.MultiheadAttention with one width for query, key and value: in_proj_weight as W [3 embed_dim, embed_dim].

    Its out_proj gets the adapter as well, in a layer of its own, whose weight is put in place with this one's.
    """

    label = "MultiheadAttention"
    weight, bias = "in_proj_weight", "in_proj_bias"
    # What nn.TransformerEncoderLayer and others ask an attention for.
    attributes = frozenset({"embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim", "out_proj",
                            "in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn",
                            "_qkv_same_embed_dim"})  # fmt: skip

    @classmethod
    def attribute(cls, module: nn.Module, name: str) -> Any:
        # False keeps TransformerEncoderLayer off a fused path that reads the base weights and passes adapters over.
        if name == "_qkv_same_embed_dim":
            return False
        value = getattr(module, name)
        return innermost(value) if name == "out_proj" else value

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @classmethod
    def check(cls, module: nn.Module) -> None:
        if not module._qkv_same_embed_dim:
            raise ValueError("MultiheadAttention with other widths for key or value (kdim, vdim) is not supported")

    @classmethod
    def parts(cls, module: nn.Module) -> Iterator[Part]:
        yield "base_layer.out_proj", module, "out_proj", module.out_proj, AttentionOutWeight  # type: ignore[misc]

    @classmethod
    @contextmanager
    def replaced(cls, module: nn.Module, w: Tensor, b: Tensor | None) -> Iterator[None]:
        from ..layer import AdapterLayer

        out: Any = module.out_proj
        with super().replaced(module, w, b):
            if not isinstance(out, AdapterLayer):
                yield
                return
            off = out.disable_adapters or out.merged
            names = [] if off else [n for n in out.active_adapters if n in out.methods]
            wo, bo = out.stored_weight(names)
            held = out.base_layer._parameters
            taken = dict(held)
            try:
                held["weight"], held["bias"] = wo, bo  # type: ignore[assignment]
                yield
            finally:
                held.update(taken)


class _ParameterKind(type):
    """The type of what `parameter_kind` makes, by which pickle knows to call it again."""

    made_by: tuple[str, int, bool]


@cache
def parameter_kind(name: str, ndim: int, transposed: bool) -> type[TransientWeight]:
    """The kind of a module's parameter `name`: 2-d as W [out, in]; 3-d as a stack of experts [E, out, in], which a
    module with `is_transposed` keeps as [E, in, out]."""

    class ParameterWeight(TransientWeight, metaclass=_ParameterKind):
        made_by = (name, ndim, transposed)
        label = "ParamWrapper"
        kind = "linear" if ndim == 2 else "experts"
        weight = name

        @classmethod
        def accepts(cls, module: nn.Module) -> bool:
            return isinstance(innermost(module)._parameters.get(name), nn.Parameter)

        @classmethod
        def read(cls, module: nn.Module) -> Weight:
            return cls.store(cls.parameter(module)), None

        @classmethod
        def store(cls, w: Tensor) -> Tensor:
            return w.transpose(-1, -2) if transposed else w

    ParameterWeight.__name__ = ParameterWeight.__qualname__ = f"ParameterWeight_{name}"
    return ParameterWeight


def _pickled(kind: _ParameterKind) -> Any:
    return parameter_kind, kind.made_by


copyreg.pickle(_ParameterKind, _pickled)


def kind_of_parameter(module: nn.Module, name: str) -> type[TransientWeight]:
    """Raises ValueError for a parameter that is neither a matrix nor a stack of matrices."""
    parameter = innermost(module)._parameters[name]
    assert parameter is not None
    if parameter.dim() not in (2, 3):
        raise ValueError(f"parameter {name!r} has {parameter.dim()} dimensions; only 2 and 3 (experts) are supported")
    transposed = parameter.dim() == 3 and bool(getattr(innermost(module), "is_transposed", False))
    return parameter_kind(name, parameter.dim(), transposed)
