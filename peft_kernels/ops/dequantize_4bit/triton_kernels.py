"""The Triton kernel of dequantize_4bit. Imported only when it is launched."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import load_absmax, round_to


@triton.jit
def dequantize_kernel(
    p_packed, p_absmax, p_nested, p_code, p_offset, p_table, p_out, numel,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """BYTES packed bytes per program, 2 BYTES elements. Writes dominate; the table of 16 lies in L1."""
    i_pid = tl.program_id(0).to(tl.int64)
    i_byte = i_pid * BYTES + tl.arange(0, BYTES)
    b_mask = i_byte < (numel + 1) // 2
    b_byte = tl.load(p_packed + i_byte, mask=b_mask, other=0).to(tl.int32)
    i_block = i_byte // (BLOCKSIZE // 2)
    b_scale = load_absmax(p_absmax, p_nested, p_code, p_offset, i_block, b_mask, NESTED, NESTED_BLOCKSIZE)
    b_even = round_to(tl.load(p_table + (b_byte >> 4)) * b_scale, p_out.dtype.element_ty)
    b_odd = round_to(tl.load(p_table + (b_byte & 15)) * b_scale, p_out.dtype.element_ty)
    i = i_pid * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(p_out + i, tl.reshape(tl.join(b_even, b_odd), (2 * BYTES,)), mask=i < numel)
