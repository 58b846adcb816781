"""rotary_attention: native at every level, Triton and the reference against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from forms import grid
from interpreter_tools import DEVICE, not_interpreted, on_device, run_in_the_interpreter
from lora_tools import BF16, F32, FLOATS, level_fixture, needs_native, threads
from torch import Tensor

from peft_kernels import BackendUnavailable, rotary_attention, use_backend
from peft_kernels.ops import rotary_attention as op
from peft_kernels.testing import assert_no_worse, assert_same_bits

needs_triton = pytest.mark.skipif(bool(op.forward_op.load("triton").available()), reason="Triton is not installed")

# B, T, H, G, D, rows of angles, rows of masks (0: causal)
SHAPES = [
    (1, 1, 1, 1, 2, 1, 0), (2, 5, 2, 1, 6, 2, 1), (2, 49, 6, 2, 16, 1, 2), (1, 97, 3, 3, 34, 1, 0),
    (1, 130, 2, 1, 80, 1, 1), (5, 33, 4, 2, 64, 5, 0),
]  # fmt: skip


level = level_fixture()


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """dy; q, k, v, cos, sin; keep. Angles as Llama has them but for their halves, which differ."""
    batch, tokens, heads, groups, d, tables, masks = shape
    dy, q, k, v = (torch.randn(batch, tokens, h, d, device=device).to(dtype) for h in (heads, heads, groups, groups))
    angles = torch.rand(tables, tokens, d, device=device) * 2 * math.pi
    keep = None
    if masks:
        keep = torch.rand(masks, tokens, tokens, device=device) < 0.4
        keep[:, tokens // 2] = False  # a query that sees nothing
        keep[:, :, -1] = False  # and a key that none sees
    return dy, [q, k, v, angles.cos().to(dtype), angles.sin().to(dtype)], keep


def magnitudes(dy: Tensor, tensors: list[Tensor], keep: Tensor | None, scale: float) -> list[Tensor]:
    """The sums of absolute terms behind y, dq, dk and dv. A score's own rounding moves its exponential by as much, and
    so counts as often as the score's terms are large."""
    q, k, v, cos, sin = (t.double() for t in tensors)
    groups = k.shape[2]

    def terms(x: Tensor) -> Tensor:
        first, second = x.abs().chunk(2, dim=-1)
        cos_, sin_ = cos.abs().unsqueeze(2), sin.abs().unsqueeze(2)
        return (x.abs() * cos_ + torch.cat((second, first), -1) * sin_).transpose(1, 2)

    def terms_back(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        first, second = (x * sin.abs().unsqueeze(2)).chunk(2, dim=-1)
        return x * cos.abs().unsqueeze(2) + torch.cat((second, first), -1)

    turned = [op._turned(t, cos, sin, torch.float64) for t in (q, k)]
    scores, _ = op._scores(turned[0].unflatten(1, (groups, -1)), turned[1].unsqueeze(2), keep, scale)
    p = torch.softmax(scores, -1).nan_to_num(0.0)
    of_q, of_k = terms(q).unflatten(1, (groups, -1)), terms(k).unsqueeze(2)
    sizes = of_q @ of_k.transpose(-1, -2) * scale
    p = p * (1 + sizes + (p * sizes).sum(-1, keepdim=True))
    grad, values = dy.double().abs().transpose(1, 2).unflatten(1, (groups, -1)), v.abs().transpose(1, 2).unsqueeze(2)
    dp = grad @ values.transpose(-1, -2)
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * scale
    return [
        (p @ values).flatten(1, 2).transpose(1, 2),
        terms_back((ds @ of_k).flatten(1, 2)),
        terms_back((ds.transpose(-1, -2) @ of_q).sum(2)),
        (p.transpose(-1, -2) @ grad).sum(2).transpose(1, 2),
    ]


def run(which: str, dy: Tensor, tensors: list[Tensor], keep: Tensor | None, scale: float) -> list[Tensor]:
    """y, dq, dk, dv, lse."""
    y, lse = getattr(op.forward_op, which)(*tensors, keep, scale)
    return [y, *getattr(op.backward_op, which)(dy, *tensors, keep, lse, scale), lse]


def check(dy: Tensor, tensors: list[Tensor], keep: Tensor | None) -> None:
    scale = tensors[0].shape[3] ** -0.5
    got, eager = run("op", dy, tensors, keep, scale), run("reference", dy, tensors, keep, scale)
    exact = run("reference", dy.double(), [t.double() for t in tensors], keep, scale)
    sizes = magnitudes(dy, tensors, keep, scale)
    for mine, theirs, right, size in zip(got, eager, exact, sizes, strict=False):
        assert mine.is_contiguous()
        # in 16 bits what is rounded before the products is far larger than they are: no allowance for sizes of scores
        assert_no_worse(mine, theirs, right, size if mine.dtype is F32 else right.abs().amax().expand(right.shape))
    blind = exact[4].isinf()
    assert torch.equal(got[4].isinf(), blind)
    assert not got[0].transpose(1, 2)[blind].any()
    assert not got[1].transpose(1, 2)[blind].any()


@needs_native
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_shape(level: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check(*inputs(shape, dtype))


@needs_native
def test_angles_of_another_type(level: str) -> None:
    dy, (q, k, v, cos, sin), keep = inputs(SHAPES[2], BF16)
    check(dy, [q, k, v, cos.float(), sin.float()], keep)


@needs_native
def test_a_mask_that_is_causal_and_one_of_packed_rows(level: str) -> None:
    """No mask and the causal one give the same bits; examples packed in a row give what each gives alone."""
    dy, tensors, _ = inputs((2, 75, 4, 2, 16, 1, 0), BF16)
    causal = torch.ones(1, 75, 75, dtype=torch.bool).tril()
    for mine, same in zip(run("op", dy, tensors, None, 0.3), run("op", dy, tensors, causal, 0.3), strict=True):
        assert_same_bits(mine, same)
    start = 48  # where a block of queries begins, so that the sums are cut alike
    packed = causal & ((torch.arange(75) < start)[:, None] == (torch.arange(75) < start))
    together = run("op", dy, tensors, packed, 0.3)
    for part in (slice(0, start), slice(start, 75)):
        alone = run("op", dy[:, part], [t[:, part] for t in tensors], None, 0.3)
        for mine, same in zip(together[:4], alone, strict=False):
            assert_same_bits(mine[:, part].contiguous(), same)


@needs_native
@pytest.mark.parametrize("shape", [(1, 70, 6, 2, 16, 1, 1), (3, 70, 6, 2, 16, 1, 0)], ids=str)
def test_same_bits_on_any_number_of_threads(level: str, shape: tuple[int, ...]) -> None:
    """Also where a task is a head, not a group of heads."""
    dy, tensors, keep = inputs(shape, BF16)
    runs = []
    for n in (1, 2, 8):
        with threads(n):
            runs.append(run("op", dy, tensors, keep, 0.25))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert_same_bits(a, b)


@needs_native
def test_nan_stays_where_it_is_seen(level: str) -> None:
    dy, tensors, _ = inputs((1, 60, 2, 1, 16, 1, 0), F32)
    want = run("op", dy, tensors, None, 0.25)
    tensors[0][0, 50, 1] = float("nan")
    got = run("op", dy, tensors, None, 0.25)
    assert got[0][0, 50, 1].isnan().all()
    got[0][0, 50, 1] = want[0][0, 50, 1]
    assert_same_bits(got[0], want[0])


@needs_native
def test_strides_and_empty() -> None:
    dy, tensors, keep = inputs(SHAPES[2], F32)
    want = run("op", dy, tensors, keep, 0.25)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (dy, *tensors)]
    assert keep is not None
    for a, b in zip(run("op", strided[0], strided[1:], keep.mT.contiguous().mT, 0.25), want, strict=True):
        assert_same_bits(a, b)
    for empty in ((0, 4, 2, 1, 8, 1, 0), (2, 0, 2, 1, 8, 1, 0)):
        dy, tensors, _ = inputs(empty, F32)
        assert [t.shape for t in run("op", dy, tensors, None, 1.0)[:3]] == [dy.shape, dy.shape, tensors[1].shape]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    """Those that are wanted; kept for them are the inputs and a number for each query and head."""
    dy, (q, k, v, cos, sin), keep = inputs((2, 20, 4, 2, 16, 1, 2), dtype)
    leaves = [q.requires_grad_(), k, v.requires_grad_()]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = rotary_attention(*leaves, cos, sin, keep, scale=0.25)
    assert sum(t.numel() for t in saved) == sum(t.numel() for t in (q, k, v, cos, sin, keep)) + 2 * 4 * 20
    tensors = [t.detach() for t in (*leaves, cos, sin)]
    want = run("op", dy, tensors, keep, 0.25)
    for mine, same in zip((y, *torch.autograd.grad(y, (q, v), dy)), (want[0], want[1], want[3]), strict=True):
        assert_same_bits(mine, same)


@pytest.mark.slow
def test_gradcheck_and_opcheck() -> None:
    _, tensors, keep = inputs((2, 5, 4, 2, 4, 1, 2), F32)
    leaves = [t.double().requires_grad_(i < 3) for i, t in enumerate(tensors)]
    for mask in (None, keep):
        call: Any = lambda q, k, v, mask=mask: rotary_attention(q, k, v, *leaves[3:], mask, scale=0.5)  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves[:3])
    lse = op.forward_op.op(*tensors, keep, 0.5)[1]
    torch.library.opcheck(op.forward_op.op, (*tensors, keep, 0.5))
    torch.library.opcheck(op.backward_op.op, (tensors[0], *tensors, keep, lse, 0.5))


