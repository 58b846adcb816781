"""Forms that compilers got wrong on sm_90 and sm_100, planted: each rule finds its own, and nothing in right code."""

from __future__ import annotations

import os

import pytest
import torch

from bench.static import hazards, sass, ttgir
from peft_kernels.triton_lib import host

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402


@triton.jit
def two_products(p_x, p_w, p_y, K, FORM: tl.constexpr, B: tl.constexpr):
    """y = x w^T + w x^T over all columns, as a loop with one sum, with two, or as two loops."""
    i = tl.arange(0, B)
    b_acc = tl.zeros((B, B), tl.float32)
    b_other = tl.zeros((B, B), tl.float32)
    for i_k0 in range(0, K, B):
        b_x = tl.load(p_x + i[:, None] * K + i_k0 + i[None, :])
        b_w = tl.load(p_w + i[:, None] * K + i_k0 + i[None, :])
        b_acc = tl.dot(b_x, tl.trans(b_w), b_acc)
        if FORM == "one sum":
            b_acc = tl.dot(b_w, tl.trans(b_x), b_acc)
        elif FORM == "one sum, added":
            b_acc += tl.dot(b_w, tl.trans(b_x))
        elif FORM == "two sums":
            b_other = tl.dot(b_w, tl.trans(b_x), b_other)
    if FORM == "two loops":
        for i_k0 in range(0, K, B):
            b_x = tl.load(p_x + i[:, None] * K + i_k0 + i[None, :])
            b_w = tl.load(p_w + i[:, None] * K + i_k0 + i[None, :])
            b_acc = tl.dot(b_w, tl.trans(b_x), b_acc)
    tl.store(p_y + i[:, None] * B + i[None, :], b_acc + b_other)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets in this process")
@pytest.mark.parametrize(
    ("form", "shared"), [("one sum", True), ("one sum, added", True), ("two sums", False), ("two loops", False)]
)
@pytest.mark.parametrize("capability", [80, 100])
def test_two_products_into_one_accumulator(form: str, shared: bool, capability: int) -> None:
    x, y = (torch.empty(64, n, dtype=t, device="meta") for n, t in ((256, torch.bfloat16), (64, torch.float32)))
    with host.compile_only(capability) as compiled:
        host.launch(two_products, (1,), x, x, y, 256, FORM=form, B=64, num_warps=4, num_stages=3)
    text = compiled[0].kernel.asm["ttgir"]
    assert ("tc_gen5_mma" in text) == (capability == 100), "the planted kernel takes the instructions it is about"
    assert (ttgir.shared_accumulators(text) > 0) == shared


THROUGH_MEMORY = """
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 8]}>
module {
  tt.func public @k(%x: !tt.ptr<f32> loc("x"(#loc))) {
    %a = ttng.tmem_alloc : () -> !ttg.memdesc<64x16xf32, #tmem, mutable> loc(#loc1)
    %b = ttng.tmem_alloc %zero : (tensor<64x16xf32, #linear>) -> !ttg.memdesc<64x16xf32, #tmem, mutable> loc(#loc1)
    %r:2 = scf.for %i = %c0 to %c9 step %c1 iter_args(%s = %zero, %t = %zero) -> (tensor<64x16xf32, #l>, f32) : i32 {
      ttng.tc_gen5_mma %p, %q, %a[%token], %true, %true, %bar[%true] {is_async} : !ttg.memdesc<64x16xbf16> loc(#loc2)
      %v = ttng.tmem_load %a : !ttg.memdesc<64x16xf32, #tmem, mutable> -> tensor<64x16xf32, #linear> loc(#loc2)
      %w = scf.if %odd -> (tensor<64x16xf32, #linear>) {
        ttng.tmem_store FROM, %b, %true : tensor<64x16xf32, #linear> -> !ttg.memdesc<64x16xf32, #tmem, mutable>
        ttng.tc_gen5_mma %p, %q, %b, %flag, %true : !ttg.memdesc<64x16xbf16, #shared, #smem, mutable> loc(#loc3)
        scf.yield %v : tensor<64x16xf32, #linear> loc(#loc3)
      } else {
        scf.yield %zero : tensor<64x16xf32, #linear> loc(#loc3)
      } loc(#loc3)
      scf.yield %w, %n : tensor<64x16xf32, #linear>, f32 loc(#loc4)
    } loc(#loc4)
    tt.return loc(#loc5)
  } loc(#loc5)
} loc(#loc6)
"""


