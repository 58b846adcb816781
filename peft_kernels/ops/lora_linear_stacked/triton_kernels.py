"""Triton kernels of lora_linear_stacked. Imported only when one is launched; the host side is `triton.py`.

A stack comes as tuples, an entry per projection. One launch serves all of them: the programs of a tile of rows run side
by side over the features of every projection, so that x stays in the L2 cache, and the gradient of x is one sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import dot, dot_narrow, keep_packed, load_weight, round_to, tile_of, unpack


@triton.jit
def table_of(p_table, MODE: tl.constexpr):
    """The table of pairs in registers where the weight is read by pairs; anything elsewhere."""
    b_table = tl.arange(0, 1)
    if MODE == 1 or MODE == 2:
        b_table = tl.load(p_table + tl.arange(0, 256)).to(tl.uint32, bitcast=True)
    return b_table


@triton.jit
def low_rank(
    p_b, p_s, i_n, i_m, N, M, r, b_acc, stride_n, stride_r, PRECISION: tl.constexpr, BR: tl.constexpr,
    LEFT: tl.constexpr,
):  # fmt: skip
    """b_acc [N, M] + b [N, r] s [M, r]^T, b at strides; without LEFT b_acc [M, N] + s b^T."""
    for i_r0 in tl.range(0, r, BR, num_stages=1):
        i_r = i_r0 + tl.arange(0, BR)
        p_bt = p_b + i_n.to(tl.int64)[:, None] * stride_n + i_r.to(tl.int64)[None, :] * stride_r
        b_b = tl.load(p_bt, mask=(i_n < N)[:, None] & (i_r < r)[None, :], other=0.0)
        p_st = p_s + i_m.to(tl.int64)[None, :] * r + i_r[:, None]
        b_s = tl.load(p_st, mask=(i_m < M)[None, :] & (i_r < r)[:, None], other=0.0)
        if LEFT:
            b_acc = dot_narrow(b_b, b_s, b_acc, PRECISION)
        else:
            b_acc = dot_narrow(tl.trans(b_s), tl.trans(b_b), b_acc, PRECISION)
    return b_acc


@triton.jit
def forward_tile(
    p_x, p_w, p_absmax, p_nested, p_code, p_offset, p_table, p_s, p_b, p_bias, p_y, i_tile, i_part,
    M, N, K, r, stride_n, stride_k, steps, scaling,
    ADAPTER: tl.constexpr, BIAS: tl.constexpr, MODE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """A tile of one projection's y [parts, M, N]: `steps` tiles of BK columns of x; part 0 starts at s B^T."""
    i_m0, i_n0 = tile_of(i_tile, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    i_m0, i_n0 = i_m0 * BM, i_n0 * BN
    i_m = i_m0 + tl.arange(0, BM)
    i_n = i_n0 + tl.arange(0, BN)
    b_acc = tl.zeros((BN, BM) if LEFT else (BM, BN), tl.float32)
    if ADAPTER:
        if i_part == 0:
            b_acc = low_rank(p_b, p_s, i_n, i_m, N, M, r, b_acc, r, 1, PRECISION, BR, LEFT) * scaling
    b_table = table_of(p_table, MODE)
    p_xt = p_x + tl.minimum(i_m, M - 1).to(tl.int64)[None, :] * K
    for i_step in range(i_part * steps, tl.minimum(tl.cdiv(K, BK), (i_part + 1) * steps)):
        i_k0 = i_step * BK
        i_k = (i_k0 + tl.arange(0, BK))[:, None]
        b_x = tl.load(p_xt + i_k, mask=(i_k < K) | EVEN_K, other=0.0)
        b_w = load_weight(p_w, p_absmax, p_nested, p_code, p_offset, p_table if MODE == 3 else b_table, i_n0, i_k0,
                          N, K, stride_n, stride_k, BN, BK, MODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE,
                          p_x.dtype.element_ty, EVEN_N, EVEN_K)  # fmt: skip
        if LEFT:
            b_acc = dot(b_w, b_x, b_acc, "ieee")
        else:
            b_acc = dot(tl.trans(b_x), tl.trans(b_w), b_acc, "ieee")
    b_y = tl.trans(b_acc) if LEFT else b_acc
    if BIAS:
        if i_part == 0:
            b_y = b_y + tl.load(p_bias + i_n, mask=i_n < N, other=0.0).to(tl.float32)[None, :]
    p_out = p_y + (i_part.to(tl.int64) * M + i_m.to(tl.int64))[:, None] * N + i_n[None, :]
    mask = (i_m < M)[:, None] & (i_n < N)[None, :]
    tl.store(p_out, round_to(b_y, p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "steps"])
def stacked_forward_kernel(
    p_x, p_w, p_absmax, p_nested, p_code, p_offset, p_table, p_s, p_b, p_bias, p_y, N, r, stride_n, stride_k, scaling,
    M, K, steps,
    COUNT: tl.constexpr, ADAPTER: tl.constexpr, BIAS: tl.constexpr, MODE: tl.constexpr, BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """Program (tile, part): the tiles of the first projection, then those of the second, and so on."""
    i_tile = tl.program_id(0)
    i_part = tl.program_id(1)
    i_first = 0
    for i in tl.static_range(COUNT):
        tiles = tl.cdiv(M, BM) * tl.cdiv(N[i], BN)
        if (i_tile >= i_first) & (i_tile < i_first + tiles):
            forward_tile(p_x, p_w[i], p_absmax[i], p_nested[i], p_code[i], p_offset[i], p_table[i], p_s[i], p_b[i],
                         p_bias[i], p_y[i], i_tile - i_first, i_part, M, N[i], K, r[i], stride_n[i], stride_k[i],
                         steps, scaling[i], ADAPTER[i], BIAS[i], MODE[i], BLOCKSIZE[i], NESTED[i],
                         NESTED_BLOCKSIZE[i], PRECISION, BM, BN, BK, BR, GROUP, EVEN_N[i], EVEN_K, LEFT)  # fmt: skip
        i_first += tiles


@triton.jit(do_not_specialize=["M", "steps"])
def stacked_backward_kernel(
    p_dx, p_dy, p_w, p_absmax, p_nested, p_code, p_offset, p_table, p_ds, p_a, p_seed, N, r, stride_n, stride_k,
    threshold, keep_scale, M, K, steps,
    COUNT: tl.constexpr, ADAPTER: tl.constexpr, DROPOUT: tl.constexpr, BY_FOUR: tl.constexpr, MODE: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """Part i_part of dx [parts, M, K], summed over the projections: `steps` of all their tiles of BN features.

    Part 0 starts at the adapters' terms, each with its own mask.
    """
    i_m0, i_k0 = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BK), GROUP)
    i_m0, i_k0 = i_m0 * BM, i_k0 * BK
    i_part = tl.program_id(1)
    i_m = i_m0 + tl.arange(0, BM)
    i_k = i_k0 + tl.arange(0, BK)
    b_acc = tl.zeros((BK, BM) if LEFT else (BM, BK), tl.float32)
    if i_part == 0:
        for i in tl.static_range(COUNT):
            if ADAPTER[i]:
                if DROPOUT[i]:
                    b_bits = keep_packed(p_seed[i], i_m0, i_k0, K, threshold[i], BM, BK, BY_FOUR)
                    b_low = low_rank(p_a[i], p_ds[i], i_k, i_m, K, M, r[i], tl.zeros_like(b_acc), 1, K, PRECISION, BR,
                                     LEFT)  # fmt: skip
                    b_keep = unpack(b_bits, BM, BK)
                    if LEFT:
                        b_keep = tl.trans(b_keep)
                    b_acc += tl.where(b_keep, b_low * keep_scale[i], 0.0)
                else:
                    b_acc = low_rank(p_a[i], p_ds[i], i_k, i_m, K, M, r[i], b_acc, 1, K, PRECISION, BR, LEFT)
    i_from, i_to = i_part * steps, (i_part + 1) * steps
    i_row = tl.minimum(i_m, M - 1).to(tl.int64)[None, :]
    for i in tl.static_range(COUNT):
        tiles = tl.cdiv(N[i], BN)
        b_table = table_of(p_table[i], MODE[i])
        for i_step in range(tl.maximum(i_from, 0), tl.minimum(i_to, tiles)):
            i_n0 = i_step * BN
            i_n = (i_n0 + tl.arange(0, BN))[:, None]
            b_dy = tl.load(p_dy[i] + i_row * N[i] + i_n, mask=(i_n < N[i]) | EVEN_N[i], other=0.0)
            b_w = load_weight(p_w[i], p_absmax[i], p_nested[i], p_code[i], p_offset[i],
                              p_table[i] if MODE[i] == 3 else b_table, i_n0, i_k0, N[i], K, stride_n[i], stride_k[i],
                              BN, BK, MODE[i], BLOCKSIZE[i], NESTED[i], NESTED_BLOCKSIZE[i],
                              p_dy[i].dtype.element_ty, EVEN_N[i], EVEN_K)  # fmt: skip
            if LEFT:
                b_acc = dot(tl.trans(b_w), b_dy, b_acc, "ieee")
            else:
                b_acc = dot(tl.trans(b_dy), b_w, b_acc, "ieee")
        i_from -= tiles
        i_to -= tiles
    p_out = p_dx + (i_part.to(tl.int64) * M + i_m.to(tl.int64))[:, None] * K + i_k[None, :]
    mask = (i_m < M)[:, None] & (i_k < K)[None, :]
    tl.store(p_out, round_to(tl.trans(b_acc) if LEFT else b_acc, p_dx.dtype.element_ty), mask=mask)
