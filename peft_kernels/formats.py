"""How weights and adapters are stored: the 4-bit format of bitsandbytes, and stacks of LoRA adapters.

The 4-bit format is written once: the two code tables, `QuantWeight`, and the exact decode.

A weight of any shape is read flat in row-major order, two codes a byte, the **high** nibble holding the even element.
Every `blocksize` elements share a scale `absmax`. With nested (double) quantisation `absmax` itself is stored as
uint8 codes into the 256-entry float32 map `nested_code`, with a float32 scale per `nested_blocksize` codes and one
`offset`. The decoded value is by definition the float32 product `table[code] * absmax`, rounded once.

Source of the format: QLoRA (arXiv 2305.14314) as stored by bitsandbytes' `Params4bit`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .checks import PLAIN, arg_error, capturing, check_memory

NF4_TABLE: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# sign, then a 2-bit exponent and one mantissa bit in bitsandbytes' own order, divided by the largest value, 12
# (+ 0.0: code 8 is +0.0, as in bitsandbytes, not -0.0)
FP4_TABLE: tuple[float, ...] = tuple(
    sign * v / 12.0 + 0.0 for sign in (1.0, -1.0) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)

QUANT_TYPES: dict[str, int] = {"nf4": 1, "fp4": 2}  # 0 is a dense weight
QUANT_NAMES: dict[int, str] = {v: k for k, v in QUANT_TYPES.items()}
TABLES: dict[int, tuple[float, ...]] = {1: NF4_TABLE, 2: FP4_TABLE}
BLOCKSIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)

FlatWeight = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, int, int]

_tables: dict[torch.device, dict[int, tuple[Tensor, Tensor]]] = {}


def _make(device: torch.device | str) -> dict[int, tuple[Tensor, Tensor]]:
    made = {}
    with torch.inference_mode(False):
        for quant_type, entries in TABLES.items():
            values = torch.tensor(entries, dtype=torch.float32, device="cpu")
            half = values.half()
            pairs = torch.stack((half.repeat_interleave(16), half.repeat(16)), dim=1).view(torch.int32).reshape(256)
            made[quant_type] = values.to(device), pairs.to(device)
    return made


def make_tables(like: Tensor) -> None:
    """Makes the code tables on the device of `like`, once; they stay. Called where a weight is made or moved.

    Operators make none: what a call leaves behind would be lost with the memory of a CUDA graph, and a copy to the
    device cannot be captured in one.
    """
    if torch.compiler.is_compiling():  # first, or the tables become part of what is traced
        return
    device = like.device
    if device in _tables or device.type == "meta" or type(like) not in PLAIN:
        return
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or capturing():
        return  # fake tensors are no tables
    _tables[device] = _make(device)


def _found(quant_type: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    device = torch.device(device)
    known = _tables.get(device)
    if known is None:
        if capturing():
            raise RuntimeError(
                f"the tables of 4-bit codes are not on {device}, and cannot be copied there while a CUDA graph is "
                "captured: make the QuantWeight, or call its .to(device), before"
            )
        known = _make(device)  # of tensors that never were a QuantWeight there: for this call alone
    return known[quant_type]


def table(quant_type: int, device: torch.device | str = "cpu") -> Tensor:
    """The 16 float32 values of a code table on `device` (do not write to it)."""
    return _found(quant_type, device)[0]


def pair_table(quant_type: int, device: torch.device | str) -> Tensor:
    """int32 [256]: the two values of a byte as float16, that of the high nibble (even element) in the low half."""
    return _found(quant_type, device)[1]


make_tables(torch.empty(0, device="cpu"))


def decode_absmax(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
) -> Tensor:
    """float32 scale per block, [nblocks]; the identity where `absmax` is not nested."""
    if nested_absmax is None:
        return absmax.reshape(-1)
    assert nested_code is not None
    assert offset is not None
    codes = absmax.reshape(-1)
    scale = nested_absmax.reshape(-1)[torch.arange(codes.numel(), device=codes.device) // nested_blocksize]
    return nested_code.reshape(-1)[codes.long()] * scale + offset.reshape(())


def decode_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    quant_type: int,
    blocksize: int,
    nested_blocksize: int,
    shape: tuple[int, ...] | torch.Size,
) -> Tensor:
    """The exact decode: a float32 tensor of `shape`. Plain torch on any device; the oracle of every kernel."""
    numel = math.prod(shape)
    flat = packed.reshape(-1)
    codes = torch.stack((flat >> 4, flat & 15), dim=1).reshape(-1)[:numel].long()
    scale = decode_absmax(absmax, nested_absmax, nested_code, offset, nested_blocksize)
    scale = scale.repeat_interleave(blocksize)[:numel]
    return (table(quant_type, packed.device)[codes] * scale).reshape(tuple(shape))


def check_parts(
    op: str, packed: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, shape: tuple[int, ...],
    name: str = "packed",
) -> None:  # fmt: skip
    """Raise ValueError or TypeError unless the parts of a 4-bit weight of `shape` have the dtypes and sizes that are
    read of them. name: what the caller calls `packed`. Devices and memory are every operator's (`checks.Operands`)."""
    if packed.dtype is not torch.uint8:
        raise arg_error(op, name, "uint8", packed.dtype, TypeError)
    if quant_type not in QUANT_NAMES:
        raise arg_error(op, "quant_type", f"one of {QUANT_NAMES}", quant_type)
    if blocksize not in BLOCKSIZES:
        raise arg_error(op, "blocksize", f"one of {BLOCKSIZES}", blocksize)
    if any(n < 0 for n in shape):
        raise arg_error(op, "shape", "of sizes of 0 or more", tuple(shape))
    numel = math.prod(shape)
    if packed.numel() != (numel + 1) // 2:
        raise arg_error(op, name, f"{(numel + 1) // 2} bytes for shape {tuple(shape)}", packed.numel())
    nblocks = -(-numel // blocksize)
    if absmax is None or absmax.numel() != nblocks:
        raise arg_error(op, "absmax", f"{nblocks} scales for shape {tuple(shape)} at blocksize {blocksize}",
                        "None" if absmax is None else absmax.numel())  # fmt: skip
    if nested_absmax is None:
        if absmax.dtype is not torch.float32:
            raise arg_error(op, "absmax", "float32 when it is not nested", absmax.dtype, TypeError)
        return
    if absmax.dtype is not torch.uint8:
        raise arg_error(op, "absmax", "uint8 codes when nested", absmax.dtype, TypeError)
    if nested_blocksize < 1:
        raise arg_error(op, "nested_blocksize", "positive", nested_blocksize)
    for part, t, size in (("nested_absmax", nested_absmax, -(-nblocks // nested_blocksize)),
                          ("nested_code", nested_code, 256), ("offset", offset, 1)):  # fmt: skip
        if t is None or t.numel() != size:
            raise arg_error(op, part, f"{size} float32 values", "None" if t is None else t.numel())
        if t.dtype is not torch.float32:
            raise arg_error(op, part, "float32", t.dtype, TypeError)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Each as kernels read it; a tensor that is contiguous is not copied. Their list keeps copies alive."""
    return [None if t is None else t.contiguous() for t in tensors]


@dataclass(frozen=True, eq=False)
class QuantWeight:
    """A 4-bit weight in bitsandbytes' layout, read in place (no copy is made of any tensor).

    packed: uint8, contiguous, any shape, ceil(numel / 2) bytes; high nibble = even element.
    absmax: [nblocks] float32, or uint8 codes when nested. shape: the logical shape, `(out_features, in_features)` for a
    linear weight. dtype: what the weight was before quantisation and what `dequantize_4bit` returns by default.
    nested_absmax: float32 [ceil(nblocks / nested_blocksize)]; nested_code: float32 [256]; offset: float32, one element.
    Raises ValueError or TypeError where the parts do not fit together; operators look at them again, as tensors change.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    quant_type: str = "nf4"
    blocksize: int = 64
    dtype: torch.dtype = torch.float32
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_blocksize: int = 256
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise arg_error("QuantWeight", "quant_type", f"one of {sorted(QUANT_TYPES)}", repr(self.quant_type))
        if not all(isinstance(n, int | torch.SymInt) for n in self.shape):
            raise arg_error("QuantWeight", "shape", "of integers", self.shape)
        parts = {"packed": self.packed, "absmax": self.absmax, "nested_absmax": self.nested_absmax,
                 "nested_code": self.nested_code, "offset": self.offset}  # fmt: skip
        check_parts("QuantWeight", *parts.values(), QUANT_TYPES[self.quant_type], self.blocksize,
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
        return self.nested_absmax is not None

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
                    QUANT_TYPES[self.quant_type], self.blocksize, self.nested_blocksize)  # fmt: skip
            self.__dict__["_flat"] = flat
        return flat

    def to(self, device: torch.device | str) -> QuantWeight:
        """The same weight on another device. Never casts: the bytes and scales are the weight."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            nested_absmax=move(self.nested_absmax),
            nested_code=move(self.nested_code),
            offset=move(self.offset),
        )

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


@dataclass(frozen=True, eq=False)
class AdapterStack:
    """Several LoRA adapters of one linear layer, whose ranks may differ, packed by rank.

    a: [P, K] floating point; rows starts[i] .. starts[i] + ranks[i] are adapter i's lora_A. b: [P, N]; the same rows
    are its lora_B **transposed**. starts, ranks: int64 [S]; ranks[i] = 0 is a free slot, which acts as the base alone.
    scaling: float32 [S]. max_rank: an upper bound of ranks, which sizes kernels: it does not follow the values.
    Adapters share no rows; rows that no adapter owns are never read. A padded stack [S, R, K] is its view(-1, K) with
    starts = arange(S) * R. Tensors may be overwritten in place between calls. `multi_lora_linear` checks all of it.
    """

    a: Tensor
    b: Tensor
    starts: Tensor
    ranks: Tensor
    scaling: Tensor
    max_rank: int

    @classmethod
    def pack(cls, adapters: Sequence[tuple[Tensor, Tensor, float]]) -> AdapterStack:
        """The stack of (lora_A [r, K], lora_B [N, r], scaling) each, one after the other; differentiable in A and B.

        Ranks may be 0. Raises ValueError where there is none, or shapes do not fit.
        """
        if not adapters:
            raise ValueError("AdapterStack.pack: adapters must be at least one (A, B, scaling), got none")
        k, n = adapters[0][0].shape[-1], adapters[0][1].shape[0]
        for i, (a, b, _) in enumerate(adapters):
            if a.dim() != 2 or a.shape[1] != k or tuple(b.shape) != (n, a.shape[0]):
                raise ValueError(
                    f"AdapterStack.pack: adapters[{i}] must be A [r, {k}] and B [{n}, r] like the first, "
                    f"got {tuple(a.shape)} and {tuple(b.shape)}"
                )
        ranks = [a.shape[0] for a, _, _ in adapters]
        starts = [sum(ranks[:i]) for i in range(len(ranks))]
        device = adapters[0][0].device
        return cls(
            a=torch.cat([a for a, _, _ in adapters]),
            b=torch.cat([b.t() for _, b, _ in adapters]),
            starts=torch.tensor(starts, dtype=torch.int64, device=device),
            ranks=torch.tensor(ranks, dtype=torch.int64, device=device),
            scaling=torch.tensor([scaling for _, _, scaling in adapters], dtype=torch.float32, device=device),
            max_rank=max(ranks),
        )
