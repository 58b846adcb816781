"""Formats of quantised weights: exact decode against the owners' code and their formulas, makers, and bad parts."""

from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels import QuantWeight, dequantize_4bit, dispatch, formats, lora_linear, use_backend
from peft_kernels.formats import FORMATS
from peft_kernels.testing import assert_same_bits, random_affine_weight, random_quant_weight

GGUF = sorted(name for name, known in FORMATS.items() if known.blocksize)
AFFINE = ("int4", "int8", "uint8")


def codes_of(n: int, k: int, most: int, seed: int = 0) -> Tensor:
    return torch.randint(0, most, (n, k), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", GGUF)
def test_gguf_blocks_decode_to_the_bits_of_the_gguf_package(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    w = random_quant_weight(7, 512, quant_type=name, seed=3)
    want = gguf.dequantize(w.packed.numpy(), getattr(gguf.GGMLQuantizationType, name.upper()))
    with use_backend("reference"):
        assert_same_bits(dequantize_4bit(w), torch.from_numpy(want))


def test_mxfp4_has_the_values_of_every_scale() -> None:
    """Scales that are subnormal, and the largest, where a power of two is made of bits."""
    blocks = torch.zeros(256, 17, dtype=torch.uint8)
    blocks[:, 0] = torch.arange(256)
    blocks[:, 1:] = 0x52  # codes 2 and 5: 2 and 6, doubled values
    with use_backend("reference"):
        got = dequantize_4bit(QuantWeight.gguf(blocks, "mxfp4", (256, 32)), torch.float64)
    e = torch.arange(256, dtype=torch.float64)
    scale = torch.exp2(e - 128)
    assert torch.equal(got[:254, 0], 2 * scale[:254])  # beyond, float32 has no such value
    assert torch.equal(got[:253, 31], 6 * scale[:253])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize("zeros", ["codes", "values", None])
@pytest.mark.parametrize("of", AFFINE)
def test_integers_by_group(of: str, zeros: str | None, shifts: bool, act_order: bool) -> None:
    """(code - zero) * scale + shift, also where the last group of a row is short."""
    w = random_affine_weight(5, 72, of, 32, zeros=zeros, shifts=shifts, act_order=act_order)
    flat = w.packed.reshape(-1)
    if of == "int4":
        flat = torch.stack((flat >> 4, flat & 15), 1).reshape(-1)
    codes = (flat.view(torch.int8) if of == "int8" else flat).view(5, 72).float()
    which = torch.arange(72) // 32 if w.nested_code is None else w.nested_code.long()
    assert w.absmax is not None
    zero = {"int4": 8.0, "int8": 0.0, "uint8": 128.0}[of]
    zeros_at = zero if w.nested_absmax is None else w.nested_absmax.float()[:, which]
    want = (codes - zeros_at) * w.absmax.float()[:, which]
    if w.offset is not None:
        want = want + w.offset.float()[:, which]
    with use_backend("reference"):
        assert_same_bits(dequantize_4bit(w), want)


def int32_words(codes: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Words of 32 bits out of codes along `dim`: place j of a word holds code order[j]."""
    per = 32 // bits
    moved = codes.movedim(dim, -1)
    grouped = moved.reshape(*moved.shape[:-1], -1, per).long()
    if order is not None:
        grouped = grouped[..., list(order)]
    words = (grouped << (bits * torch.arange(per))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim).contiguous()


@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(bits: int, act_order: bool, zero_offset: int) -> None:
    """scale[g_idx] * (code - (stored zero + 1)), in float16 as its plain kernel computes it: products are exact."""
    n, k, group = 32, 64, 16
    codes, zeros = codes_of(k, n, 2**bits), codes_of(k // group, n, 2**bits - 1, 1)
    scales = torch.rand(k // group, n, generator=torch.Generator().manual_seed(2)).half() * 0.01
    index = torch.arange(k) // group
    if act_order:
        index = index[torch.randperm(k, generator=torch.Generator().manual_seed(3))]
    w = formats.from_gptq(int32_words(codes, bits, 0), int32_words(zeros, bits, 1), scales, index, bits, group,
                          zero_offset=zero_offset)  # fmt: skip
    assert (w.nested_code is not None) is act_order
    want = scales[index] * (codes - (zeros + zero_offset)[index]).half()
    assert_same_bits(dequantize_4bit(w, torch.float16), want.t().contiguous())


def test_awq() -> None:
    n, k, group = 64, 96, 32
    codes, zeros = codes_of(k, n, 16), codes_of(k // group, n, 16, 1)
    scales = torch.rand(k // group, n, generator=torch.Generator().manual_seed(2)).half() * 0.01
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's: place j of a word holds column order[j] of 8
    w = formats.from_awq(int32_words(codes, 4, 1, order), int32_words(zeros, 4, 1, order), scales, group)
    wide = torch.arange(k) // group
    assert_same_bits(dequantize_4bit(w, torch.float16), (scales[wide] * (codes - zeros[wide]).half()).t().contiguous())


@pytest.mark.parametrize("bits", [4, 8])
def test_hqq(bits: int) -> None:
    """The package's own packing and dequantisation in float32, where it is there; else its formula."""
    n, k, group = 16, 128, 64
    codes = codes_of(n * k // group, group, 2**bits).to(torch.uint8)
    g = torch.Generator().manual_seed(1)
    scale = (torch.rand(n * k // group, 1, generator=g) * 0.01).half()
    zero = (torch.rand(n * k // group, 1, generator=g) * 15).half()
    half = len(codes) // 2
    packed = (codes[:half] << 4) | codes[half:] if bits == 4 else codes
    meta = {"nbits": bits, "group_size": group, "shape": torch.Size((n, k)), "scale": scale, "zero": zero, "axis": 1,
            "packing": f"{bits}bit_u8", "view_as_float": False, "compute_dtype": torch.float32}  # fmt: skip
    want = ((codes.float() - zero.float()) * scale.float()).view(n, k)
    assert_same_bits(dequantize_4bit(formats.from_hqq(packed, meta)), want)
    with pytest.raises(ValueError, match="axis=1"):
        formats.from_hqq(packed, {**meta, "axis": 0})


def test_hqq_package() -> None:
    core = pytest.importorskip("hqq.core.quantize")
    w = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    packed, meta = core.Quantizer.quantize(w, nbits=4, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32)
    meta["compute_dtype"] = torch.float32
    assert_same_bits(dequantize_4bit(formats.from_hqq(packed, meta)), core.Quantizer.dequantize(packed, meta))


def test_torchao_int8() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(128, 48)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig(version=2))
    w = formats.from_torchao(linear.weight)
    assert w.packed.data_ptr() == linear.weight.qdata.data_ptr()
    assert_same_bits(dequantize_4bit(w), linear.weight.dequantize())


def test_torchao_int4_by_its_fields() -> None:
    """q * scale + zero with q of -8 .. 7, the even column below: what fbgemm's kernel reads."""

    class Int4Tensor(SimpleNamespace):
        pass

    codes = codes_of(8, 64, 16) - 8
    scale, zero = torch.rand(2, 8) * 0.01, torch.randn(2, 8) * 0.1
    low, high = codes[:, ::2] & 15, codes[:, 1::2] & 15
    tensor = Int4Tensor(qdata=((high << 4) | low).to(torch.uint8).view(torch.int8), scale=scale, zero_point=zero,
                        block_size=[1, 32], shape=torch.Size((8, 64)), dtype=torch.float32)  # fmt: skip
    wide = torch.arange(64) // 32
    want = codes.float() * scale.t()[:, wide] + zero.t()[:, wide]
    assert_same_bits(dequantize_4bit(formats.from_torchao(tensor)), want)
    with pytest.raises(ValueError, match="Int8Tensor"):
        formats.from_torchao(SimpleNamespace())


def test_bitsandbytes_rows_of_int8_share_their_bytes() -> None:
    cb = (codes_of(6, 40, 255) - 127).to(torch.int8)
    scb = torch.rand(6) + 0.5
    w = formats.from_bnb_int8(cb, scb)
    assert w.packed.data_ptr() == cb.data_ptr()
    want = cb.float() * (scb.view(-1, 1) * 7.874015718698502e-3)
    assert_same_bits(dequantize_4bit(w, torch.float32), want)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_operator_that_takes_a_weight_takes_this_format(name: str) -> None:
    w = random_quant_weight(64, 256, quant_type=name, seed=5)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1), requires_grad=True)
    a, b = torch.randn(4, 256) * 0.1, torch.randn(64, 4)
    dense = dequantize_4bit(w)
    with use_backend("reference"):
        got = lora_linear(x, w, a, b)
        want = lora_linear(x, dense, a, b)
        assert_same_bits(got, want)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)]
    assert_same_bits(*grads)


def test_a_backend_that_does_not_read_a_format_says_so() -> None:
    w = random_quant_weight(64, 256, quant_type="q4_k")
    call = (torch.randn(3, 256), *w.flatten(), 64, None, None, 1.0, None, 0.0, None)
    assert "does not read weights in q4_k" in dispatch.explain("lora_linear", *call)["cuda"]
    with use_backend("cuda"), pytest.raises(dispatch.BackendUnavailable, match="does not read weights in q4_k"):
        lora_linear(call[0], w)


@pytest.mark.parametrize("name", GGUF)
def test_a_single_block_may_begin_at_an_odd_byte(name: str) -> None:
    columns = FORMATS[name].blocksize
    assert columns is not None
    w = random_quant_weight(1, columns, quant_type=name)
    memory = torch.zeros(w.packed.numel() + 1, dtype=torch.uint8)
    memory[1:] = w.packed.view(-1)
    odd = QuantWeight.gguf(memory[1:], name, (1, columns))
    with use_backend("reference"):
        assert_same_bits(dequantize_4bit(odd), dequantize_4bit(w))


@pytest.mark.parametrize("name", GGUF)
def test_mapped_memory_is_read_where_it_lies(name: str, tmp_path: Path) -> None:
    w = random_quant_weight(8, 256, quant_type=name)
    path = tmp_path / "blocks"
    path.write_bytes(b"\0" * 32 + w.packed.numpy().tobytes())
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        blocks = torch.frombuffer(mapped, dtype=torch.uint8, offset=32)
        got = QuantWeight.gguf(blocks, name, (8, 256))
        assert got.flatten()[0].data_ptr() == blocks.data_ptr()
        assert_same_bits(dequantize_4bit(got), dequantize_4bit(w))
        del got, blocks


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_part_too_short_or_of_another_dtype(name: str) -> None:
    w = random_quant_weight(8, 256, quant_type=name)
    with pytest.raises(ValueError, match=r"packed must be \d+ bytes"):
        dataclasses.replace(w, packed=w.packed.reshape(-1)[:-1])
    with pytest.raises(TypeError, match="packed must be uint8"):
        dataclasses.replace(w, packed=w.packed.to(torch.int16))
    if w.absmax is None:
        with pytest.raises(ValueError, match="absmax must be None"):
            dataclasses.replace(w, absmax=torch.ones(8))
        with pytest.raises(ValueError, match="multiple"):
            dataclasses.replace(w, shape=(16, 128 + 8))
    else:
        with pytest.raises(ValueError, match="scales"):
            dataclasses.replace(w, absmax=w.absmax.reshape(-1)[:-1])
        with pytest.raises(TypeError, match="absmax"):
            dataclasses.replace(w, absmax=w.absmax.double())


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("nested_absmax", torch.ones(8, 4), "zeros of uint8"),
        ("nested_absmax", torch.ones(7, dtype=torch.uint8), "32 zeros"),
        ("offset", torch.ones(8, 4), "shifts of"),
        ("nested_code", torch.zeros(256), "int32 groups"),
        ("nested_code", torch.zeros(255, dtype=torch.int32), "256 groups"),
        ("blocksize", 0, "at least 1"),
    ],
)
def test_parts_of_integers_by_group_that_do_not_fit(part: str, value: Any, message: str) -> None:
    w = random_affine_weight(8, 256)
    with pytest.raises((ValueError, TypeError), match=message):
        dataclasses.replace(w, **{part: value})


def test_values_that_are_no_weights() -> None:
    bad = random_affine_weight(8, 256, act_order=True)
    assert bad.nested_code is not None
    bad.check_values("a layer")
    bad.nested_code[3] = 4
    with pytest.raises(ValueError, match=r"a layer: the index of groups \(g_idx\) is 0 to 4, and there are 4 groups"):
        bad.check_values("a layer")
    bad.nested_code[3] = -1
    with pytest.raises(ValueError, match="-1 to 3"):
        bad.check_values()
    scales = random_affine_weight(8, 256)
    assert scales.absmax is not None
    scales.absmax[2, 1] = float("nan")
    with pytest.raises(ValueError, match="scales holds 1 values that are not finite"):
        scales.check_values()
    blocks = random_quant_weight(8, 256, quant_type="q6_k")
    blocks.packed[5, 208:210] = torch.tensor([0, 0x7C], dtype=torch.uint8)
    with pytest.raises(ValueError, match="byte 208 of a block holds 1 values"):
        blocks.check_values()
    with pytest.raises(ValueError, match="one of"):
        QuantWeight.gguf(blocks.packed, "q2_k", (8, 256))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_some_rows(name: str) -> None:
    w = random_quant_weight(8, 256, quant_type=name, nested=name == "nf4")
    rows = torch.tensor([5, 0, 5])
    some = w.take(rows)
    assert some is not None
    assert_same_bits(dequantize_4bit(some), dequantize_4bit(w)[rows])
    assert w.to("cpu").shape == w.shape
    assert w.nbytes >= w.packed.numel()
