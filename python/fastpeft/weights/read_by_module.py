"""Weights that their module's forward reads for itself: MultiheadAttention's projections, and parameters named by
`target_parameters`, such as the experts of a mixture.

Nothing can wrap a call here, so the module runs with the merged weight in the parameter's place: one transient weight.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peft_kernels import dequantize_4bit

from ..files.offloaded import brought
from .base import BaseWeight, Saved, Weight, Wrapping, innermost, relative_error, wide
from .dense import LinearWeight
from .parameters_4bit import Decoded, Packed, packed_of
from .quantised_rows import no_quantiser, quantised_rows

# A module of experts whose class has this multiplies by LoRA's factors itself; it finds them in its attribute of the
# second name, by the parameter's: (a [E, r, in], b [E, out, r], scaling).
TAKES_FACTORS = "_takes_expert_factors"
EXPERT_FACTORS = "_expert_factors"

# Of the modules whose parameters are replaced for a call: another thread's would compute with them, or keep them.
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@contextmanager
def _holding(module: nn.Module, new: Mapping[str, Any]) -> Iterator[None]:
    """Within this, a module has other parameters. FSDP1 puts plain attributes in the places of a module's own."""
    own = vars(module)
    stores: dict[str, Any] = {name: own if name in own else module._parameters for name in new}
    saved = {name: store[name] for name, store in stores.items()}
    try:
        for name, store in stores.items():
            store[name] = new[name]
        yield
    finally:
        for name, store in stores.items():
            store[name] = saved[name]


class TransientWeight(BaseWeight):
    """A parameter that its module reads. The module may be an adapter layer itself: layers for several parameters of
    one module are nested."""

    transient = True

    @property
    def takes_factors(self) -> bool:
        """True where the module can multiply by an adapter's factors beside its parameter, as `with_factors` gives."""
        return False

    def with_factors(self, factors: tuple[Tensor, Tensor, float]) -> AbstractContextManager[None]:
        """Within this, the module computes with W + scaling B A of each expert: a [E, r, in], b [E, out, r]."""
        raise TypeError(f"a {self.label} takes no factors")

    @property
    def holder(self) -> Any:
        return innermost(self.module)

    def alone(self) -> AbstractContextManager[Any]:
        return nullcontext() if torch.compiler.is_compiling() else _locks.setdefault(self.holder, threading.RLock())

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        with self.alone(), self.replaced(w, b):
            return self.module(x)  # type: ignore[no-any-return]

    def replaced(self, w: Tensor, b: Tensor | None) -> AbstractContextManager[None]:
        """Within this, the module computes with W and b; gradients flow to what they were made of."""
        weight, bias = self.names
        new = {weight: self.turned(w).to(self.tensor.dtype)}
        if b is not None and bias is not None and self.bias is not None:
            new[bias] = b.to(self.bias.dtype)
        return self._replaced(new)

    @contextmanager
    def _replaced(self, new: Mapping[str, Tensor]) -> Iterator[None]:
        with brought(self.holder), _holding(self.holder, new):
            yield


class AttentionOutWeight(LinearWeight):
    """The out_proj of an attention. PEFT adds an update there twice, in forward and merge alike, so that what its files
    hold acts with twice its scaling; to compute what they were trained to compute, so it does here. (PEFT's gradient
    sees it once; ours is the function's.)"""

    times = 2


