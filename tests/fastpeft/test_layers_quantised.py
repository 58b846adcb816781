"""AdapterLayer over quantised bases: what it computes, merging and the way back."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from fastpeft import LoraConfig, NF4Linear, PeftWarning, get_peft_model, quantize_model
from fastpeft.weights.base import relative_error
from fastpeft.weights.find import weight_of
from torch import Tensor, nn

from peft_kernels import QuantWeight, dequantize_4bit
from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("layer_tools.py")))
lora_layer, size_of, QUANTISED, _linear4bit, _nf4 = (
    tools[name] for name in ("lora_layer", "size_of", "QUANTISED", "_linear4bit", "_nf4")
)


@pytest.mark.parametrize("base", QUANTISED)
@pytest.mark.parametrize("names", ["a", "ab"])
def test_a_quantised_base_computes_with_its_decoded_weight(base: str, names: str) -> None:
    layer = lora_layer(QUANTISED[base](), names)
    layer.set_adapter(list(names))
    x = torch.randn(3, 64)
    w, b = layer.merged_weight(list(names))
    assert w.dtype == torch.float32
    exact = nn.functional.linear(x.double(), *(t.double() for t in layer.merged_weight(names)))
    eager = nn.functional.linear(x, w, b)
    assert_no_worse(layer(x).detach(), eager.detach(), exact.detach(), size_of(layer, x))
    assert layer.weight.dtype in (torch.uint8, torch.int8)


@pytest.mark.parametrize("base", QUANTISED)
def test_a_quantised_base_is_read_in_place_by_one_kernel_call(base: str) -> None:
    layer = lora_layer(QUANTISED[base]())
    layer(torch.randn(3, 64))
    assert layer._plan is not None
    fast = layer.base.fast()
    assert fast is not None
    weight = fast()
    assert isinstance(weight, QuantWeight)
    assert weight.packed.data_ptr() == layer.base_layer.weight.data_ptr()


@pytest.mark.parametrize("base", QUANTISED)
def test_merging_requantises_reports_its_error_and_comes_back_byte_for_byte(base: str) -> None:
    model = get_peft_model(
        nn.Sequential(QUANTISED[base]()), LoraConfig(target_modules=["0"], init_lora_weights=False)
    ).eval()
    layer = model.base_model.model[0]
    x = torch.randn(3, 64)
    y = model(x).detach()
    before = {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
    wanted = layer.merged_weight(["default"])[0]
    with pytest.warns(PeftWarning, match="requantising"):
        model.merge_adapter()
    got = layer.base.read()[0]
    error = relative_error(got, wanted)
    assert model.base_model.merge_errors == {"0": error}
    assert 0 < error < (0.02 if base == "bnb-int8" else 0.2)
    assert not torch.equal(model(x), y)
    after = layer.base_layer.state_dict()
    assert after["weight"].dtype == before["weight"].dtype
    model.unmerge_adapter()
    restored = layer.base_layer.state_dict()
    assert list(restored) == list(before)
    for key in before:
        assert_same_bits(restored[key], before[key])
    assert_same_bits(model(x).detach(), y)
    with pytest.warns(PeftWarning, match="requantising"):
        merged = model.merge_and_unload()
    assert type(merged[0]) is type(layer.base_layer)
    assert_same_bits(weight_of(merged[0]).read()[0], got)
    assert layer._unmerged is None, "merge_and_unload must not keep the old weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("quant_type", "blocksize"), [("int4", 64), ("int8", None), ("int8", 32), ("uint8", 32)])
def test_merging_into_integers_keeps_their_form(quant_type: str, blocksize: int | None, dtype: torch.dtype) -> None:
    base = QuantWeight.quantize(torch.randn(96, 64).to(dtype) * 0.1, quant_type, blocksize)
    model = get_peft_model(
        nn.Sequential(NF4Linear(base)), LoraConfig(target_modules=["0"], init_lora_weights=False)
    ).eval()
    layer = model.base_model.model[0]
    before = {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
    wanted = layer.merged_weight(["default"])[0].detach()
    with pytest.warns(PeftWarning, match="requantising"):
        model.merge_adapter()
    got = layer.base_layer.quant_weight()
    assert (got.quant_type, got.blocksize, got.shape, got.dtype) == (
        base.quant_type, base.blocksize, base.shape, base.dtype
    )  # fmt: skip
    after = layer.base_layer.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {k: (v.shape, v.dtype) for k, v in before.items()}
    assert base.absmax is not None
    once = QuantWeight.quantize(wanted.to(base.absmax.dtype), quant_type, blocksize)
    assert_same_bits(layer.base.read()[0], dequantize_4bit(once, torch.float32))
    x, exact = torch.randn(3, 64), dequantize_4bit(got, torch.float64)
    size = nn.functional.linear(x.abs(), exact.abs().float())
    eager = nn.functional.linear(x, exact.float())
    assert_no_worse(model(x).detach(), eager, nn.functional.linear(x.double(), exact), size)
    model.unmerge_adapter()
    for key, value in layer.base_layer.state_dict().items():
        assert_same_bits(value, before[key])


@pytest.mark.parametrize("base", QUANTISED)
def test_merging_one_after_the_other_rounds_once(base: str) -> None:
    layer = lora_layer(QUANTISED[base](), "ab")
    layer.merge(adapter_names=["a", "b"])
    together = layer.base.read()[0].clone()
    layer.unmerge()
    layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["a", "b"]
    assert_same_bits(layer.base.read()[0], together)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_an_int8_layer_computes_as_bitsandbytes_does_in_training(threshold: float) -> None:
    """There it decodes the weight, too; in evaluation it rounds x to int8, which we do not. Its forward takes the
    scales out of the weight, and neither that nor a load leaves us with those of before."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    base = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False, threshold=threshold).to("cpu")
    layer = lora_layer(base)
    layer.enable_adapters(False)
    x = torch.randn(3, 64, requires_grad=True)
    grads = []
    for run in (layer, base.train()):
        y = run(x)
        grads.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    w, b = layer.base.read()
    wide = x.detach().double().requires_grad_()
    exact = nn.functional.linear(wide, w.double(), b.double())
    slope = torch.autograd.grad(exact.square().sum(), wide)[0]
    sizes = (size_of(layer, x.detach()), slope.abs().max().expand_as(slope))
    for ours, theirs, want, size in zip(*grads, (exact.detach(), slope), sizes, strict=True):
        assert_no_worse(ours, theirs, want, size)
    before = layer(x).detach()
    assert "SCB" in base.state_dict()
    base.state.SCB.mul_(2)
    assert not torch.equal(layer(x), before)


