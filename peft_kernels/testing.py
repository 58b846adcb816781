"""Test helpers, public for downstream use: the accuracy law and input makers."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import FORMATS, QUANT_TYPES, Format, QuantWeight


def truncation_floor(exact: Tensor, magnitude: Tensor, terms: int) -> Tensor:
    """The error that tensor cores may make in a float32 sum of `terms` products: terms / 4 eps of the running sum.

    A tensor core multiplies exactly, but does not round its sums to nearest. It takes 4 to 16 products and the sum so
    far, cuts each off below the last bit of the largest, adds, and cuts the result to 24 bits (Fasi, Higham, Mikaitis
    and Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021; Khattak and Mikaitis,
    Accurate models of NVIDIA tensor cores, arXiv:2512.07004, 2025: the same up to B200, some with bits to spare).
    So a product is cut once, and a group once more: 1.25 cuts a product for groups of 4. A cut loses half a unit in the
    last place on average, the same way if the terms have one sign; a unit is 3/4 eps of the sum so far on average, and
    that half of its end if it grows steadily: 1.25 / 2 * 3/4 / 2 = 0.23, rounded up to 1/4.
    The sum so far is at most |exact| where it grows steadily; with terms of random signs it walks to about
    magnitude / sqrt(terms), of which 4 is taken as its reach. magnitude: the sum of absolute terms.
    """
    running = exact.abs() + 4 / terms**0.5 * magnitude.abs()
    return terms / 4 * torch.finfo(torch.float32).eps * running


def _truncates(actual: Tensor) -> bool:
    """Sums on CPUs, in Triton's interpreter and in the host build of the CUDA sources are rounded to nearest."""
    return actual.is_cuda


def assert_no_worse(
    actual: Tensor, eager: Tensor, exact: Tensor, magnitude: Tensor | None = None, terms: int = 0
) -> None:
    """Elementwise: the kernel's error is at most twice eager's, plus a floor of 4 eps of `magnitude`.

    actual: the kernel's result. eager: the reference's in the same dtype. exact: the reference's in float64.
    magnitude: the sum of absolute terms behind each element (|x| |W|^T for a product), which rounding scales with;
    by default |exact|. The shapes must agree and the dtype of `actual` must be eager's.
    terms: of the sum behind each element, if tensor cores may make it; on a GPU, and there alone, `truncation_floor`
    comes on top.
    """
    assert actual.shape == exact.shape == eager.shape, f"shapes: {actual.shape}, {eager.shape}, {exact.shape}"
    assert actual.dtype == eager.dtype, f"dtype: {actual.dtype}, eager has {eager.dtype}"
    if exact.numel() == 0:
        return
    exact = exact.double().cpu()
    error = (actual.double().cpu() - exact).abs()
    allowed = 2 * (eager.double().cpu() - exact).abs()
    magnitude = (exact if magnitude is None else magnitude.double().cpu()).abs()
    floor = 4 * torch.finfo(actual.dtype).eps * magnitude
    if terms and _truncates(actual):
        floor += truncation_floor(exact, magnitude, terms)
    bad = ~(error <= allowed + floor)  # written so that a NaN is bad
    if bad.any():
        worst = torch.where(bad, error, torch.zeros_like(error)).nan_to_num(float("inf")).argmax()
        i = tuple(int(v) for v in torch.unravel_index(worst, error.shape))
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements are worse than eager; worst at {i}: got "
            f"{float(actual[i]):.8g}, eager {float(eager[i]):.8g}, exact {float(exact[i]):.8g}, "
            f"error {float(error[i]):.3g}, allowed {float((allowed + floor)[i]):.3g}"
        )


def assert_same_bits(actual: Tensor, expected: Tensor, any_nan: bool = False) -> None:
    """Equal dtype, shape and bytes (so -0.0 differs from 0.0 and NaNs compare by their bits).

    any_nan: one NaN is as good as another (torch itself writes different ones, by vector length).
    """
    assert actual.dtype == expected.dtype, f"dtype: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if any_nan:
        actual, expected = (t.masked_fill(t.isnan(), float("nan")) for t in (actual, expected))
    got = actual.detach().cpu().contiguous().view(-1).view(torch.uint8)
    want = expected.detach().cpu().contiguous().view(-1).view(torch.uint8)
    if not torch.equal(got, want):
        where = (got != want).nonzero()
        i = int(where[0]) // actual.element_size()
        raise AssertionError(
            f"bytes differ in {len(where)} places of {got.numel()}; first at element {i}: "
            f"{actual.reshape(-1)[i].item()!r} against {expected.reshape(-1)[i].item()!r}"
        )


