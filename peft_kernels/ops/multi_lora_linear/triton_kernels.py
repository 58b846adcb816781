"""Triton kernels of multi_lora_linear. Imported only when one is launched; the host side is `triton.py`.

    order = rows of x, grouped by adapter; where each group begins     plan_kernel
    s   = drop(x) A_i^T, and ds = dy B_i^T alone                       multi_project_kernel
    y   = x W^T + scaling_i * (s B_i) + bias                           multi_forward_kernel
    ds  = dy B_i^T and dB_i = s^T dy, in one pass; dA_i = ds^T drop(x) multi_outer_kernel
    dx  = dy W + drop'(ds A_i)                                         multi_backward_kernel

A stack holds A_i [r_i, K] and B_i [r_i, N] (lora_B transposed) as rows of a and b, so one function adds s B_i to y and
ds A_i to dx. Tiles of rows are cut from `order`. Where a tile reads an adapter's weights and nothing else (project,
outer) it has rows of one adapter; where it decodes W it is full, whatever adapters its rows have.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import dot_narrow, keep_packed, round_to, tile_of, unpack
from ..lora_linear.triton_kernels import add_input, add_output, outer_rows, project_rows

_UNSPECIALISED = ["M", "S", "P", "steps", "parts", "threshold", "keep_scale", "rows"]


@triton.jit
def slot_of(p_adapters, i_row, b_mask, S):
    """The adapter of rows of x; S, which no adapter has, where that is the base alone or one that is not there."""
    b_slot = tl.load(p_adapters + i_row, mask=b_mask, other=-1)
    return tl.where((b_slot >= 0) & (b_slot < S), b_slot, S).to(tl.int32)


@triton.jit
def span_of(p_starts, p_ranks, b_slot, r, S, P):
    """(first row in a and b, rank) of adapters, in 32 bits, as P has; rank 0 for the base, and for rows that are not
    there."""
    b_in = (b_slot >= 0) & (b_slot < S)
    b_start = tl.load(p_starts + b_slot, mask=b_in, other=0)
    b_rank = tl.load(p_ranks + b_slot, mask=b_in, other=0)
    b_in = (b_rank > 0) & (b_rank <= r) & (b_start >= 0) & (b_start <= P - b_rank)
    return tl.where(b_in, b_start, 0).to(tl.int32), tl.where(b_in, b_rank, 0).to(tl.int32)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def plan_kernel(p_adapters, p_order, p_bounds, M, S, rows, BQ: tl.constexpr, BM: tl.constexpr):
    """order [M]: the rows of x by adapter, those of one in their order. bounds [S + 2]: where each group begins in it;
    the last group is the base's. rows: M, or 0 where `order` is known.

    Every place is found by counting the rows that come before: as many comparisons as pairs of rows, but one launch, no
    atomics, and nothing to wait for.
    """
    i_query = tl.program_id(0) * BQ + tl.arange(0, BQ)
    b_row = i_query < rows
    i_bound = i_query - rows
    b_slot = tl.where(b_row, slot_of(p_adapters, i_query, b_row, S), i_bound)[:, None]
    b_before = tl.where(b_row, i_query, 0)[:, None]
    b_count = tl.zeros((BQ,), tl.int32)
    for i_m0 in range(0, M, BM):
        i_m = i_m0 + tl.arange(0, BM)
        b_other = tl.where(i_m < M, slot_of(p_adapters, i_m, i_m < M, S), S + 2)[None, :]
        b_less = (b_other < b_slot) | ((b_other == b_slot) & (i_m[None, :] < b_before))
        b_count += tl.sum(b_less.to(tl.int32), 1)
    tl.store(p_order + b_count, i_query, mask=b_row)
    tl.store(p_bounds + i_bound, b_count, mask=(i_bound >= 0) & (i_bound < S + 2))


@triton.jit
def group_tile(p_bounds, i_tile, size, S):
    """(adapter, first place in `order`, the place after the last) of tile i_tile, of `size` places of one group.

    A group that begins at f is given the tiles from f // size + min(adapter, f) on: a number that rises, from one group
    that has rows to the next, by at least the tiles that it needs. Tiles between are empty.
    """
    i_slot = tl.full((), -1, tl.int32)
    for i_0 in range(0, S + 1, 256):
        i = i_0 + tl.arange(0, 256)
        b_from = tl.load(p_bounds + i, mask=i <= S, other=0)
        i_slot += tl.sum(((i <= S) & (b_from // size + tl.minimum(i, b_from) <= i_tile)).to(tl.int32), 0)
    i_from, i_to = tl.load(p_bounds + i_slot), tl.load(p_bounds + i_slot + 1)
    i_first = i_from + (i_tile - (i_from // size + tl.minimum(i_slot, i_from))) * size
    return i_slot, i_first, tl.minimum(i_first + size, i_to)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def multi_project_kernel(
    p_x, p_a, p_s, p_seed, p_order, p_bounds, p_starts, p_ranks, p_scaling, M, K, r, S, P, steps, threshold,
    keep_scale, SCALE: tl.constexpr, DROPOUT: tl.constexpr, BY_FOUR: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Part i_part of s = drop(x) A_i^T, SCALE: times scaling_i. p_s: float32 [parts, M, r], zero beyond the ranks."""
    i_slot, i_first, i_last = group_tile(p_bounds, tl.program_id(0), BM, S)
    if i_first < i_last:
        i_start, i_rank = span_of(p_starts, p_ranks, i_slot, r, S, P)
        i_part = tl.program_id(2)
        i_r0 = tl.program_id(1) * BR
        i_m = i_first + tl.arange(0, BM)
        b_in = i_m < i_last
        b_row = tl.load(p_order + i_m, mask=b_in, other=0)
        i_r = i_r0 + tl.arange(0, BR)
        i_end = tl.where(i_r0 < i_rank, tl.minimum(tl.cdiv(K, BK), (i_part + 1) * steps), 0)
        b_s = project_rows(p_x, p_a + i_start.to(tl.int64) * K, p_seed, b_row, b_in, i_r, i_part * steps, i_end, K,
                           i_rank, threshold, keep_scale, DROPOUT, BY_FOUR, BM, BK, BR)  # fmt: skip
        if SCALE:
            b_s = b_s * tl.load(p_scaling + i_slot, mask=i_slot < S, other=0.0)
        i_out = (i_part.to(tl.int64) * M + b_row.to(tl.int64))[:, None] * r + i_r[None, :]
        tl.store(p_s + i_out, b_s, mask=b_in[:, None] & (i_r < r)[None, :])