def test_one_graph() -> None:
    dy, (q, k, v, cos, sin), _ = inputs((1, 6, 2, 1, 8, 1, 0), F32)
    compiled = torch.compile(
        lambda q: rotary_attention(q, k, v, cos, sin, scale=0.5), backend="aot_eager", fullgraph=True
    )
    q.requires_grad_()
    got, want = compiled(q), rotary_attention(q, k, v, cos, sin, scale=0.5)
    assert_same_bits(got, want)
    assert_same_bits(*(torch.autograd.grad(y, q, dy)[0] for y in (got, want)))


def test_bad_input() -> None:
    dy, (q, k, v, cos, sin), _ = inputs((2, 3, 4, 2, 6, 1, 0), F32)

    def call(
        q: Tensor = q, k: Tensor = k, v: Tensor = v, cos: Tensor = cos, sin: Tensor = sin, keep: Any = None
    ) -> Tensor:
        return rotary_attention(q, k, v, cos, sin, keep, scale=1.0)

    with pytest.raises(ValueError, match=r"rotary_attention: q must be \[B, T, H, D\] with H at least 1 and D even"):
        call(q[..., :5])
    with pytest.raises(ValueError, match=r"k must be \[2, 3, G, 6\] with 4 a multiple of G, got \(2, 3, 3, 6\)"):
        call(k=q[:, :, :3])
    with pytest.raises(TypeError, match=r"k must be torch\.float32 like q, got torch\.bfloat16"):
        call(k=k.bfloat16())
    with pytest.raises(ValueError, match=r"v must be torch\.float32 \(2, 3, 2, 6\) on cpu like k"):
        call(v=q)
    with pytest.raises(ValueError, match=r"cos must be \[2 or 1, 3, 6\], got \(1, 3, 4\)"):
        call(cos=cos[..., :4])
    with pytest.raises(ValueError, match=r"sin must be torch\.float32 \(1, 3, 6\) like cos, got torch\.bfloat16"):
        call(sin=sin.bfloat16())
    with pytest.raises(TypeError, match=r"keep must be bool, True where a query sees a key, got torch\.float32"):
        call(keep=torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match=r"keep must be \[2 or 1, 3, 3\], got \(3, 3, 3\)"):
        call(keep=torch.ones(3, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"rotary_attention_backward: lse must be \(2, 4, 3\) in torch\.float32"):
        op.backward_op.op(dy, q, k, v, cos, sin, None, torch.zeros(2, 3, 4), 1.0)


@needs_native
def test_native_takes_angles_of_its_types() -> None:
    _, (q, k, v, cos, sin), _ = inputs(SHAPES[1], F32)
    with use_backend("native"), pytest.raises(BackendUnavailable, match=r"cos and sin are torch\.float64"):
        rotary_attention(q, k, v, cos.double(), sin.double(), scale=1.0)


# ---- Triton: in its interpreter, which is chosen when Triton is imported, so in a process of its own -----------------
@needs_triton
@pytest.mark.slow
@not_interpreted
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, "device")


@needs_triton
@on_device
@pytest.mark.parametrize(("dtype", "shape"), grid(FLOATS, SHAPES[:4]), ids=str)
def test_device(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    with use_backend("triton"):
        check(*inputs(shape, dtype, DEVICE))


@needs_triton
@on_device
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_device_no_rows(dtype: torch.dtype) -> None:
    with use_backend("triton"):
        _, tensors, _ = inputs((0, 4, 2, 1, 8, 1, 0), dtype, DEVICE)
        assert rotary_attention(*tensors, scale=1.0).shape == (0, 4, 2, 8)


@needs_triton
def test_heads_that_no_program_holds_are_refused() -> None:
    q, cos = torch.zeros(1, 1, 1, 258), torch.zeros(1, 1, 258)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="more than 256 features"):
        rotary_attention(q, q, q, cos, cos, scale=1.0)