def random_quant_weight(
    n: int,
    k: int,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> QuantWeight:
    """A random, valid weight of any format made without a quantiser (every code and scale occurs).

    blocksize, nested: not of GGUF's blocks. Groups of integers have zeros where the format commonly has them; others
    are `random_affine_weight`'s.
    """
    known = FORMATS[quant_type]
    if known.blocksize is not None:
        return _random_blocks(n, k, known, seed, dtype)
    if quant_type not in QUANT_TYPES:
        zeros = None if quant_type == "int8" else "codes"
        return random_affine_weight(n, k, quant_type, blocksize, zeros=zeros, seed=seed, dtype=dtype)
    g = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, ((n * k + 1) // 2,), generator=g, dtype=torch.int64).to(torch.uint8)
    nblocks = -(-(n * k) // blocksize)
    if not nested:
        absmax = torch.rand(nblocks, generator=g) * 0.1 + 0.01
        return QuantWeight(packed, absmax, (n, k), quant_type, blocksize, dtype)
    return QuantWeight(
        packed,
        torch.randint(0, 256, (nblocks,), generator=g, dtype=torch.int64).to(torch.uint8),
        (n, k),
        quant_type,
        blocksize,
        dtype,
        nested_absmax=torch.rand(-(-nblocks // 256), generator=g) * 0.02 + 0.01,
        nested_code=torch.linspace(-1, 1, 256),
        nested_blocksize=256,
        offset=torch.tensor(0.06),
    )


def _random_blocks(n: int, k: int, of: Format, seed: int, dtype: torch.dtype) -> QuantWeight:
    assert of.blocksize is not None
    assert of.block_bytes is not None
    g = torch.Generator().manual_seed(seed)
    shape = (n * k // of.blocksize, of.block_bytes)
    blocks = torch.randint(0, 256, shape, generator=g, dtype=torch.int64).to(torch.uint8)
    if of.name == "mxfp4":
        blocks[:, 0] = torch.randint(118, 124, (shape[0],), generator=g).to(torch.uint8)
    size = 0.001 if of.blocksize == 256 else 0.01
    for byte in of.halves:
        d = (torch.randn(shape[0], generator=g) * size).to(torch.float16)
        blocks[:, byte : byte + 2] = d.view(torch.uint8).view(-1, 2)
    return QuantWeight.gguf(blocks.view(n, k // of.blocksize * of.block_bytes), of.name, (n, k), dtype)


def random_affine_weight(
    n: int, k: int, quant_type: str = "int4", blocksize: int = 64, *, zeros: str | None = "codes",
    shifts: bool = False, act_order: bool = False, scales: torch.dtype = torch.float16, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> QuantWeight:  # fmt: skip
    """A random weight of integers by group. zeros: "codes" (uint8), "values" (of the scales' dtype) or None."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-k // blocksize)
    count = (n * k + 1) // 2 if quant_type == "int4" else n * k
    packed = torch.randint(0, 256, (count,), generator=g, dtype=torch.int64).to(torch.uint8)
    scale = (torch.rand(n, groups, generator=g) * 0.02 + 0.005).to(scales)
    most, zero = 16 if quant_type == "int4" else 256, None
    if zeros is not None:
        zero = torch.rand(n, groups, generator=g) * (most - 1)
        zero = zero.round().to(torch.uint8) if zeros == "codes" else zero.to(scales)
    shift = (torch.randn(n, groups, generator=g) * 0.01).to(scales) if shifts else None
    index = None
    if act_order:
        index = (torch.arange(k, dtype=torch.int32) // blocksize)[torch.randperm(k, generator=g)]
    return QuantWeight.affine(packed, scale, (n, k), quant_type, blocksize, zeros=zero, shifts=shift, index=index,
                              dtype=dtype)  # fmt: skip
