"""Device functions for Triton kernels: products, 4-bit decoding, dropout masks. Imported when a kernel is launched.

Names: `p_` pointers, `b_` block values, `i_` indices. Offsets that can pass 2**31 are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from .formats import decode

# read when Triton is imported, like Triton's own decision to interpret
INTERPRET: tl.constexpr = tl.constexpr(bool(knobs.runtime.interpret))

# how a weight tile is read; chosen on the host by `weight_mode`
DENSE: tl.constexpr = tl.constexpr(0)
PAIR_ROWS: tl.constexpr = tl.constexpr(1)
PAIR_ANY: tl.constexpr = tl.constexpr(2)
ELEMENT: tl.constexpr = tl.constexpr(3)
FORMAT: tl.constexpr = tl.constexpr(16)  # and more: the number of a format of `formats.py`


@triton.jit
def dot(b_a, b_b, b_acc, PRECISION: tl.constexpr, APART: tl.constexpr = False):
    """`b_acc + b_a @ b_b` with float32 sums. APART: also where the product is added to another, each has its own sum.

    Triton's interpreter keeps bfloat16 as its bits and multiplies those: there bfloat16 is widened first, which changes
    no product (8 x 8 significant bits fit a float32).

    A loop must not have two products into one accumulator: Triton's pipeliner gets them wrong on Blackwell
    (triton-lang/triton#10821). Triton makes one of products of zeros that are added, but not where a number of inexact
    sums is given (which is for 8-bit floats, and means nothing else).
    """
    if INTERPRET and b_a.dtype == tl.bfloat16:
        b_a = b_a.to(tl.float32)
    if INTERPRET and b_b.dtype == tl.bfloat16:
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION, max_num_imprecise_acc=1 << 20 if APART else 0)


@triton.jit
def round_to(b, DTYPE: tl.constexpr):
    """float32 `b` in DTYPE, to nearest even. Triton's interpreter cuts bfloat16 off: there we round the bits here."""
    BFLOAT16: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300 (DTYPE is a variable here)
    if INTERPRET and BFLOAT16:
        b_bits = b.to(tl.uint32, bitcast=True)
        b_bits = tl.where(b == b, (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16, 0x7FC0)
        b_out = b_bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        b_out = b.to(DTYPE)
    return b_out


@triton.constexpr_function
def addends(x, y):
    """Columns of `dot_wide`'s accumulator for each of the product's, x and y being the operands' types."""
    return 1 if x in (y, tl.float32) else 4 if x == tl.bfloat16 else 2


@triton.jit
def high_bits(b, DTYPE: tl.constexpr):
    """The leading bits of float32 `b` as tensor cores take them exactly beside a DTYPE: bfloat16, or what fits TF32."""
    BFLOAT16: tl.constexpr = DTYPE == tl.bfloat16  # noqa: SIM300 (DTYPE is a variable here)
    if BFLOAT16:
        b_high = round_to(b, tl.bfloat16)
    else:
        b_high = (b.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return b_high


@triton.jit
def dot_wide(b_x, b_y, b_acc):
    """`b_acc` [M, N * addends] with the shares of b_x @ b_y's addends added: `wide_sum` of it is the product to
    float32's accuracy, on tensor cores where b_x is 16-bit: for sums that are outputs in float32. b_y [K, N]: float32,
    or of b_x's type.

    The float32 operand is split into addends that the tensor cores take exactly. bfloat16 shares float32's range, so
    three of them hold all 24 bits, and b_x stays as it is; float16 is a subset of TF32 (two addends, 22 bits). Where
    b_x is float32: plain float32 products.

    The addends stand side by side in one product, whose columns are a power of two: of four, one is zero. As products
    of their own they would go into one accumulator, which Triton's pipeliner gets wrong on Blackwell if that is a
    loop's (triton-lang/triton#10821), or into three, whose common left operand Triton 3.6 does not compile there.
    """
    if b_x.dtype == b_y.dtype or b_x.dtype == tl.float32:
        b_acc = dot(b_x, b_y.to(b_x.dtype), b_acc, "ieee")
    elif b_x.dtype == tl.bfloat16:
        b_y = b_y.to(tl.float32)
        b_high = high_bits(b_y, tl.bfloat16)
        b_rest = b_y - b_high.to(tl.float32)
        b_middle = high_bits(b_rest, tl.bfloat16)
        b_low = high_bits(b_rest - b_middle.to(tl.float32), tl.bfloat16)
        b_all = tl.join(tl.join(b_high, b_low), tl.join(b_middle, tl.zeros_like(b_low)))
        b_acc = dot(b_x, side_by_side(b_all, 4), b_acc, "ieee")
    else:
        b_y = b_y.to(tl.float32)
        b_high = high_bits(b_y, b_x.dtype)
        b_acc = dot(b_x.to(tl.float32), side_by_side(tl.join(b_high, b_y - b_high), 2), b_acc, "tf32")
    return b_acc


@triton.jit
def side_by_side(b, TIMES: tl.constexpr):
    """[K, N * TIMES] from [K, N, ..]: TIMES columns for each. Through the sum as in `decode_pairs`: Triton 3.6 cannot
    look through it for a layout in shared memory that there is not."""
    return tl.reduce(tl.reshape(b, (b.shape[0], b.shape[1] * TIMES, 1)), 2, first)


@triton.jit
def wide_sum(b_acc, TIMES: tl.constexpr):
    """The product [M, N] out of `dot_wide`'s accumulator [M, N * TIMES]; TIMES: `addends` of the operands' types."""
    if TIMES > 1:
        b_acc = tl.sum(tl.reshape(b_acc, (b_acc.shape[0], b_acc.shape[1] // TIMES, TIMES)), 2)
    return b_acc


@triton.jit
def dot_short(b_x, b_y, b_zero):
    """b_x @ b_y of float32 b_y to 16 bits at least, for sums that will be rounded to b_x's type. b_zero: zeros."""
    if b_x.dtype == tl.float32:
        b_out = dot(b_x, b_y, b_zero, "ieee")
    else:
        b_high = high_bits(b_y, b_x.dtype)
        b_rest = b_y - b_high.to(tl.float32)
        if b_x.dtype == tl.bfloat16:
            b_rest = high_bits(b_rest, tl.bfloat16)
        else:
            b_x = b_x.to(tl.float32)
        b_out = dot(b_x, b_rest, b_zero, "tf32", True) + dot(b_x, b_high, b_zero, "tf32", True)
    return b_out


@triton.jit
def near_bits(b):
    """float32 `b` as two numbers of TF32, the nearest and the rest: 22 bits together. Of infinity the rest is zero."""
    b_near = ((b.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    b_rest = b - b_near
    return b_near, tl.where(tl.abs(b_rest) < float("inf"), b_rest, 0.0)


@triton.jit
def dot_three(b_a, b_b, b_zero):
    """b_a @ b_b of float32, on tensor cores: three products of TF32. b_zero: zeros of the product's shape."""
    b_a, b_a_rest = near_bits(b_a)
    b_b, b_b_rest = near_bits(b_b)
    b_small = dot(b_a_rest, b_b, b_zero, "tf32", True) + dot(b_a, b_b_rest, b_zero, "tf32", True)
    return b_small + dot(b_a, b_b, b_zero, "tf32", True)


@triton.jit
def dot_narrow(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """`b_acc + b_a @ b_b` in float32 operands; with PRECISION "tf32" only where the sum will be rounded to 16 bits."""
    return dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, PRECISION)


@triton.jit
def load_absmax(
    p_absmax, p_nested, p_code, p_offset, i_block, b_mask, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr
):
    """float32 scales of the blocks `i_block`; the second level is decoded here, never stored.

    The product and the sum round separately, as bitsandbytes' do: the kernels are compiled without fusing them.
    """
    if NESTED:
        b_code = tl.load(p_absmax + i_block, mask=b_mask, other=0).to(tl.int32)
        b_value = tl.load(p_code + b_code, mask=b_mask, other=0.0)
        b_scale = tl.load(p_nested + i_block // NESTED_BLOCKSIZE, mask=b_mask, other=0.0)
        b_absmax = b_value * b_scale + tl.load(p_offset)
    else:
        b_absmax = tl.load(p_absmax + i_block, mask=b_mask, other=0.0)
    return b_absmax


@triton.jit
def first(a, b):
    return a


@triton.jit
def decode_pairs(b_bytes, b_scale, b_table, R: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr):
    """[R, C] weights of type DTYPE from bytes [R, C // 2] and one float32 scale per byte.

    b_table: 256 x uint32, the two values of a byte as a pair of float16, the even element in the low half. float16
    holds the code values to 11 bits where bfloat16 has 8, and widening it costs the same one instruction. The gather
    is one-dimensional: that makes it a layout barrier, so each byte is decoded by one thread only.
    """
    i_flat = tl.reshape(b_bytes, (R * (C // 2),)).to(tl.int32)
    b_pair = tl.reshape(tl.gather(b_table, i_flat, 0), (R, C // 2))
    b_even = (b_pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    b_odd = (b_pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    b_w = tl.join(round_to(b_even * b_scale, DTYPE), round_to(b_odd * b_scale, DTYPE))
    # A sum over an axis of one element: no instruction, but the compiler does not look through it. Otherwise it finds
    # bytes behind the operand of `dot`, lays out both operands for them, and sm_80 spends 3 moves a pair to undo that.
    return tl.reduce(tl.reshape(b_w, (R, C, 1)), 2, first)


@triton.jit
def load_weight(
    p_w, p_absmax, p_nested, p_code, p_offset, b_table, i_n0, i_k0, N, K, stride_n, stride_k,
    R: tl.constexpr, C: tl.constexpr, MODE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr, DTYPE: tl.constexpr,
    EVEN_N: tl.constexpr = False, EVEN_K: tl.constexpr = False,
):  # fmt: skip
    """The tile W[i_n0 : i_n0 + R, i_k0 : i_k0 + C] in DTYPE, zero outside [N, K]. i_k0 is a multiple of C.

    MODE: DENSE; PAIR_ROWS (rows start at a block: one scale per row and block); PAIR_ANY (rows start at a byte: a scale
    per byte); ELEMENT (anything, exact to float32: a code and a scale per element); FORMAT + its number (`formats.py`,
    exact; b_table is the pointer to the 16 values of codes there, as in ELEMENT).
    EVEN_N, EVEN_K: the caller's word that N is a multiple of R, K of C. Masks cost an instruction in ten otherwise.
    """
    i_n = i_n0 + tl.arange(0, R)
    b_row = (i_n < N)[:, None] | EVEN_N
    i_n = i_n.to(tl.int64)[:, None]
    if MODE == 0:
        i_k = i_k0 + tl.arange(0, C)[None, :]
        b_w = tl.load(p_w + i_n * stride_n + i_k.to(tl.int64) * stride_k, mask=b_row & ((i_k < K) | EVEN_K), other=0.0)
        if p_w.dtype.element_ty != DTYPE:
            b_w = round_to(b_w.to(tl.float32), DTYPE)
    elif MODE == 3:
        i_k = i_k0 + tl.arange(0, C)[None, :]
        b_mask = b_row & (i_k < K)
        i_e = i_n * K + i_k
        b_byte = tl.load(p_w + (i_e >> 1), mask=b_mask, other=0).to(tl.int32)
        b_code = tl.where((i_e & 1) == 0, b_byte >> 4, b_byte & 15)
        b_value = tl.load(b_table + b_code)
        b_scale = load_absmax(p_absmax, p_nested, p_code, p_offset, i_e // BLOCKSIZE, b_mask, NESTED, NESTED_BLOCKSIZE)
        b_w = round_to(tl.where(b_mask, b_value * b_scale, 0.0), DTYPE)
    elif MODE >= 16:
        b_mask = b_row & ((i_k0 + tl.arange(0, C)[None, :] < K) | EVEN_K)
        b_w = round_to(decode(p_w, p_absmax, p_nested, p_code, p_offset, b_table, i_n, i_k0, b_row, b_mask, K, R, C,
                              MODE - 16, BLOCKSIZE, NESTED), DTYPE)  # fmt: skip
    else:
        i_byte = i_k0 // 2 + tl.arange(0, C // 2)[None, :]
        b_mask = b_row & ((i_byte < K // 2) | EVEN_K)
        b_bytes = tl.load(p_w + i_n * (K // 2) + i_byte, mask=b_mask, other=0)
        if MODE == 1:
            BLOCKS: tl.constexpr = C // BLOCKSIZE if C > BLOCKSIZE else 1
            i_b = i_k0 // BLOCKSIZE + tl.arange(0, BLOCKS)[None, :]
            b_in = b_row & ((i_b < K // BLOCKSIZE) | EVEN_K)
            i_b = i_n * (K // BLOCKSIZE) + i_b
            b_scale = load_absmax(p_absmax, p_nested, p_code, p_offset, i_b, b_in, NESTED, NESTED_BLOCKSIZE)
            b_scale = tl.where(b_in, b_scale, 0.0)
            b_scale = tl.broadcast_to(b_scale[:, :, None], (R, BLOCKS, C // 2 // BLOCKS))
            b_scale = tl.reshape(b_scale, (R, C // 2))
        else:
            i_b = (i_n * K + i_byte * 2) // BLOCKSIZE
            b_scale = load_absmax(p_absmax, p_nested, p_code, p_offset, i_b, b_mask, NESTED, NESTED_BLOCKSIZE)
            b_scale = tl.where(b_mask, b_scale, 0.0)
        b_w = decode_pairs(b_bytes, b_scale, b_table, R, C, DTYPE)
    return b_w


@triton.jit
def keep_bits(p_seed, i_group, threshold):
    """int32, bit j: element 4 * i_group + j is kept. i_group: int64, any 2-D shape. See `peft_kernels/philox.py`."""
    b_bound = threshold.to(tl.uint32)
    b_lo = (i_group & 0xFFFFFFFF).to(tl.uint32)
    b_hi = (i_group >> 32).to(tl.uint32)
    b_zero = b_lo * 0
    b_0, b_1, b_2, b_3 = tl.philox(tl.load(p_seed), b_lo, b_hi, b_zero, b_zero)
    b_low = (b_0 >= b_bound).to(tl.int32) | ((b_1 >= b_bound).to(tl.int32) << 1)
    return b_low | ((b_2 >= b_bound).to(tl.int32) << 2) | ((b_3 >= b_bound).to(tl.int32) << 3)


@triton.jit
def keep_packed(p_seed, i_m, i_k0, K, threshold, BM: tl.constexpr, BK: tl.constexpr, BY_FOUR: tl.constexpr):
    """The mask of `keep_mask` as int32: [BM, BK // 16] of 16 bits with BY_FOUR, else [BM, BK] of one; see `unpack`.

    For large tiles: made in four rounds, it needs a quarter of the registers for Philox's state, and little to keep.
    """
    i_m = i_m.to(tl.int64)[:, None]
    if BY_FOUR:
        i_group = i_m * (K // 4) + (i_k0 // 4 + 4 * tl.arange(0, BK // 16))[None, :]
        b_bits = tl.zeros((BM, BK // 16), tl.int32)
        for i in range(4):
            b_bits = b_bits | (keep_bits(p_seed, i_group + i, threshold) << (4 * i))
    else:
        i_e = i_m * K + (i_k0 + tl.arange(0, BK))[None, :]
        b_bits = keep_bits(p_seed, i_e >> 2, threshold) >> (i_e & 3).to(tl.int32)
    return b_bits


@triton.jit
def unpack(b_bits, BM: tl.constexpr, BK: tl.constexpr):
    """bool [BM, BK] from int32 [BM, G]: element k is bit k % (BK // G) of word k // (BK // G)."""
    BITS: tl.constexpr = BK // b_bits.shape[1]
    return (tl.reshape(b_bits[:, :, None] >> tl.arange(0, BITS)[None, None, :], (BM, BK)) & 1) != 0


@triton.jit
def keep_mask(p_seed, i_m, i_k0, K, threshold, BM: tl.constexpr, BK: tl.constexpr, BY_FOUR: tl.constexpr):
    """True [BM, BK] where element (i_m[m], i_k0 + k) of a [*, K] input is kept; see `peft_kernels/philox.py`.

    BY_FOUR: K is a multiple of 4, so one Philox call serves four neighbours. Otherwise a call per element.
    """
    if BY_FOUR:
        i_group = i_m.to(tl.int64)[:, None] * (K // 4) + (i_k0 // 4 + tl.arange(0, BK // 4))[None, :]
        b_bits = keep_bits(p_seed, i_group, threshold)
    else:
        b_bits = keep_packed(p_seed, i_m, i_k0, K, threshold, BM, BK, False)
    return unpack(b_bits, BM, BK)


@triton.jit
def tile_of(i_pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(m tile, n tile) of a program: GROUP rows of tiles at a time, so that neighbours share both operands in L2."""
    width = GROUP * tiles_n
    first = i_pid // width * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + i_pid % width % rows, i_pid % width // rows


@triton.jit
def table_of(p_table, MODE: tl.constexpr):
    """The table of pairs in registers where the weight is read by pairs; anything elsewhere."""
    b_table = tl.arange(0, 1)
    if MODE == 1 or MODE == 2:
        b_table = tl.load(p_table + tl.arange(0, 256)).to(tl.uint32, bitcast=True)
    return b_table


@triton.jit
def any_of(b_t):
    """True if an element of a tile is not zero, or no number."""
    return tl.max(tl.max((b_t != 0.0).to(tl.int32), 1), 0) > 0


@triton.jit
def _low_rank_step(b_b, b_s, b_acc, PRECISION: tl.constexpr, LEFT: tl.constexpr):
    if LEFT:
        b_acc = dot_narrow(b_b, b_s, b_acc, PRECISION)
    else:
        b_acc = dot_narrow(tl.trans(b_s), tl.trans(b_b), b_acc, PRECISION)
    return b_acc


@triton.jit
def low_rank(
    p_b, p_s, i_n, i_m, N, M, r, b_acc, stride_n, stride_r, PRECISION: tl.constexpr, BR: tl.constexpr,
    LEFT: tl.constexpr, SPARSE: tl.constexpr = False,
):  # fmt: skip
    """b_acc [N, M] + b [N, r] s [M, r]^T, b at strides; without LEFT b_acc [M, N] + s b^T.

    SPARSE: of ranks whose s is zero in all of these rows nothing is read and multiplied.
    """
    for i_r0 in tl.range(0, r, BR, num_stages=1):
        i_r = i_r0 + tl.arange(0, BR)
        p_bt = p_b + i_n.to(tl.int64)[:, None] * stride_n + i_r.to(tl.int64)[None, :] * stride_r
        p_st = p_s + i_m.to(tl.int64)[None, :] * r + i_r[:, None]
        b_in, b_ranks = (i_n < N)[:, None] & (i_r < r)[None, :], (i_m < M)[None, :] & (i_r < r)[:, None]
        if SPARSE:
            b_s = tl.load(p_st, mask=b_ranks, other=0.0)
            if any_of(b_s):
                b_b = tl.load(p_bt, mask=b_in, other=0.0)
                b_acc = _low_rank_step(b_b, b_s, b_acc, PRECISION, LEFT)
        else:
            b_b = tl.load(p_bt, mask=b_in, other=0.0)
            b_s = tl.load(p_st, mask=b_ranks, other=0.0)
            b_acc = _low_rank_step(b_b, b_s, b_acc, PRECISION, LEFT)
    return b_acc


@triton.jit
def load_turned(
    p_x, p_turn, b_row, i_k0, K, BM: tl.constexpr, BK: tl.constexpr, SIZE: tl.constexpr, SHARED: tl.constexpr,
    EVEN_K: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """Columns i_k0 .. i_k0 + BK - 1 of x's rows b_row [BM], turned: [BK, BM] in x's type, without LEFT [BM, BK].

    p_turn: float32 [K / SIZE or (SHARED) 1, SIZE, SIZE], whose blocks the columns are multiplied by from the right.
    SIZE is a power of two, BK a multiple of it; blocks below 16 lie side by side in one of 16. Rounded once.
    """
    WIDE: tl.constexpr = 16 if SIZE < 16 else SIZE
    GROUPS: tl.constexpr = BK // WIDE
    i_in = tl.arange(0, WIDE)
    i_k = i_k0 + tl.arange(0, GROUPS)[:, None] * WIDE + i_in[None, :]
    b_in = (i_k < K) | EVEN_K
    b_x = tl.load(p_x + b_row.to(tl.int64)[None, :, None] * K + i_k[:, None, :], mask=b_in[:, None, :], other=0.0)
    i_r = (i_k % SIZE if SHARED else i_k)[:, :, None] * SIZE + (i_in % SIZE)[None, None, :]
    b_r = tl.load(p_turn + i_r, mask=b_in[:, :, None], other=0.0)
    if SIZE < WIDE:
        b_r = tl.where((i_in // SIZE)[None, :, None] == (i_in // SIZE)[None, None, :], b_r, 0.0)
    if GROUPS == 1:
        b_x, b_r = tl.reshape(b_x, (BM, WIDE)), tl.reshape(b_r, (WIDE, WIDE))
        b_y = dot_short(b_x, b_r, tl.zeros((BM, WIDE), tl.float32))
        b_y = tl.trans(b_y) if LEFT else b_y
    else:
        b_y = dot_short(b_x, b_r, tl.zeros((GROUPS, BM, WIDE), tl.float32))
        if LEFT:
            b_y = tl.reshape(tl.permute(b_y, (0, 2, 1)), (BK, BM))
        else:
            b_y = tl.reshape(tl.permute(b_y, (1, 0, 2)), (BM, BK))
    return round_to(b_y, p_x.dtype.element_ty)
