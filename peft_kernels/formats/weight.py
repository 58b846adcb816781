"""`QuantWeight`: the parts of a quantised weight, held together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import arg_error, check_memory
from .format import FlatWeight, Parts, pieces, rows_of
from .known.four_bit import decode_absmax
from .registry import FORMATS, check_parts
from .tables import QUANT_TYPES, make_tables


@dataclass(frozen=True, eq=False)
class QuantWeight:
    """A quantised weight of any format in `peft_kernels.formats`, read in place (no copy is made of any tensor).

    NF4 and FP4 are bitsandbytes' layout; packed: uint8, contiguous, any shape, ceil(numel / 2) bytes; high nibble =
    even element. absmax: [nblocks] float32, or uint8 codes when nested. nested_absmax: float32
    [ceil(nblocks / nested_blocksize)]; nested_code: float32 [256]; offset: float32, one element. What the other formats
    keep in these fields is in the table of `formats.Parts`; `affine` and `gguf` make them.
    shape: the logical shape, `(out_features, in_features)` for a linear weight. quant_type: the format's name. dtype:
    what the weight was before quantisation and what `dequantize_4bit` returns by default.
    Raises ValueError or TypeError where the parts do not fit together; operators look at them again, as tensors change.
    """

    packed: Tensor
    absmax: Tensor | None
    shape: tuple[int, ...]
    quant_type: str = "nf4"
    blocksize: int = 64
    dtype: torch.dtype = torch.float32
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_blocksize: int = 256
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if self.quant_type not in FORMATS:
            raise arg_error("QuantWeight", "quant_type", f"one of {sorted(FORMATS)}", repr(self.quant_type))
        if not all(isinstance(n, int | torch.SymInt) for n in self.shape):
            raise arg_error("QuantWeight", "shape", "of integers", self.shape)
        parts = {"packed": self.packed, "absmax": self.absmax, "nested_absmax": self.nested_absmax,
                 "nested_code": self.nested_code, "offset": self.offset}  # fmt: skip
        check_parts("QuantWeight", *parts.values(), FORMATS[self.quant_type].number, self.blocksize,
                    self.nested_blocksize, tuple(self.shape))  # fmt: skip
        for name, t in parts.items():
            if t is not None and t.device != self.packed.device:
                raise arg_error("QuantWeight", name, f"on {self.packed.device} like packed", t.device)
        check_memory("QuantWeight", **parts)
        make_tables(self.packed)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nested(self) -> bool:
        """True where the scales themselves are in 8 bits, which those of NF4 and FP4 can be."""
        return self.nested_absmax is not None and self.quant_type in QUANT_TYPES

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes that the weight occupies, scales included."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_code, self.offset)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    def flatten(self) -> FlatWeight:
        """The weight as the ops take it: schemas hold tensors and numbers only. Computed once."""
        flat: FlatWeight | None = self.__dict__.get("_flat")
        if flat is None:
            flat = (self.packed, self.absmax, self.nested_absmax, self.nested_code, self.offset,
                    FORMATS[self.quant_type].number, self.blocksize, self.nested_blocksize)  # fmt: skip
            self.__dict__["_flat"] = flat
        return flat

    def to(self, device: torch.device | str) -> QuantWeight:
        """The same weight on another device. Never casts: the bytes and scales are the weight."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            packed=self.packed.to(device),
            absmax=move(self.absmax),
            nested_absmax=move(self.nested_absmax),
            nested_code=move(self.nested_code),
            offset=move(self.offset),
        )

    def take(self, index: slice | Tensor) -> QuantWeight | None:
        """Some of the rows, or matrices, of the first dimension (copies); None where their blocks straddle them.

        Nested scales are decoded.
        """
        n = self.shape[0]
        size = self.numel // max(1, n)  # elements of one
        if not size:
            return None

        def some(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.reshape(n, -1)[index]

        if self.quant_type not in QUANT_TYPES:
            if self.quant_type == "int4" and size % 2:
                return None
            packed = self.packed.view(n, -1)[index].contiguous()
            return replace(self, packed=packed, absmax=some(self.absmax), shape=(len(packed), *self.shape[1:]),
                           nested_absmax=some(self.nested_absmax), offset=some(self.offset))  # fmt: skip
        if size % self.blocksize or size % 2:
            return None
        assert self.absmax is not None
        packed = self.packed.view(n, -1)[index].contiguous()
        scales = decode_absmax(self.absmax, self.nested_absmax, self.nested_code, self.offset, self.nested_blocksize)
        absmax, shape = scales.view(n, -1)[index].reshape(-1), (len(packed), *self.shape[1:])
        return replace(self, packed=packed, absmax=absmax, shape=shape, nested_absmax=None, nested_code=None,
                       offset=None)  # fmt: skip

    def check_values(self, name: str = "QuantWeight") -> None:
        """ValueError, which begins with `name`, where scales are not finite or an index of groups is out of range.

        Reads all scales: for when a weight is loaded, not for every call.
        """
        why = FORMATS[self.quant_type].wrong(Parts(*self.flatten()[:5], self.blocksize, self.nested_blocksize),
                                             self.shape)  # fmt: skip
        if why is not None:
            raise ValueError(f"{name}: {why}")

    @classmethod
    def quantize(cls, w: Tensor, quant_type: str = "nf4", blocksize: int | None = None) -> QuantWeight:
        """`w` in a format that has a quantiser, with the bits of the owner's: a weight of w's shape and dtype.

        quant_type: "nf4" and "fp4" as bitsandbytes makes them; "int4" and "uint8" as HQQ, "int8" as torchao does; and
        "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4" as the package gguf. blocksize: columns a group; None: what the
        owner takes, 64 of NF4, FP4 and HQQ, a row of int8. w: floating, of rows of whole groups. Not differentiable.
        ValueError of values that are not finite or beyond the format's scales, and of formats without a quantiser.
        """
        known = FORMATS.get(quant_type)
        able = sorted(f.name for f in FORMATS.values() if f.quantize)
        if known is None or known.name not in able:
            raise arg_error("QuantWeight.quantize", "quant_type", f"one of {able}, which have a quantiser",
                            repr(quant_type))  # fmt: skip
        if not w.is_floating_point():
            raise arg_error("QuantWeight.quantize", "w", "a floating-point tensor", w.dtype, TypeError)
        w = w.detach()
        rows, columns = rows_of(w.shape)
        flat = w.reshape(rows, columns)
        bad = sum(int((~flat[some].isfinite()).sum()) for some in pieces(rows, columns))
        if bad:
            raise ValueError(f"QuantWeight.quantize: w holds {bad} values that are not finite")
        assert known.quantize is not None
        parts = known.quantize(w, blocksize)
        made = cls(parts.packed, parts.absmax, tuple(w.shape), known.name, parts.blocksize, w.dtype,
                   parts.nested_absmax, parts.nested_code, parts.nested_blocksize, parts.offset)  # fmt: skip
        made.check_values(f"QuantWeight.quantize: w has values too large for {known.name}")
        return made

    @classmethod
    def affine(
        cls, packed: Tensor, scales: Tensor, shape: Sequence[int], quant_type: str, blocksize: int, *,
        zeros: Tensor | None = None, shifts: Tensor | None = None, index: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantWeight:  # fmt: skip
        """Integers by group with scales: `(code - zero) * scale + shift`, as `formats/known/affine.py` says.

        packed: "int4" two codes a byte, "int8" or "uint8" one. scales, zeros, shifts: [rows, groups]; index: int32, the
        group of each column. dtype: None is that of the scales.
        """
        codes = packed.view(torch.uint8) if packed.dtype is torch.int8 else packed
        return cls(codes, scales, tuple(shape), quant_type, blocksize, dtype or scales.dtype, zeros, index, 256, shifts)

    @classmethod
    def gguf(
        cls, packed: Tensor, quant_type: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> QuantWeight:
        """Blocks of a GGUF file as they lie there, "q4_0" for one; `packed` may be a view of mapped memory."""
        known = FORMATS.get(quant_type.lower())
        if known is None or known.blocksize is None:
            names = sorted(f.name for f in FORMATS.values() if f.blocksize)
            raise arg_error("QuantWeight.gguf", "quant_type", f"one of {names}", repr(quant_type))
        return cls(packed, None, tuple(shape), known.name, known.blocksize, dtype)

    @classmethod
    def from_bnb(cls, weight: Any, quant_state: Any = None) -> QuantWeight:
        """A view of bitsandbytes' `Params4bit` (or of packed data with its `QuantState`): shares every byte.

        Reads attributes only, so bitsandbytes need not be importable here. Raises ValueError when the weight has not
        been quantised yet (bitsandbytes quantises on the first move to a device) or is in its private CPU layout.
        """
        state = quant_state if quant_state is not None else getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError("QuantWeight.from_bnb: the weight has no quant_state; move the layer to its device first")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "QuantWeight.from_bnb: an eval-mode forward of bitsandbytes has repacked this weight for its own CPU "
                "kernel; its state_dict() restores the bytes"
            )
        data = weight.data if hasattr(weight, "data") else weight
        if data.dtype is not torch.uint8:
            data = data.view(torch.uint8)  # quant_storage: the same bytes under another dtype
        nested = state.state2 if getattr(state, "nested", False) else None
        return cls(
            packed=data,
            absmax=state.absmax,
            shape=tuple(state.shape),
            quant_type=state.quant_type,
            blocksize=state.blocksize,
            dtype=state.dtype,
            nested_absmax=None if nested is None else nested.absmax,
            nested_code=None if nested is None else nested.code,
            nested_blocksize=256 if nested is None else nested.blocksize,
            offset=None if nested is None else state.offset,
        )
