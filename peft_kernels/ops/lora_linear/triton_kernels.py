"""Triton kernels of lora_linear. Imported only when one is launched; the host side is `triton.py`.

    s   = drop(x) A^T                          project_kernel
    y   = x W^T + scaling * (s B^T) + bias     forward_kernel; of dora_linear with gain_kernel, too
    ds  = dy B and dB = dy^T s         outer_kernel, one pass over dy
    dA  = ds^T drop(x)                         outer_kernel
    dx  = dy W + drop'(ds A)                   backward_kernel
    W[rows, columns] for many rows of x        decode_kernel

With LEFT the two large products have the *weight* as the left operand (the accumulator is [features, rows]): the
decoded tile then goes from registers into the tensor cores of sm_90, and few rows cost few columns instead of a padded
64-row tile. Without it the weight goes there through shared memory: fewer instructions, more of that memory's time.
Whenever a sum is split over programs, the parts are written out and `reduce_kernel` adds them in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import (
    addends,
    any_of,
    dot,
    dot_wide,
    keep_mask,
    keep_packed,
    load_turned,
    load_weight,
    low_rank,
    round_to,
    table_of,
    tile_of,
    unpack,
    wide_sum,
)

_UNSPECIALISED = ["M", "threshold", "steps", "parts", "scale", "keep_scale", "scaling", "numel"]


@triton.jit
def project_rows(
    p_x, p_a, p_seed, i_m, b_in, i_r, first, last, K, r, threshold, keep_scale,
    DROPOUT: tl.constexpr, BY_FOUR: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """drop(x)[i_m] A[i_r]^T [BM, BR] over the tiles first .. last - 1 of BK columns; zero where b_in [BM] says so."""
    b_rows = b_in[:, None]
    p_xrow = p_x + i_m.to(tl.int64)[:, None] * K
    p_arow = p_a + i_r.to(tl.int64)[:, None] * K
    TIMES: tl.constexpr = addends(p_x.dtype.element_ty, p_a.dtype.element_ty)
    b_acc = tl.zeros((BM, BR * TIMES), tl.float32)
    for i_step in range(first, last):
        i_k0 = i_step * BK
        i_k = (i_k0 + tl.arange(0, BK))[None, :]
        b_x = tl.load(p_xrow + i_k, mask=b_rows & (i_k < K), other=0.0)
        if DROPOUT:
            b_keep = keep_mask(p_seed, i_m, i_k0, K, threshold, BM, BK, BY_FOUR)
            b_x = tl.where(b_keep, b_x, 0.0)
        b_a = tl.load(p_arow + i_k, mask=(i_r < r)[:, None] & (i_k < K), other=0.0)
        b_acc = dot_wide(b_x, tl.trans(b_a), b_acc)
    b_s = wide_sum(b_acc, TIMES)
    if DROPOUT:
        b_s = b_s * keep_scale
    return b_s


@triton.jit(do_not_specialize=_UNSPECIALISED)
def project_kernel(
    p_x, p_a, p_s, p_seed, p_mix, M, K, r, each, steps, threshold, keep_scale,
    DROPOUT: tl.constexpr, BY_FOUR: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Part i_part of s = drop(x) A^T: `steps` tiles of BK columns of x [M, K]. p_s: float32 [parts, M, r].

    p_mix: None, or [M, r / each], a weight of `each` ranks; where a tile has none that is not zero s is zero.
    """
    i_part = tl.program_id(2)
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    i_r = tl.program_id(1) * BR + tl.arange(0, BR)
    first = i_part * steps
    last = tl.minimum(tl.cdiv(K, BK), (i_part + 1) * steps)
    if p_mix is not None:
        p_of = p_mix + i_m.to(tl.int64)[:, None] * (r // each) + (i_r // each)[None, :]
        b_mix = tl.load(p_of, mask=(i_m < M)[:, None] & (i_r < r)[None, :], other=0.0)
        last = tl.where(any_of(b_mix), last, first)
    b_s = project_rows(p_x, p_a, p_seed, i_m, i_m < M, i_r, first, last, K, r, threshold, keep_scale, DROPOUT, BY_FOUR,
                       BM, BK, BR)  # fmt: skip
    i_out = (i_part.to(tl.int64) * M + i_m.to(tl.int64))[:, None] * r + i_r[None, :]
    tl.store(p_s + i_out, b_s, mask=(i_m < M)[:, None] & (i_r < r)[None, :])


@triton.jit
def add_output(
    p_x, p_w, p_absmax, p_nested, p_code, p_offset, p_table, b_row, i_n0, first, last, N, K, stride_n, stride_k, b_acc,
    MODE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, LEFT: tl.constexpr,
    p_turn=None, TURN: tl.constexpr = 0, ONE_TURN: tl.constexpr = False,
):  # fmt: skip
    """b_acc [BN, BM] + (x W^T)^T over the tiles first .. last - 1 of BK columns, x at the rows b_row [BM]; without
    LEFT b_acc [BM, BN] + x W^T. TURN: x is turned by the blocks of that size at p_turn; see `load_turned`."""
    b_table = table_of(p_table, MODE)
    p_xt = p_x + b_row.to(tl.int64)[None, :] * K
    for i_step in range(first, last):
        i_k0 = i_step * BK
        i_k = (i_k0 + tl.arange(0, BK))[:, None]
        if TURN:
            b_x = load_turned(p_x, p_turn, b_row, i_k0, K, b_row.shape[0], BK, TURN, ONE_TURN, EVEN_K, LEFT)
        else:
            b_x = tl.load(p_xt + i_k, mask=(i_k < K) | EVEN_K, other=0.0)
        b_w = load_weight(p_w, p_absmax, p_nested, p_code, p_offset, p_table if MODE >= 3 else b_table, i_n0, i_k0,
                          N, K, stride_n, stride_k, BN, BK, MODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE,
                          p_x.dtype.element_ty, EVEN_N, EVEN_K)  # fmt: skip
        if LEFT:
            b_acc = dot(b_w, b_x, b_acc, "ieee")
        else:
            b_acc = dot(b_x if TURN else tl.trans(b_x), tl.trans(b_w), b_acc, "ieee")
    return b_acc


@triton.jit
def forward_tile(
    p_x, p_w, p_absmax, p_nested, p_code, p_offset, p_table, p_s, p_b, p_bias, p_y, p_gain, p_h, i_tile, i_part,
    M, N, K, r, stride_n, stride_k, steps, scaling,
    ADAPTER: tl.constexpr, BIAS: tl.constexpr, GAIN: tl.constexpr, SAVE_H: tl.constexpr, ADD: tl.constexpr,
    MODE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, LEFT: tl.constexpr,
    p_turn=None, TURN: tl.constexpr = 0, ONE_TURN: tl.constexpr = False, SPARSE: tl.constexpr = False,
):  # fmt: skip
    """Tile i_tile of part i_part (`steps` tiles of BK columns of x) of y [parts, M, N]. Part 0 has s B^T and the bias.

    GAIN (one part): y = gain * h + bias with the rest of the sum as h; SAVE_H stores it, ADD adds what y held.
    """
    i_m0, i_n0 = tile_of(i_tile, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    i_m0, i_n0 = i_m0 * BM, i_n0 * BN
    i_m = i_m0 + tl.arange(0, BM)
    i_n = i_n0 + tl.arange(0, BN)
    b_acc = tl.zeros((BN, BM) if LEFT else (BM, BN), tl.float32)
    if ADAPTER:
        # first, so that reading s and B hides behind the large product and rounding hits the small term
        if i_part == 0:
            b_acc = low_rank(p_b, p_s, i_n, i_m, N, M, r, b_acc, r, 1, PRECISION, BR, LEFT, SPARSE) * scaling
    # rows beyond M repeat the last one instead of being masked in every step; they are not stored
    b_acc = add_output(p_x, p_w, p_absmax, p_nested, p_code, p_offset, p_table, tl.minimum(i_m, M - 1), i_n0,
                       i_part * steps, tl.minimum(tl.cdiv(K, BK), (i_part + 1) * steps), N, K, stride_n, stride_k,
                       b_acc, MODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, BN, BK, EVEN_N, EVEN_K, LEFT, p_turn, TURN,
                       ONE_TURN)  # fmt: skip
    b_y = tl.trans(b_acc) if LEFT else b_acc
    i_out = (i_part.to(tl.int64) * M + i_m.to(tl.int64))[:, None] * N + i_n[None, :]
    b_in = (i_m < M)[:, None] & (i_n < N)[None, :]
    if GAIN:
        if SAVE_H:
            tl.store(p_h + i_out, round_to(b_y, p_h.dtype.element_ty), mask=b_in)
        b_y = b_y * tl.load(p_gain + i_n, mask=i_n < N, other=0.0)[None, :]
        if ADD:
            b_y = b_y + tl.load(p_y + i_out, mask=b_in, other=0.0).to(tl.float32)
    if BIAS:
        if i_part == 0:
            b_y = b_y + tl.load(p_bias + i_n, mask=i_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + i_out, round_to(b_y, p_y.dtype.element_ty), mask=b_in)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def forward_kernel(
    p_x, p_w, p_absmax, p_nested, p_code, p_offset, p_table, p_s, p_b, p_bias, p_y, p_gain, p_h, p_turn,
    M, N, K, r, stride_n, stride_k, steps, scaling,
    ADAPTER: tl.constexpr, BIAS: tl.constexpr, GAIN: tl.constexpr, SAVE_H: tl.constexpr, ADD: tl.constexpr,
    MODE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, LEFT: tl.constexpr, TURN: tl.constexpr, ONE_TURN: tl.constexpr,
    SPARSE: tl.constexpr,
):  # fmt: skip
    """`forward_tile` of program (tile, part)."""
    forward_tile(p_x, p_w, p_absmax, p_nested, p_code, p_offset, p_table, p_s, p_b, p_bias, p_y, p_gain, p_h,
                 tl.program_id(0), tl.program_id(1), M, N, K, r, stride_n, stride_k, steps, scaling, ADAPTER, BIAS,
                 GAIN, SAVE_H, ADD, MODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, PRECISION, BM, BN, BK, BR, GROUP,
                 EVEN_N, EVEN_K, LEFT, p_turn, TURN, ONE_TURN, SPARSE)  # fmt: skip


@triton.jit
def add_input(
    p_dy, p_w, p_absmax, p_nested, p_code, p_offset, p_table, b_row, i_k0, first, last, N, K, stride_n, stride_k, b_acc,
    MODE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """b_acc [BK, BM] + (dy W)^T over the tiles first .. last - 1 of BN features, dy at the rows b_row [BM]; without
    LEFT b_acc [BM, BK] + dy W."""
    b_table = table_of(p_table, MODE)
    p_dyt = p_dy + b_row.to(tl.int64)[None, :] * N
    for i_step in range(first, last):
        i_n0 = i_step * BN
        i_n = (i_n0 + tl.arange(0, BN))[:, None]
        b_dy = tl.load(p_dyt + i_n, mask=(i_n < N) | EVEN_N, other=0.0)
        b_w = load_weight(p_w, p_absmax, p_nested, p_code, p_offset, p_table if MODE >= 3 else b_table, i_n0, i_k0,
                          N, K, stride_n, stride_k, BN, BK, MODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE,
                          p_dy.dtype.element_ty, EVEN_N, EVEN_K)  # fmt: skip
        if LEFT:
            b_acc = dot(tl.trans(b_w), b_dy, b_acc, "ieee")
        else:
            b_acc = dot(tl.trans(b_dy), b_w, b_acc, "ieee")
    return b_acc


@triton.jit(do_not_specialize=_UNSPECIALISED)
def backward_kernel(
    p_dy, p_w, p_absmax, p_nested, p_code, p_offset, p_table, p_ds, p_a, p_seed, p_dx,
    M, N, K, r, stride_n, stride_k, steps, threshold, keep_scale,
    ADAPTER: tl.constexpr, DROPOUT: tl.constexpr, BY_FOUR: tl.constexpr, MODE: tl.constexpr, BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, LEFT: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Part i_part (`steps` tiles of BN columns of dy) of dx [parts, M, K]; part 0 starts at drop'(ds A)."""
    i_m0, i_k0 = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BK), GROUP)
    i_m0, i_k0 = i_m0 * BM, i_k0 * BK
    i_part = tl.program_id(1)
    i_m = i_m0 + tl.arange(0, BM)
    i_k = i_k0 + tl.arange(0, BK)
    b_acc = tl.zeros((BK, BM) if LEFT else (BM, BK), tl.float32)
    if ADAPTER:
        if i_part == 0:
            if DROPOUT:  # drawn first and kept as bits: beside the accumulator there is no room for Philox's state
                b_bits = keep_packed(p_seed, i_m, i_k0, K, threshold, BM, BK, BY_FOUR)
            b_acc = low_rank(p_a, p_ds, i_k, i_m, K, M, r, b_acc, 1, K, PRECISION, BR, LEFT, SPARSE)
            if DROPOUT:
                b_keep = unpack(b_bits, BM, BK)
                if LEFT:
                    b_keep = tl.trans(b_keep)
                b_acc = tl.where(b_keep, b_acc * keep_scale, 0.0)
    b_acc = add_input(p_dy, p_w, p_absmax, p_nested, p_code, p_offset, p_table, tl.minimum(i_m, M - 1),
                      i_k0, i_part * steps, tl.minimum(tl.cdiv(N, BN), (i_part + 1) * steps), N, K, stride_n, stride_k,
                      b_acc, MODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, BN, BK, EVEN_N, EVEN_K, LEFT)  # fmt: skip
    b_dx = tl.trans(b_acc) if LEFT else b_acc
    p_out = p_dx + (i_part.to(tl.int64) * M + i_m.to(tl.int64))[:, None] * K + i_k[None, :]
    tl.store(p_out, round_to(b_dx, p_dx.dtype.element_ty), mask=(i_m < M)[:, None] & (i_k < K)[None, :])


@triton.jit
def outer_rows(
    p_z, p_t, p_bt, p_ds, p_seed, p_order, i_first, first, last, M, i_c0, i_r, C, r, stride_t, threshold, ds_scale,
    WITH_DS: tl.constexpr, DROPOUT: tl.constexpr, BY_FOUR: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, SPARSE: tl.constexpr = False,
):  # fmt: skip
    """drop(z)^T t [BC, BR] over the tiles first .. last - 1 of BM rows from i_first on, up to M; see `outer_kernel`.

    p_order: None, or which row is at each place. p_t and p_ds have rows of stride_t, of which r are columns.
    p_bt [BC, BR]: where b's tile is. SPARSE, without DS: of rows whose t is zero z is not read.
    """
    i_c = i_c0 + tl.arange(0, BC)
    b_cs = i_c < C
    b_rs = (i_r < r)[None, :]
    TIMES: tl.constexpr = addends(p_z.dtype.element_ty, p_t.dtype.element_ty)
    b_acc = tl.zeros((BC, BR * TIMES), tl.float32)
    if WITH_DS:
        TIMES_DS: tl.constexpr = addends(p_z.dtype.element_ty, p_bt.dtype.element_ty)
        b_b = tl.load(p_bt, mask=b_cs[:, None] & b_rs, other=0.0)
    for i_step in range(first, last):
        i_m = i_first + i_step * BM + tl.arange(0, BM)
        b_ms = (i_m < M)[:, None]
        if p_order is not None:
            i_m = tl.load(p_order + i_m, mask=i_m < M, other=0)
        i_t = i_m.to(tl.int64)[:, None] * stride_t + i_r[None, :]
        b_in = b_ms & b_cs[None, :]
        if SPARSE:
            columns = tl.where(any_of(tl.load(p_t + i_t, mask=b_ms & b_rs, other=0.0)), C, 0)
            b_in = b_ms & (i_c < columns)[None, :]
        b_z = tl.load(p_z + i_m.to(tl.int64)[:, None] * C + i_c[None, :], mask=b_in, other=0.0)
        b_t = tl.load(p_t + i_t, mask=b_ms & b_rs, other=0.0)
        if DROPOUT:
            b_keep = keep_mask(p_seed, i_m, i_c0, C, threshold, BM, BC, BY_FOUR)
            b_z = tl.where(b_keep, b_z, 0.0)
        b_acc = dot_wide(tl.trans(b_z), b_t, b_acc)
        if WITH_DS:
            b_ds = dot_wide(b_z, b_b, tl.zeros((BM, BR * TIMES_DS), tl.float32))
            b_ds = wide_sum(b_ds, TIMES_DS)
            if ds_scale is not None:
                b_ds = b_ds * ds_scale
            tl.store(p_ds + i_t, b_ds, mask=b_ms & b_rs)
    return wide_sum(b_acc, TIMES)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def outer_kernel(
    p_z, p_t, p_b, p_outer, p_ds, p_seed, M, C, r, stride_c, stride_r, steps, threshold, keep_scale,
    WITH_DS: tl.constexpr, DROPOUT: tl.constexpr, BY_FOUR: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """One pass over z [M, C]: outer = drop(z)^T t for `steps` tiles of BM rows and, WITH_DS, ds = z b as well.

    t: float32 [M, r]. p_outer: float32 [parts, C * r], laid out by stride_c and stride_r. b: [C, r].
    p_ds: float32 [column tiles, M, r]: this tile's share of ds.
    """
    i_tile = tl.program_id(0)
    i_part = tl.program_id(2)
    i_c = i_tile * BC + tl.arange(0, BC)
    i_r = tl.program_id(1) * BR + tl.arange(0, BR)
    p_bt = p_b + i_c.to(tl.int64)[:, None] * r + i_r[None, :]
    b_outer = outer_rows(p_z, p_t, p_bt, p_ds + i_tile.to(tl.int64) * M * r, p_seed, None, 0, i_part * steps,
                         tl.minimum(tl.cdiv(M, BM), (i_part + 1) * steps), M, i_tile * BC, i_r, C, r, r, threshold,
                         None, WITH_DS, DROPOUT, BY_FOUR, BM, BC, BR, SPARSE)  # fmt: skip
    if DROPOUT:
        b_outer = b_outer * keep_scale
    i_out = i_c.to(tl.int64)[:, None] * stride_c + i_r.to(tl.int64)[None, :] * stride_r
    tl.store(p_outer + i_part.to(tl.int64) * C * r + i_out, b_outer, mask=(i_c < C)[:, None] & (i_r < r)[None, :])


@triton.jit(do_not_specialize=_UNSPECIALISED)
def reduce_kernel(p_part, p_out, numel, parts, scale, BLOCK: tl.constexpr):
    """out = scale * (part 0 + part 1 + ...), in that order and in float32. p_part: [parts, numel] in any dtype."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_mask = i < numel
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i_part in range(parts):
        b_sum = b_sum + tl.load(p_part + i_part * numel.to(tl.int64) + i, mask=b_mask, other=0.0)
    tl.store(p_out + i, round_to(b_sum * scale, p_out.dtype.element_ty), mask=b_mask)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def gain_kernel(
    p_part, p_gain, p_bias, p_y, p_h, M, N, parts,
    BIAS: tl.constexpr, SAVE_H: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The end of forward_kernel with GAIN, where h comes in parts: p_part [parts, M, N], added in order."""
    i_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    i_n = tl.program_id(1) * BN + tl.arange(0, BN)
    b_cols = i_n < N
    b_in = (i_m < M)[:, None] & b_cols[None, :]
    i = i_m[:, None] * N + i_n[None, :]
    b_h = tl.zeros((BM, BN), tl.float32)
    for i_part in range(parts):
        b_h = b_h + tl.load(p_part + i_part * (M.to(tl.int64) * N) + i, mask=b_in, other=0.0).to(tl.float32)
    if SAVE_H:
        tl.store(p_h + i, round_to(b_h, p_h.dtype.element_ty), mask=b_in)
    b_y = b_h * tl.load(p_gain + i_n, mask=b_cols, other=0.0)[None, :]
    if ADD:
        b_y = b_y + tl.load(p_y + i, mask=b_in, other=0.0).to(tl.float32)
    if BIAS:
        b_y = b_y + tl.load(p_bias + i_n, mask=b_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(p_y + i, round_to(b_y, p_y.dtype.element_ty), mask=b_in)


@triton.jit
def decode_kernel(
    p_w, p_absmax, p_nested, p_code, p_offset, p_table, p_out, first_n, first_k, rows, columns, N, K,
    stride_n, stride_k, MODE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] = W[first_n:, first_k:], decoded. first_k is a multiple of BK."""
    i_n0, i_k0 = tl.program_id(0) * BN, tl.program_id(1) * BK
    b_table = tl.arange(0, 1)
    if MODE == 1 or MODE == 2:
        b_table = tl.load(p_table + tl.arange(0, 256)).to(tl.uint32, bitcast=True)
    b_w = load_weight(p_w, p_absmax, p_nested, p_code, p_offset, p_table if MODE >= 3 else b_table, first_n + i_n0,
                      first_k + i_k0, N, K, stride_n, stride_k, BN, BK, MODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE,
                      p_out.dtype.element_ty)  # fmt: skip
    i_n = i_n0 + tl.arange(0, BN)[:, None]
    i_k = i_k0 + tl.arange(0, BK)[None, :]
    tl.store(p_out + i_n.to(tl.int64) * columns + i_k, b_w, mask=(i_n < rows) & (i_k < columns))
