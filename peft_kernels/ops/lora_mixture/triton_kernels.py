"""The Triton kernel of lora_mixture beside those of lora_linear; imported only when launched. The host: `triton.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def weigh_kernel(
    p_low, p_mix, p_out, p_s, p_dmix, M, r,
    CLEAR: tl.constexpr, WITH_DMIX: tl.constexpr, MASKED: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out = low [M, n, r] times the weights mix [M, n], zero where they are, for BM rows of an adapter.

    CLEAR: low itself becomes zero there. WITH_DMIX: dmix [M, n], the sum over r of low times s; zero there if MASKED.
    """
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    b_in = i_m < M
    i_mix = i_m.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    b_mix = tl.load(p_mix + i_mix, mask=b_in, other=0.0)
    b_none = (b_mix == 0.0)[:, None]
    b_dmix = tl.zeros((BM,), tl.float32)
    for i_r0 in tl.range(0, r, BR, num_stages=1):
        i_r = i_r0 + tl.arange(0, BR)
        i_low = i_mix[:, None] * r + i_r[None, :]
        b_mask = b_in[:, None] & (i_r < r)[None, :]
        b_low = tl.load(p_low + i_low, mask=b_mask, other=0.0)
        tl.store(p_out + i_low, tl.where(b_none, 0.0, b_low * b_mix[:, None]), mask=b_mask)
        if CLEAR:
            tl.store(p_low + i_low, tl.where(b_none, 0.0, b_low), mask=b_mask)
        if WITH_DMIX:
            b_dmix += tl.sum(b_low * tl.load(p_s + i_low, mask=b_mask, other=0.0), 1)
    if WITH_DMIX:
        if MASKED:
            b_dmix = tl.where(b_mix == 0.0, 0.0, b_dmix)
        tl.store(p_dmix + i_mix, b_dmix, mask=b_in)
