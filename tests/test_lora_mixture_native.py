"""lora_mixture on the native CPU library at every level, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forms import matrix
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_tools import BF16, F16, F32, FLOATS, LEVELS, at_level, level_fixture, needs_native, threads
from mixture_tools import check_mixture, make_mixture

from peft_kernels import PreparedCall, lora_mixture, native, use_backend
from peft_kernels.ops import lora_mixture as op
from peft_kernels.ops.lora_linear import forward_op as single
from peft_kernels.ops.lora_linear.native import pack
from peft_kernels.testing import assert_same_bits

level = level_fixture()
ZEROS = ("", "some", "top", "first", "all")


@needs_native
@pytest.mark.parametrize("scaling", [1.0, 2.0, (0.5, 2.0, 1.0)])
def test_a_prepared_call_gives_the_same_bits(scaling: Any) -> None:
    for n, k, dtype in ((20, 64, F32), (33, 77, BF16)):
        c = make_mixture(6, n, k, 3, 5, quant="dense", dtype=dtype, w_dtype=dtype, bias=True)
        w, bias, mixes = c.base.weight[0], c.base.bias, [c.mix, c.mix.flip(0)]
        fixed = (scaling, bias)
        call, b = PreparedCall(lora_mixture), c.b.transpose(0, 1)
        with torch.no_grad():
            kept = None
            for x, mix in ((c.base.x, mixes[0]), (c.base.x, mixes[1]), (c.base.x[:1], mixes[0][:1])):
                for given, own in ((x, mix), (x[None], mix[None])):
                    assert_same_bits(call(given, w, c.a, b, own, *fixed), lora_mixture(given, w, c.a, b, own, *fixed))
                    assert call._last[False] is (kept := kept or call._last[False])
                c.a.mul_(0.5)  # values may change
            assert kept is not None
            wide = mixes[0][:1].double()  # what is looked at in each call, by the public function
            assert_same_bits(call(c.base.x, w, c.a, b, wide, *fixed), lora_mixture(c.base.x, w, c.a, b, wide, *fixed))
            with pytest.raises(ValueError, match="mix"):
                call(c.base.x, w, c.a, b, mixes[0][:, :2], *fixed)
            c.b.data = c.b.data.clone() * 2  # b is a view of what is elsewhere now
            assert_same_bits(call(x, w, c.a, b, mix, *fixed), lora_mixture(x, w, c.a, b, mix, *fixed))
            with use_backend("reference"):
                call(x, w, c.a, b, mix, *fixed)
            assert call._last[False] is None
            call(x, w, [*c.a], [*b], mix, *fixed)  # one by one, which each call joins
            assert call._last[False] is None


# M picks the kernel: 1 to 4 rows by rows of W, up to 96 in registers, panels; 530 rows are two chunks.
@needs_native
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("m", matrix([1, 4, 5, 30, 100, 530], short=[4, 30, 530]))
def test_rows(level: str, m: int, dtype: torch.dtype) -> None:
    for i, zeros in enumerate(ZEROS):
        n, k = ((50, 192), (33, 128), (7, 320))[i % 3] if m < 500 else (20, 64)
        check_mixture(make_mixture(m, n, k, 3, (16, 4, 5)[i % 3], zeros=zeros, masked=i % 2 == 0, dtype=dtype,
                                   quant=("nf4", "dense")[i % 2], nested=True, bias=i == 0,
                                   p=0.2 * (i == 1)))  # fmt: skip


@needs_native
@pytest.mark.parametrize("ab", FLOATS, ids=str)
def test_ranks_that_share_vectors_and_numbers_of_adapters(level: str, ab: torch.dtype) -> None:
    for count, r in ((1, 16), (8, 1), (5, 3), (2, 17), (9, 8), (3, 0)):
        for m in (3, 60):
            check_mixture(make_mixture(m, 35, 64, count, r, zeros="top", masked=r % 2 == 1, ab=ab, dtype=F16))


@needs_native
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    whole = st.integers
    m, n, k = data.draw(whole(0, 140)), data.draw(whole(1, 100)), data.draw(whole(1, 200))
    c = make_mixture(
        m, n, k, data.draw(whole(1, 9)), data.draw(whole(1, 20)), zeros=data.draw(st.sampled_from(ZEROS)),
        masked=data.draw(st.booleans()), ab=data.draw(st.sampled_from(FLOATS)),
        dtype=data.draw(st.sampled_from(FLOATS)),
        quant=data.draw(st.sampled_from(["nf4", "fp4", "dense"])), p=data.draw(st.sampled_from([0.0, 0.5])),
    )  # fmt: skip
    with at_level(data.draw(st.sampled_from(LEVELS))):
        check_mixture(c)


@needs_native
def test_parts_that_are_not_needed(level: str) -> None:
    c = make_mixture(40, 33, 64, 3, 4, zeros="some", quant="dense")
    _, s = c.forward(op.forward_op.op)
    whole = c.backward(op.backward_op.op, s)
    for need in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        part = c.backward(op.backward_op.op, s, *need)
        for one, all_, wanted in zip(part, whole, (need[0], need[1], need[1], need[2]), strict=True):
            assert_same_bits(one, all_ if wanted else all_.new_empty((0,)))


@needs_native
@pytest.mark.parametrize("m", [4, 40, 530])
def test_same_bits_on_one_and_two_threads(level: str, m: int) -> None:
    c = make_mixture(m, 100, 64, 3, 5, zeros="top", quant="dense", p=0.1)
    runs = []
    for count in (1, 2):
        with threads(count):
            y, s = c.forward(op.forward_op.op)
            runs.append((y, s, *c.backward(op.backward_op.op, s)))
    for got, want in zip(*runs, strict=True):
        assert_same_bits(got, want)


@needs_native
@pytest.mark.parametrize("m", [1, 4, 30, 130])
def test_rows_without_adapters_are_the_base_bit_for_bit(level: str, m: int) -> None:
    c = make_mixture(m, 50, 64, 3, 4, zeros="all", masked=True, nested=True, dtype=BF16)
    base = c.base
    want = single.op(base.x, *base.weight, base.n, None, None, 1.0, base.bias, 0.0, None)[0]
    y, s = c.forward(op.forward_op.op)
    assert_same_bits(y, want)
    assert not s.any()
    dx, da, db, dmix = c.backward(op.backward_op.op, s)
    assert not any(t.any() for t in (da, db, dmix))
    assert dx.any()


@needs_native
@pytest.mark.parametrize("m", [4, 96])
def test_adapters_that_no_row_uses_are_not_read(level: str, m: int) -> None:
    """Infinities and NaNs of what a tile leaves out reach nothing, forward and backward."""
    c = make_mixture(m, 50, 64, 4, 16, zeros="top", masked=True, quant="dense")
    used = c.mix.any(0)
    want = check_mixture(c)
    c.a[~used], c.b[:, ~used] = float("nan"), float("inf")
    y, s = c.forward(op.forward_op.op)
    for got, one in zip((y, s, *c.backward(op.backward_op.op, s)), want, strict=True):
        assert_same_bits(got, one)


@needs_native
def test_the_library_refuses_what_it_would_misread() -> None:
    library, x = native.cpu(), torch.ones(2, 4)
    w, a, b = torch.ones(3, 4), torch.ones(6, 4), torch.ones(3, 6)
    own = pack(1, x, w, None, None, None, None, 0, 64, 256, 3, a, b, 1.0, None, 0.0, None, y=torch.empty(2, 3),
               s=torch.empty(2, 6))  # fmt: skip
    for weights, count in ((x.data_ptr(), 4), (x.data_ptr(), 0), (None, 2)):
        with pytest.raises(native.NativeError, match="lora_mixture: no gain, no adapters per row"):
            native.check(library.pk_cpu_lora_mixture(own, weights, count, 0))