class AttentionWeight(TransientWeight):
    """nn.MultiheadAttention with one width for query, key and value: in_proj_weight as W [3 embed_dim, embed_dim].

    Its out_proj gets the adapter as well, in a layer of its own, whose weight is put in place with this one's.
    """

    modules = nn.MultiheadAttention
    label = "MultiheadAttention"
    names = ("in_proj_weight", "in_proj_bias")
    # What nn.TransformerEncoderLayer and others ask an attention for.
    attributes = frozenset({"embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim", "out_proj",
                            "in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "add_zero_attn",
                            "merge_masks", "_qkv_same_embed_dim"})  # fmt: skip

    def attribute(self, name: str) -> Any:
        # False keeps TransformerEncoderLayer off a fused path that reads the base weights and passes adapters over.
        if name == "_qkv_same_embed_dim":
            return False
        value = getattr(self.module, name)
        return innermost(value) if name == "out_proj" else value

    def check(self) -> None:
        if not self.module._qkv_same_embed_dim:
            raise ValueError(
                "Only same embed for query/key/value is supported as of now for MultiheadAttention (no kdim or vdim)"
            )

    def parts(self) -> dict[str, BaseWeight]:
        return {"out_proj": AttentionOutWeight(self.module.out_proj)}

    @contextmanager
    def replaced(self, w: Tensor, b: Tensor | None) -> Iterator[None]:
        out = self.module.out_proj
        own = dict(zip(("weight", "bias"), out.current_weight(), strict=True)) if isinstance(out, Wrapping) else {}
        with super().replaced(w, b), _holding(innermost(out), own):
            yield


class ParameterWeight(TransientWeight):
    """A parameter of any module, by name: 2-d as W [out, in]; 3-d as experts [E, out, in], which a module with
    `is_transposed` keeps as [E, in, out]; dense or in 4 bits (`parameters_4bit`). ValueError for other parameters."""

    label = "ParamWrapper"
    attributes = frozenset({"parameter_name"})

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module)
        self.names = (name, None)
        dim = self.tensor.dim()
        if dim not in (2, 3):
            raise ValueError(f"parameter {name!r} has {dim} dimensions; only 2 and 3 (experts) are supported")
        self.kind = "linear" if dim == 2 else "experts"
        self._swapped = dim == 3 and bool(getattr(self.holder, "is_transposed", False))

    def attribute(self, name: str) -> Any:
        return self.names[0]

    @property
    def _packed(self) -> Packed | None:
        return packed_of(self.holder, self.names[0])

    @property
    def refusal(self) -> str | None:  # type: ignore[override]
        packed = self._packed
        return None if packed is None else no_quantiser(packed.quant().quant_type)

    @property
    def quantized(self) -> str | None:  # type: ignore[override]  # a parameter's form may change
        packed = self._packed
        return None if packed is None else packed.label

    @property
    def tensor(self) -> Tensor:
        packed = self._packed
        return super().tensor if packed is None else Decoded(packed.quant())

    def read(self) -> Weight:
        packed = self._packed
        if packed is None:
            return super().read()
        return self.turned(dequantize_4bit(packed.quant(), dtype=wide(packed.quant().dtype))), None

    def rows(self, index: slice | Tensor) -> Tensor:
        packed = self._packed
        found = None if packed is None else quantised_rows(packed.quant(), index)
        return super().rows(index) if found is None else self.turned(found).flatten(1)

    def tensors(self) -> list[Tensor]:
        packed = self._packed
        return super().tensors() if packed is None else [t for t in packed.quant().flatten()[:5] if t is not None]

    def write(self, w: Tensor, b: Tensor | None) -> float | None:
        packed = self._packed
        if packed is None:
            return super().write(w, b)
        self._write_bias(b)
        packed.write(self.turned(w.detach()))
        return relative_error(self.read()[0], w)

    def save(self) -> Saved:
        packed = self._packed
        return super().save() if packed is None else {self.names[0]: packed.save()}

    def restore(self, saved: Saved) -> None:
        packed = self._packed
        if packed is None:
            super().restore(saved)
        else:
            packed.restore(saved[self.names[0]])

    @contextmanager
    def _replaced(self, new: Mapping[str, Tensor]) -> Iterator[None]:
        packed = self._packed
        with super()._replaced(new) if packed is None else packed.replaced(new[self.names[0]]):
            yield

    @property
    def takes_factors(self) -> bool:
        return self.kind == "experts" and getattr(type(self.holder), TAKES_FACTORS, False)

    @contextmanager
    def with_factors(self, factors: tuple[Tensor, Tensor, float]) -> Iterator[None]:
        own = vars(self.holder).setdefault(EXPERT_FACTORS, {})
        with brought(self.holder):
            own[self.names[0]] = factors
            try:
                yield
            finally:
                del own[self.names[0]]

    def turned(self, w: Tensor) -> Tensor:
        return w.transpose(-1, -2) if self._swapped else w
