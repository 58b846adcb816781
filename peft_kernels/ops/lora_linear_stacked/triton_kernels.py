"""Triton kernels of lora_linear_stacked. Imported only when one is launched; the host side is `triton.py`.

A stack comes as tuples, an entry per projection. One launch serves all of them: the programs of a tile of rows run side
by side over the features of every projection, so that x stays in the L2 cache, and the gradient of x is one sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import keep_packed, low_rank, round_to, tile_of, unpack
from ..lora_linear.triton_kernels import add_input, forward_tile


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
                         p_bias[i], p_y[i], None, None, i_tile - i_first, i_part, M, N[i], K, r[i], stride_n[i],
                         stride_k[i], steps, scaling[i], ADAPTER[i], BIAS[i], False, False, False, MODE[i],
                         BLOCKSIZE[i], NESTED[i], NESTED_BLOCKSIZE[i], PRECISION, BM, BN, BK, BR, GROUP, EVEN_N[i],
                         EVEN_K, LEFT)  # fmt: skip
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
                    b_bits = keep_packed(p_seed[i], i_m, i_k0, K, threshold[i], BM, BK, BY_FOUR)
                    b_low = low_rank(p_a[i], p_ds[i], i_k, i_m, K, M, r[i], tl.zeros_like(b_acc), 1, K, PRECISION, BR,
                                     LEFT)  # fmt: skip
                    b_keep = unpack(b_bits, BM, BK)
                    if LEFT:
                        b_keep = tl.trans(b_keep)
                    b_acc += tl.where(b_keep, b_low * keep_scale[i], 0.0)
                else:
                    b_acc = low_rank(p_a[i], p_ds[i], i_k, i_m, K, M, r[i], b_acc, 1, K, PRECISION, BR, LEFT)
    i_from, i_to = i_part * steps, (i_part + 1) * steps
    b_row = tl.minimum(i_m, M - 1)
    for i in tl.static_range(COUNT):
        tiles = tl.cdiv(N[i], BN)
        b_acc = add_input(p_dy[i], p_w[i], p_absmax[i], p_nested[i], p_code[i], p_offset[i], p_table[i], b_row, i_k0,
                          tl.maximum(i_from, 0), tl.minimum(i_to, tiles), N[i], K, stride_n[i], stride_k[i], b_acc,
                          MODE[i], BLOCKSIZE[i], NESTED[i], NESTED_BLOCKSIZE[i], BN, BK, EVEN_N[i], EVEN_K,
                          LEFT)  # fmt: skip
        i_from -= tiles
        i_to -= tiles
    p_out = p_dx + (i_part.to(tl.int64) * M + i_m.to(tl.int64))[:, None] * K + i_k[None, :]
    mask = (i_m < M)[:, None] & (i_k < K)[None, :]
    tl.store(p_out, round_to(tl.trans(b_acc) if LEFT else b_acc, p_dx.dtype.element_ty), mask=mask)