@pytest.mark.parametrize(("source", "shared"), [("%v", 1), ("%s", 1), ("%zero", 0), ("%r#1", 0)])
def test_a_sum_is_followed_through_tensor_memory_branches_and_passes(source: str, shared: int) -> None:
    """As Triton 3.6 writes it: a sum is loaded, and stored where the next product adds to it."""
    assert ttgir.shared_accumulators(THROUGH_MEMORY.replace("FROM", source)) == shared


def test_a_product_that_the_compiler_cut_into_several_is_one() -> None:
    """Those of a warp group with the left operand in registers have one place in the source."""
    text = """
    %r = scf.for %i = %c0 to %c9 step %c1 iter_args(%s = %zero) -> (tensor<64x16xf32, #mma>) : i32 {
      %v = ttng.warp_group_dot %p, %q, %s {isAsync = true} : tensor<64x16xbf16> -> tensor<64x16xf32, #mma> loc(#loc1)
      %w:2 = ttng.warp_group_dot_wait %v, %q {pendings = 1 : i32} : tensor<64x16xf32, #mma> loc(#loc1)
      %x = ttng.warp_group_dot %p, %q, %w#0 {isAsync = true} : tensor<64x16xbf16> -> tensor<64x16xf32, #mma> loc(#loc2)
      scf.yield %x : tensor<64x16xf32, #mma> loc(#loc3)
    } loc(#loc3)
    """
    assert ttgir.shared_accumulators(text) == 2, "the second adds to the first's, the first to the second's before"
    assert ttgir.shared_accumulators(text.replace("#loc2", "#loc1")) == 0


def test_unread_control_flow_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"scf\.while, which"):
        ttgir.shared_accumulators("%r = scf.while (%s = %zero) : (f32) -> f32 {\n}")


def listing(*code: str) -> tuple[list[str], dict[str, int]]:
    lines = [line if line.startswith(".L") else f"/*0000*/ {line} ;" for line in code]
    return sass.functions("\n".join(['.section .text.k,"ax",@progbits', *lines]))["k"]


PRODUCT, WAIT = "HGMMA.64x32x16.F32.BF16 R24, R56, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize("early", [
    "MOV R56, R1", "@!P0 LDS.128 R56, [R3]", "LOP3.LUT P1, R57, R2, R3, RZ, 0x3c, !PT", "SHFL.BFLY PT, R59, R4, R5, R6",
    "IMAD.WIDE R58, R2, R3, R4", "LDSM.16.M88.4 R56, [R2]", "HMMA.16816.F32 R56, R4, R8, R56", "LDG.E.64 R58, [R2]",
])  # fmt: skip
def test_a_left_operand_written_to_before_the_wait(early: str) -> None:
    assert hazards.overwritten(*listing(PRODUCT, early, WAIT)) == 1
    assert hazards.overwritten(*listing(PRODUCT, WAIT, early)) == 0


@pytest.mark.parametrize("harmless", [
    "MOV R60, R56", "STS.128 [R56], R56", "ISETP.GE.AND P0, PT, R56, R57, PT", "LDS.64 R54, [R56]", "R2UR UR56, R56",
    "STG.E.128 desc[UR4][R56.64], R56", "HGMMA.64x32x16.F32.BF16 R56, gdesc[UR4], gdesc[UR8], R56",
])  # fmt: skip
def test_what_reads_it_or_comes_in_order_is_no_hazard(harmless: str) -> None:
    assert hazards.overwritten(*listing(PRODUCT, harmless, WAIT, "MOV R56, R1")) == 0


def test_the_wait_must_be_for_the_products_own_group() -> None:
    other = PRODUCT.replace("R56", "R72")
    one_left = WAIT.replace("0x0", "0x1")
    early = "MOV R56, R1"
    assert hazards.overwritten(*listing(PRODUCT, one_left, early, WAIT)) == 1, "one group may go on: this one"
    assert hazards.overwritten(*listing(PRODUCT, other, one_left, early, WAIT)) == 0, "the other may go on"
    open_group = PRODUCT.removesuffix(", gsb0")
    assert hazards.overwritten(*listing(open_group, WAIT, early, other, WAIT)) == 1, "its group is closed later"


def test_around_a_loop() -> None:
    """The write comes at the top of the next pass, before the wait there."""
    loop = [".L_x_0:", "LDS.128 R56, [R2]", WAIT, PRODUCT, "@P0 BRA `(.L_x_0)", WAIT, "EXIT"]
    assert hazards.overwritten(*listing(*loop)) == 1
    loop[1:3] = loop[2:0:-1]
    assert hazards.overwritten(*listing(*loop)) == 0