def test_merging_our_4bit_layer_keeps_its_format() -> None:
    layer = lora_layer(_nf4())
    old = layer.base_layer.quant_weight()
    layer.merge()
    new = layer.base_layer.quant_weight()
    for name in ("shape", "quant_type", "blocksize", "dtype", "nested", "nested_blocksize"):
        assert getattr(new, name) == getattr(old, name)
    assert not torch.equal(dequantize_4bit(new), dequantize_4bit(old))


def test_bitsandbytes_is_kept_from_repacking_the_bytes_of_its_layer() -> None:
    # Its forward in eval mode on a CPU with AVX512-BF16 rewrites the weight, with a loss in nested scales.
    base = _linear4bit()
    layer = lora_layer(base)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    x = torch.randn(3, 64)
    layer(x)
    layer.enable_adapters(False)
    layer(x)
    assert not getattr(base.weight.quant_state, "packing_format_for_cpu", False)
    for key, value in base.state_dict().items():
        assert_same_bits(value, before[key])


def test_a_layer_that_bitsandbytes_did_repack_is_read_right() -> None:
    base = _linear4bit(nested=False).eval()
    x = torch.randn(3, 64)
    decoded = dequantize_4bit(QuantWeight.from_bnb(base.weight)).clone()
    with torch.no_grad():
        base(x)
    layer = lora_layer(base)
    rounded = layer.base.read()[0]
    # The packing rounded the scales to bfloat16: half a unit in the eighth bit.
    assert torch.all((rounded - decoded).abs() <= decoded.abs() * torch.finfo(torch.bfloat16).eps)
    assert torch.equal(rounded == 0, decoded == 0)
    layer.enable_adapters(False)
    assert layer(x).shape == (3, 96)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compute_dtype_of_a_4bit_layer_is_obeyed(compute: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fast = lora_layer(_linear4bit(compute_dtype=compute))
    x = torch.randn(3, 64).to(dtype)
    y = fast(x)
    assert y.dtype == dtype
    w, b = fast.merged_weight(["a"])
    exact = nn.functional.linear(x.double(), w.double(), b.double())
    eager = nn.functional.linear(x.to(compute), w.to(compute), b.to(compute)).to(dtype)
    low = torch.promote_types(compute, dtype) if compute == dtype else torch.bfloat16
    size = nn.functional.linear(x.double().abs(), w.double().abs()) * (torch.finfo(low).eps / torch.finfo(dtype).eps)
    assert_no_worse(y.detach(), eager.detach(), exact.detach(), size.detach())


def test_a_format_without_a_quantiser_refuses_before_another_layer_is_merged() -> None:
    blocks = torch.zeros(96 * 144, dtype=torch.uint8)
    model = nn.Sequential(nn.Linear(256, 256), NF4Linear(QuantWeight.gguf(blocks, "q4_k", (96, 256)), None))
    first = model[0].weight
    for safe in (False, True):
        adapted = get_peft_model(model, LoraConfig(target_modules=["0", "1"], init_lora_weights=False))
        with pytest.raises(ValueError, match="no quantiser for it"):
            adapted.merge_adapter(safe_merge=safe)
        with pytest.raises(ValueError, match="quantise to q4_k again"):
            adapted.merge_and_unload(safe_merge=safe)
        assert adapted.base_model.model[0].base_layer.weight is first
        model = adapted.unload()


def test_a_4bit_layer_that_is_not_quantised_yet_is_refused() -> None:
    import bitsandbytes as bnb

    with pytest.raises(ValueError, match="0: a bitsandbytes Linear4bit that is not quantised"):
        get_peft_model(nn.Sequential(bnb.nn.Linear4bit(64, 96)), LoraConfig(target_modules=["0"]))
    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False))
    with pytest.raises(ValueError, match="0: a bitsandbytes Linear8bitLt that is not quantised"):
        get_peft_model(model, LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="0: Embedding"):
        get_peft_model(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), LoraConfig(target_modules=["0"]))