@triton.jit
def add_by_row(
    p_b, p_s, b_row, b_start, b_rank, i_n, N, r, first, stride, b_acc, UNROLL: tl.constexpr, LEFT: tl.constexpr
):
    """b_acc + s B_i, [N, M] or without LEFT [M, N], where every row of the tile reads its own B_i.

    Of the ranks, as of the steps of `add_by_group`, first, first + stride and so on.
    """
    p_srow = p_s + b_row.to(tl.int64) * r
    for i_r in tl.range(first, tl.max(b_rank, 0), stride, loop_unroll_factor=UNROLL):
        b_has = i_r < b_rank
        b_s = tl.load(p_srow + i_r, mask=b_has, other=0.0)
        if LEFT:
            p_bt = p_b + (b_start + i_r).to(tl.int64)[None, :] * N + i_n[:, None]
            b_b = tl.load(p_bt, mask=b_has[None, :] & (i_n < N)[:, None], other=0.0).to(tl.float32)
            b_acc += b_b * b_s[None, :]
        else:
            p_bt = p_b + (b_start + i_r).to(tl.int64)[:, None] * N + i_n[None, :]
            b_b = tl.load(p_bt, mask=b_has[:, None] & (i_n < N)[None, :], other=0.0).to(tl.float32)
            b_acc += b_b * b_s[:, None]
    return b_acc


