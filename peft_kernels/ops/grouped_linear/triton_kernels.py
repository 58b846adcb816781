"""The Triton kernel of grouped_linear beside those of multi_lora_linear. Imported only when launched."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import dot, dot_narrow, load_weight, round_to, table_of
from ..multi_lora_linear.triton_kernels import group_tile


@triton.jit(do_not_specialize=["r", "E"])
def product_kernel(
    p_x, p_w, p_absmax, p_nested, p_code, p_offset, p_table, p_s, p_b, p_bias, p_y, p_bounds,
    D, C, N, K, r, E, stride_e, stride_n, stride_k, b_stride_e, b_stride_c, b_stride_r,
    BY_ROWS: tl.constexpr, ADAPTER: tl.constexpr, BIAS: tl.constexpr, MODE: tl.constexpr, BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of y [M, C] = x [M, D] W_e^T, with BY_ROWS x W_e, + s b_e^T + bias_e: BM rows of one group e.

    s has the scaling: multiplied here, it would be a left operand in registers, which not every ptxas keeps on sm_90.
    W_e [N, K]: at e * stride_e where dense, else rows e N .. of the codes. Rows of no group, which is number E: zeros.
    """
    i_e, i_first, i_last = group_tile(p_bounds, tl.program_id(0), BM, E)
    if i_first < i_last:
        i_m = i_first + tl.arange(0, BM)
        b_in = (i_m < i_last)[:, None]
        i_c0 = tl.program_id(1) * BN
        i_c = i_c0 + tl.arange(0, BN)
        b_table = table_of(p_table, MODE)
        if MODE >= 3:
            b_table = p_table
        i_row = tl.zeros((), tl.int32)
        if MODE == 0:
            p_w += i_e.to(tl.int64) * stride_e
        else:
            i_row = i_e * N
        i_end = i_row + N
        depth = tl.where(i_e < E, D, 0)
        b_acc = tl.zeros((BM, BN), tl.float32)
        for i_d0 in tl.range(0, depth, BK):
            i_d = i_d0 + tl.arange(0, BK)
            b_x = tl.load(p_x + i_m.to(tl.int64)[:, None] * D + i_d[None, :], mask=b_in & (i_d < D)[None, :], other=0.0)
            if BY_ROWS:
                b_w = load_weight(p_w, p_absmax, p_nested, p_code, p_offset, b_table, i_row + i_d0, i_c0, i_end, K,
                                  stride_n, stride_k, BK, BN, MODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE,
                                  p_x.dtype.element_ty)  # fmt: skip
            else:
                b_w = tl.trans(load_weight(p_w, p_absmax, p_nested, p_code, p_offset, b_table, i_row + i_c0, i_d0,
                                           i_end, K, stride_n, stride_k, BN, BK, MODE, BLOCKSIZE, NESTED,
                                           NESTED_BLOCKSIZE, p_x.dtype.element_ty))  # fmt: skip
            b_acc = dot(b_x, b_w, b_acc, "ieee")
        if ADAPTER:
            ranks = tl.where(i_e < E, r, 0)
            p_b += i_e.to(tl.int64) * b_stride_e
            for i_r0 in tl.range(0, ranks, BR, num_stages=1):
                i_r = i_r0 + tl.arange(0, BR)
                b_s = tl.load(p_s + i_m.to(tl.int64)[:, None] * r + i_r[None, :], mask=b_in & (i_r < r)[None, :],
                              other=0.0)  # fmt: skip
                b_b = tl.load(p_b + i_r.to(tl.int64)[:, None] * b_stride_r + i_c.to(tl.int64)[None, :] * b_stride_c,
                              mask=(i_r < r)[:, None] & (i_c < C)[None, :], other=0.0)  # fmt: skip
                b_acc = dot_narrow(b_s, b_b, b_acc, PRECISION)
        if BIAS:
            columns = tl.where(i_e < E, C, 0)
            b_bias = tl.load(p_bias + i_e.to(tl.int64) * C + i_c, mask=i_c < columns, other=0.0)
            b_acc += b_bias.to(tl.float32)[None, :]
        p_out = p_y + i_m.to(tl.int64)[:, None] * C + i_c[None, :]
        tl.store(p_out, round_to(b_acc, p_y.dtype.element_ty), mask=b_in & (i_c < C)[None, :])