def test_an_embedding_that_scales_its_rows_scales_the_adapters_too() -> None:
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    layer = lora_layer(Scaled(31, 20))
    ids = torch.tensor([[1, 5], [30, 0]])
    y = layer(ids)
    w = layer.merged_weight(["a"])[0]
    exact = nn.functional.embedding(ids, w.double().t()) * 3
    eager = nn.functional.embedding(ids, w.t()) * 3
    assert_no_worse(y.detach(), eager.detach(), exact.detach(), exact.detach().abs() + 1)


def test_a_base_layer_that_is_quantised_under_its_adapters_is_read_as_what_it_is() -> None:
    layer = lora_layer(nn.Linear(64, 32))
    x = torch.randn(3, 64)
    layer(x)
    quantize_model(layer, skip=("lora_A", "lora_B"))
    layer.changed()
    assert layer.info.quantized == layer.quantization_backend == "nf4"
    assert_same_bits(layer.base.read()[0], layer.base_layer.dequantize(torch.float32))
    exact = nn.functional.linear(x.double(), *(t.double() for t in layer.merged_weight("a")))
    eager = nn.functional.linear(x, *layer.merged_weight("a"))
    assert_no_worse(layer(x).detach(), eager.detach(), exact.detach(), size_of(layer, x))
    assert 0 < layer.merge() < 0.2


@pytest.mark.parametrize("base", QUANTISED)
def test_a_second_merge_that_fails_leaves_the_first(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = lora_layer(QUANTISED[base](), "ab")
    before = {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
    layer.merge(adapter_names=["a"])
    merged = {k: v.clone() for k, v in layer.base_layer.state_dict().items()}

    def fails(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(type(layer.base), "write", fails)
    with pytest.raises(MemoryError):
        layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["a"]
    for key, value in layer.base_layer.state_dict().items():
        assert_same_bits(value, merged[key])
    layer.unmerge()
    for key, value in layer.base_layer.state_dict().items():
        assert_same_bits(value, before[key])