@triton.jit
def add_by_group(
    p_b, p_s, b_row, b_start, b_rank, b_group, groups, i_n, N, r, first, stride, b_acc, PRECISION: tl.constexpr,
    BU: tl.constexpr, BR: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """b_acc + s B_i, [N, M] or without LEFT [M, N]: a product for every BU groups of the tile and BR of their ranks.

    The B_i of a step stand below each other, and s is zero outside of a row's own.
    """
    steps = tl.cdiv(r, BR)
    b_lost = tl.zeros_like(b_group)
    for i_step in tl.range(first, tl.cdiv(groups, BU) * steps, stride, num_stages=1):
        i_u = i_step // steps * BU + tl.arange(0, BU)
        i_r = i_step % steps * BR + tl.arange(0, BR)
        b_of = b_group[:, None] == i_u[None, :]  # every row of a group knows where its adapter is
        b_from = tl.max(tl.where(b_of, b_start[:, None], 0), 0)
        b_ends = tl.max(tl.where(b_of, b_rank[:, None], 0), 0)
        b_has = tl.reshape(i_r[None, :] < b_ends[:, None], (BU * BR,))
        b_from = tl.reshape(b_from[:, None] + i_r[None, :], (BU * BR,))
        b_u = tl.reshape(tl.broadcast_to(i_u[:, None], (BU, BR)), (BU * BR,))
        b_r = tl.reshape(tl.broadcast_to(i_r[None, :], (BU, BR)), (BU * BR,))
        p_bt = p_b + b_from.to(tl.int64)[None, :] * N + i_n[:, None]
        b_b = tl.load(p_bt, mask=b_has[None, :] & (i_n < N)[:, None], other=0.0).to(tl.float32)
        # by rows of x: with the ranks first Triton 3.6 gives every thread all rows, and spills
        p_st = p_s + b_row.to(tl.int64)[:, None] * r + b_r[None, :]
        b_own = b_has[None, :] & (b_group[:, None] == b_u[None, :])
        b_s = tl.load(p_st, mask=b_own, other=0.0)
        # Zero times a weight that is not finite is not zero. Such weights leave the product, and NaN are the rows of
        # their own adapter: all of it, because a mask of s would be moved behind a layout that masks cannot have.
        b_bad = tl.max((b_b - b_b != 0).to(tl.int32), 0)[None, :]
        b_b = tl.where(b_b - b_b == 0, b_b, 0.0)
        b_lost = tl.maximum(b_lost, tl.max(tl.where(b_own, b_bad, 0), 1))
        if LEFT:
            b_acc = dot_narrow(b_b, tl.trans(b_s), b_acc, PRECISION)
        else:
            b_acc = dot_narrow(b_s, tl.trans(b_b), b_acc, PRECISION)
    b_lost = tl.where(b_lost > 0, float("nan"), 0.0)
    return b_acc + (b_lost[None, :] if LEFT else b_lost[:, None])


@triton.jit
def add_adapters(
    p_b, p_s, p_order, p_adapters, p_starts, p_ranks, i_m0, b_row, b_slot, i_n, M, N, r, S, P, first, stride, b_acc,
    PRECISION: tl.constexpr, BM: tl.constexpr, BU: tl.constexpr, BR: tl.constexpr, BY_ROW: tl.constexpr,
    LEFT: tl.constexpr,
):  # fmt: skip
    """b_acc + s B_i for the rows of a tile that begins at place i_m0 of `order`: where it has more than BY_ROW steps by
    group, by row; with BY_ROW -1 always by row, with None never."""
    UNROLL: tl.constexpr = 64 // BM
    b_start, b_rank = span_of(p_starts, p_ranks, b_slot, r, S, P)
    if BY_ROW == -1:
        b_acc = add_by_row(p_b, p_s, b_row, b_start, b_rank, i_n, N, r, first, stride, b_acc, UNROLL, LEFT)
    else:
        i = tl.arange(0, BM)
        b_before = tl.load(p_order + tl.minimum(i_m0 + i, M) - 1, mask=i > 0, other=0)
        b_new = (i > 0) & (i_m0 + i < M) & (b_slot != slot_of(p_adapters, b_before, i > 0, S))
        b_group = tl.cumsum(b_new.to(tl.int32), 0)
        groups = tl.max(b_group, 0) + 1
        if BY_ROW is None:
            b_acc = add_by_group(p_b, p_s, b_row, b_start, b_rank, b_group, groups, i_n, N, r, first, stride, b_acc,
                                 PRECISION, BU, BR, LEFT)  # fmt: skip
        else:
            if tl.cdiv(groups, BU) * tl.cdiv(r, BR) > BY_ROW:
                b_acc = add_by_row(p_b, p_s, b_row, b_start, b_rank, i_n, N, r, first, stride, b_acc, UNROLL, LEFT)
            else:
                b_acc = add_by_group(p_b, p_s, b_row, b_start, b_rank, b_group, groups, i_n, N, r, first, stride,
                                     b_acc, PRECISION, BU, BR, LEFT)  # fmt: skip
    return b_acc


@triton.jit(do_not_specialize=_UNSPECIALISED)
def multi_forward_kernel(
    p_x, p_w, p_absmax, p_nested, p_code, p_offset, p_table, p_s, p_b, p_bias, p_y,
    p_order, p_adapters, p_starts, p_ranks, p_scaling, M, N, K, r, S, P, stride_n, stride_k, steps,
    BIAS: tl.constexpr, MODE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BU: tl.constexpr, BR: tl.constexpr, BY_ROW: tl.constexpr, GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """Part i_part (`steps` tiles of BK columns of x) of y [parts, M, N], with its part of scaling_i * (s B_i)."""
    i_m0, i_n0 = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    i_m0, i_n0 = i_m0 * BM, i_n0 * BN
    i_part = tl.program_id(1)
    i_m = i_m0 + tl.arange(0, BM)
    i_n = i_n0 + tl.arange(0, BN)
    # Places beyond M repeat the last one; they are not stored. The rows are read again before the loop and at its end
    # (volatile, or the compiler would keep them) because the adapters' terms and the loop need the registers.
    b_row = tl.load(p_order + tl.minimum(i_m, M - 1))
    b_acc = tl.zeros((BN, BM) if LEFT else (BM, BN), tl.float32)
    b_slot = slot_of(p_adapters, b_row, i_m >= 0, S)
    b_acc = add_adapters(p_b, p_s, p_order, p_adapters, p_starts, p_ranks, i_m0, b_row, b_slot, i_n, M, N, r, S, P,
                         i_part, tl.num_programs(1), b_acc, PRECISION, BM, BU, BR, BY_ROW, LEFT)  # fmt: skip
    b_row = tl.load(p_order + tl.minimum(i_m, M - 1), volatile=True)
    b_slot = slot_of(p_adapters, b_row, i_m >= 0, S)
    b_scale = tl.load(p_scaling + b_slot, mask=b_slot < S, other=0.0)
    b_acc = b_acc * (b_scale[None, :] if LEFT else b_scale[:, None])
    b_acc = add_output(p_x, p_w, p_absmax, p_nested, p_code, p_offset, p_table, b_row, i_n0, i_part * steps,
                       tl.minimum(tl.cdiv(K, BK), (i_part + 1) * steps), N, K, stride_n, stride_k, b_acc, MODE,
                       BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, BN, BK, EVEN_N, EVEN_K, LEFT)  # fmt: skip
    b_y = tl.trans(b_acc) if LEFT else b_acc
    if BIAS:
        if i_part == 0:
            b_y = b_y + tl.load(p_bias + i_n, mask=i_n < N, other=0.0).to(tl.float32)[None, :]
    b_row = tl.load(p_order + tl.minimum(i_m, M - 1), volatile=True)  # again
    i_out = (i_part.to(tl.int64) * M + b_row.to(tl.int64))[:, None] * N + i_n[None, :]
    tl.store(p_y + i_out, round_to(b_y, p_y.dtype.element_ty), mask=(i_m < M)[:, None] & (i_n < N)[None, :])


@triton.jit(do_not_specialize=_UNSPECIALISED)
def multi_backward_kernel(
    p_dy, p_w, p_absmax, p_nested, p_code, p_offset, p_table, p_ds, p_a, p_seed, p_dx,
    p_order, p_adapters, p_starts, p_ranks, M, N, K, r, S, P, stride_n, stride_k, steps, threshold, keep_scale,
    DROPOUT: tl.constexpr, BY_FOUR: tl.constexpr, MODE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BU: tl.constexpr, BR: tl.constexpr, BY_ROW: tl.constexpr, GROUP: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """Part i_part (`steps` tiles of BN columns of dy) of dx [parts, M, K]; part 0 starts at drop'(ds A_i)."""
    i_m0, i_k0 = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(K, BK), GROUP)
    i_m0, i_k0 = i_m0 * BM, i_k0 * BK
    i_part = tl.program_id(1)
    i_m = i_m0 + tl.arange(0, BM)
    i_k = i_k0 + tl.arange(0, BK)
    b_row = tl.load(p_order + tl.minimum(i_m, M - 1))
    b_acc = tl.zeros((BK, BM) if LEFT else (BM, BK), tl.float32)
    if i_part == 0:
        if DROPOUT:  # before the accumulator is in use, as in lora_linear
            b_bits = keep_packed(p_seed, b_row, i_k0, K, threshold, BM, BK, BY_FOUR)
        b_slot = slot_of(p_adapters, b_row, i_m >= 0, S)
        b_acc = add_adapters(p_a, p_ds, p_order, p_adapters, p_starts, p_ranks, i_m0, b_row, b_slot, i_k, M, K, r, S, P,
                             0, 1, b_acc, PRECISION, BM, BU, BR, BY_ROW, LEFT)  # fmt: skip
        if DROPOUT:
            b_keep = unpack(b_bits, BM, BK)
            if LEFT:
                b_keep = tl.trans(b_keep)
            b_acc = tl.where(b_keep, b_acc * keep_scale, 0.0)
    b_row = tl.load(p_order + tl.minimum(i_m, M - 1), volatile=True)
    b_acc = add_input(p_dy, p_w, p_absmax, p_nested, p_code, p_offset, p_table, b_row, i_k0, i_part * steps,
                      tl.minimum(tl.cdiv(N, BN), (i_part + 1) * steps), N, K, stride_n, stride_k, b_acc, MODE,
                      BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, BN, BK, EVEN_N, EVEN_K, LEFT)  # fmt: skip
    b_dx = tl.trans(b_acc) if LEFT else b_acc
    b_row = tl.load(p_order + tl.minimum(i_m, M - 1), volatile=True)  # again
    p_out = p_dx + (i_part.to(tl.int64) * M + b_row.to(tl.int64))[:, None] * K + i_k[None, :]
    tl.store(p_out, round_to(b_dx, p_dx.dtype.element_ty), mask=(i_m < M)[:, None] & (i_k < K)[None, :])


@triton.jit(do_not_specialize=_UNSPECIALISED)
def multi_outer_kernel(
    p_z, p_t, p_b, p_outer, p_ds, p_seed, p_order, p_bounds, p_starts, p_ranks, p_scaling, M, C, r, S, P, parts,
    threshold, keep_scale, WITH_DS: tl.constexpr, DROPOUT: tl.constexpr, BY_FOUR: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """t^T drop(z) of an adapter's rows, of which each of `parts` takes as many tiles of BM; z [M, C], t float32 [M, r].
    WITH_DS: that and ds = z B_i^T times scaling_i, B_i rows of b [P, C].

    p_outer: [parts, P, C], of which only the rows are written that an adapter with rows of x has.
    p_ds: float32 [column tiles, M, r], this tile's share.
    """
    i_tile = tl.program_id(0)
    i_slot, i_from, i_to = group_tile(p_bounds, tl.program_id(2) // parts, M, S)
    i_start, i_rank = span_of(p_starts, p_ranks, i_slot, r, S, P)
    i_r0 = tl.program_id(1) * BR
    if (i_from < i_to) & (i_r0 < i_rank):
        i_part = tl.program_id(2) % parts
        steps = tl.cdiv(tl.cdiv(i_to - i_from, BM), parts)
        i_c = i_tile * BC + tl.arange(0, BC)
        i_r = i_r0 + tl.arange(0, BR)
        i_own = (i_start + i_r).to(tl.int64)[None, :] * C + i_c[:, None]
        scale = 1.0
        if WITH_DS:
            scale = tl.load(p_scaling + i_slot)
        elif DROPOUT:
            scale = keep_scale
        b_outer = outer_rows(p_z, p_t, p_b + i_own, p_ds + i_tile.to(tl.int64) * M * r, p_seed, p_order,
                             i_from, i_part * steps, tl.minimum(tl.cdiv(i_to - i_from, BM), (i_part + 1) * steps),
                             i_to, i_tile * BC, i_r, C, i_rank, r, threshold, scale, WITH_DS, DROPOUT, BY_FOUR, BM,
                             BC, BR)  # fmt: skip
        b_outer = round_to(b_outer * scale, p_outer.dtype.element_ty)
        p_out = p_outer + i_part.to(tl.int64) * P * C + i_own
        tl.store(p_out, b_outer, mask=(i_c < C)[:, None] & (i_r < i_rank)[None, :])
