"""Triton kernel of dora_norm and squared_row_norms. Imported only when it is launched; the host side is `triton.py`.

The rows of W + scaling b a are added up as they are, a tile at a time: for each weight that costs what U = W a^T would
(r multiply-adds), W is read and decoded once, and nothing is left to cancel, so no row has to be done again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_lib.device import dot_three, load_absmax, load_weight


@triton.jit
def update(p_a, p_b, i_n, i_k, N, K, r, scaling, b_w, R: tl.constexpr, C: tl.constexpr, BR: tl.constexpr):
    """b_w + scaling * b[i_n] a[:, i_k], [R, C], to float32's accuracy: three products of TF32 on the tensor cores."""
    b_acc = tl.zeros((R, C), tl.float32)
    for i_r0 in tl.range(0, r, BR, num_stages=1):
        i_r = i_r0 + tl.arange(0, BR)
        p_bt = p_b + i_n.to(tl.int64)[:, None] * r + i_r[None, :]
        b_b = tl.load(p_bt, mask=(i_n < N)[:, None] & (i_r < r)[None, :], other=0.0)
        p_at = p_a + i_r.to(tl.int64)[:, None] * K + i_k[None, :]
        b_a = tl.load(p_at, mask=(i_r < r)[:, None] & (i_k < K)[None, :], other=0.0)
        b_acc += dot_three(b_b.to(tl.float32), b_a.to(tl.float32), tl.zeros((R, C), tl.float32))
    return b_w + scaling * b_acc


@triton.jit
def squares(b_v, ADAPTER: tl.constexpr):
    """Sums of squares over the columns, float64 [R]. Of W alone they are float64 throughout (made once for a weight);
    of a norm, which is rounded to float32, only from tile to tile: some GPUs have little float64."""
    if not ADAPTER:
        b_v = b_v.to(tl.float64)
    return tl.sum(b_v * b_v, axis=1).to(tl.float64)


@triton.jit(do_not_specialize=["steps", "scaling"])
def norm_kernel(
    p_w, p_absmax, p_nested, p_code, p_offset, p_table, p_a, p_b, p_out, N, K, r, stride_n, stride_k, steps, scaling,
    ADAPTER: tl.constexpr, HALVES: tl.constexpr, MODE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Part i_part (`steps` tiles of BK columns) of |W + scaling b a|^2 of each row: p_out float64 [parts, N].

    p_table: the 16 values of the codes, float32. HALVES: rows of W start at a block; the even and the odd columns, the
    high and the low nibbles, are then tiles of their own, whose order does not matter to a sum.
    """
    i_n0 = tl.program_id(0) * BN
    i_part = tl.program_id(1)
    i_n = i_n0 + tl.arange(0, BN)
    b_sum = tl.zeros((BN,), tl.float64)
    H: tl.constexpr = BK // 2
    if HALVES:
        b_table = tl.load(p_table + tl.arange(0, 16))
    for i_step in range(i_part * steps, tl.minimum(tl.cdiv(K, BK), (i_part + 1) * steps)):
        i_k0 = i_step * BK
        if HALVES:
            b_row = (i_n < N)[:, None]
            i_byte = i_k0 // 2 + tl.arange(0, H)
            b_in = b_row & (i_byte < K // 2)[None, :]
            b_bytes = tl.load(p_w + i_n.to(tl.int64)[:, None] * (K // 2) + i_byte[None, :], mask=b_in, other=0)
            BLOCKS: tl.constexpr = BK // BLOCKSIZE if BK > BLOCKSIZE else 1
            i_b = (i_k0 // BLOCKSIZE + tl.arange(0, BLOCKS))[None, :]
            b_has = b_row & (i_b < K // BLOCKSIZE)
            i_b = i_n.to(tl.int64)[:, None] * (K // BLOCKSIZE) + i_b
            b_scale = load_absmax(p_absmax, p_nested, p_code, p_offset, i_b, b_has, NESTED, NESTED_BLOCKSIZE)
            b_scale = tl.where(b_has, b_scale, 0.0)
            b_scale = tl.broadcast_to(b_scale[:, :, None], (BN, BLOCKS, H // BLOCKS))
            b_scale = tl.reshape(b_scale, (BN, H))
            i_flat = tl.reshape(b_bytes, (BN * H,)).to(tl.int32)
            for odd in tl.static_range(2):
                i_code = (i_flat & 15) if odd else (i_flat >> 4)
                b_v = tl.reshape(tl.gather(b_table, i_code, 0), (BN, H)) * b_scale
                if ADAPTER:
                    b_v = update(p_a, p_b, i_n, 2 * i_byte + odd, N, K, r, scaling, b_v, BN, H, BR)
                b_sum += squares(b_v, ADAPTER)
        else:
            b_v = load_weight(p_w, p_absmax, p_nested, p_code, p_offset, p_table, i_n0, i_k0, N, K, stride_n, stride_k,
                              BN, BK, MODE, BLOCKSIZE, NESTED, NESTED_BLOCKSIZE, tl.float32)  # fmt: skip
            if ADAPTER:
                b_v = update(p_a, p_b, i_n, i_k0 + tl.arange(0, BK), N, K, r, scaling, b_v, BN, BK, BR)
            b_sum += squares(b_v, ADAPTER)
    tl.store(p_out + i_part.to(tl.int64) * N + i_n, b_sum, mask=i_n < N)
