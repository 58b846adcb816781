"""Weights as other packages store them, to `QuantWeight`: GPTQ, AWQ, HQQ, torchao and bitsandbytes' int8.

Attributes and tensors are read, no package is imported. GPTQ, AWQ and HQQ pack codes in their own orders, which are
turned into ours once (a copy of the codes); int8 rows share every byte, scales in another order are copied. Values are
looked at: ValueError where a scale is not finite or an index is out of range.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import arg_error
from .weight import QuantWeight

# column 8 i + _AWQ[j] is in bits 4 j .. of word i, as AutoAWQ's kernels want it
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
_BNB_INT8 = 7.874015718698502e-3  # bitsandbytes' own 1 / 127


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [ceil(numel / 2)]: codes 0 .. 15 of any integer dtype, two a byte, that of the even element above."""
    flat = codes.reshape(-1).to(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    return (flat[::2] << 4) | flat[1::2]


def _words(words: Tensor, bits: int, dim: int) -> Tensor:
    """uint8 codes out of int32 words along `dim`, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    spread = (words.unsqueeze(dim + 1) >> shifts.view(-1, *(1,) * (words.dim() - dim - 1))) & (2**bits - 1)
    return spread.to(torch.uint8).flatten(dim, dim + 1)


def _affine(owner: str, bits: int, codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int,
            index: Tensor | None, dtype: torch.dtype | None, shifts: Tensor | None = None) -> QuantWeight:  # fmt: skip
    """codes: [N, K], of unsigned integers; scales, zeros, shifts: [N, G]."""
    packed = pack_nibbles(codes) if bits == 4 else codes.to(torch.uint8).contiguous()
    weight = QuantWeight.affine(
        packed, scales.contiguous(), codes.shape, "int4" if bits == 4 else "uint8", group,
        zeros=None if zeros is None else zeros.contiguous(), shifts=None if shifts is None else shifts.contiguous(),
        index=index, dtype=dtype,
    )  # fmt: skip
    weight.check_values(owner)
    return weight


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, group_size: int, *,
    zero_offset: int = 1, dtype: torch.dtype | None = None,
) -> QuantWeight:  # fmt: skip
    """GPTQ's tensors: qweight int32 [K * bits / 32, N], qzeros int32 [G, N * bits / 32], scales [G, N], g_idx [K].

    bits: 4 or 8. group_size: -1 is one group. zero_offset: what is added to stored zeros; 1 in files of the format
    "gptq", 0 in "gptq_v2". g_idx: None, or without act-order column // group_size.
    """
    if bits not in (4, 8):
        raise arg_error("from_gptq", "bits", "4 or 8", bits)
    codes = _words(qweight, bits, 0).t()
    n, k = codes.shape
    group = k if group_size < 1 else group_size
    zeros = (_words(qzeros, bits, 1)[:, :n].to(torch.int16) + zero_offset) & (2**bits - 1)
    index = None
    if g_idx is not None:
        if g_idx.numel() != k:
            raise arg_error("from_gptq", "g_idx", f"{k} groups, one a column", g_idx.numel())
        index = g_idx.reshape(-1).to(torch.int32)
        if torch.equal(index, torch.arange(k, dtype=torch.int32, device=index.device) // group):
            index = None
    return _affine("from_gptq", bits, codes, scales.t(), zeros.to(torch.uint8).t(), group, index, dtype)


def from_awq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, *, dtype: torch.dtype | None = None
) -> QuantWeight:
    """AWQ's tensors of 4 bits: qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]; -1 is one group."""
    order = torch.tensor(_AWQ, device=qweight.device).argsort()

    def columns(words: Tensor) -> Tensor:
        codes = _words(words, 4, 1)
        return codes.reshape(words.shape[0], -1, 8)[:, :, order].reshape(words.shape[0], -1).t()

    k = qweight.shape[0]
    return _affine("from_awq", 4, columns(qweight), scales.t(), columns(qzeros), k if group_size < 1 else group_size,
                   None, dtype)  # fmt: skip


def from_hqq(packed: Tensor, meta: dict[str, Any]) -> QuantWeight:
    """HQQ's `W_q` of 4 or 8 bits with its `meta`, whose scales and zeros are no longer quantised.

    ValueError where groups run along columns (axis=0) or the bits are others.
    """
    n, k = (int(size) for size in meta["shape"])
    bits, group = meta["nbits"], meta["group_size"] or k
    if meta["axis"] != 1 or bits not in (4, 8) or k % group:
        raise arg_error("from_hqq", "meta", "of axis=1, of 4 or 8 bits, in groups that divide a row",
                        {name: meta[name] for name in ("axis", "nbits", "group_size", "shape")})  # fmt: skip
    codes = packed.view(torch.uint8) if meta.get("view_as_float") else packed
    if bits == 4 and meta.get("packing"):
        codes = torch.cat((codes >> 4, codes & 15))  # the first half of the groups above the second
    scales, zeros = (meta[name].reshape(n, k // group) for name in ("scale", "zero"))
    zeros = zeros.to(scales.dtype)
    dtype = meta.get("compute_dtype", scales.dtype)
    return _affine("from_hqq", bits, codes.reshape(-1)[: n * k].view(n, k), scales, zeros, group, None, dtype)


def from_torchao(tensor: Any) -> QuantWeight:
    """torchao's weight tensors by their fields: `Int4Tensor`, and `Int8Tensor` and `IntxUnpackedToInt8Tensor`, whose
    bytes are shared.

    ValueError of other classes, and of int8 whose blocks span rows.
    """
    of = type(tensor).__name__
    if of == "Int4Tensor":
        # even columns below: ours are above. Its values are q * scale + zero with q signed
        q = tensor.qdata.view(torch.uint8)
        codes = torch.stack((q & 15, q >> 4), dim=-1).reshape(tuple(tensor.shape)) ^ 8
        scales, shifts = tensor.scale.t(), tensor.zero_point.t()
        return _affine("from_torchao", 4, codes, scales, None, tensor.block_size[-1], None, tensor.dtype, shifts)
    if of in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        n, k = tensor.qdata.shape
        group = int(tensor.block_size[-1])
        rows = int(tensor.block_size[0])
        if rows not in (1, n) or group < 1:
            raise arg_error("from_torchao", "block_size", f"of 1 or {n} rows", tensor.block_size)
        groups = -(-k // group)

        def by_group(t: Tensor) -> Tensor:
            return (t.reshape(-1, groups) if rows == 1 else t.reshape(1, groups)).expand(n, groups).contiguous()

        zeros = tensor.zero_point
        zeros = None if zeros is None or not bool(zeros.any()) else by_group(zeros).to(tensor.scale.dtype)
        weight = QuantWeight.affine(tensor.qdata, by_group(tensor.scale), (n, k), "int8", group, zeros=zeros,
                                    dtype=tensor.dtype)  # fmt: skip
        weight.check_values("from_torchao")
        return weight
    raise arg_error("from_torchao", "tensor", "an Int8Tensor, Int4Tensor or IntxUnpackedToInt8Tensor", of)


def from_bnb_int8(cb: Tensor, scb: Tensor, dtype: torch.dtype = torch.float16) -> QuantWeight:
    """bitsandbytes' int8 rows: CB int8 [N, K], shared, and SCB float32 [N], whose scale here is SCB / 127."""
    scales = scb.detach().reshape(-1, 1).to(torch.float32) * _BNB_INT8
    weight = QuantWeight.affine(cb.detach(), scales, cb.shape, "int8", cb.shape[1], dtype=dtype)
    if not torch.compiler.is_compiling():  # a graph cannot look at values
        weight.check_values("from_bnb_int8")
    return weight
