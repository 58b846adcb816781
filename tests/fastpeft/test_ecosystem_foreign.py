"""Base layers of other quantisers with the packages themselves: small layers, quantised in the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastpeft import LoraConfig, PeftWarning, get_peft_model
from fastpeft.weights.find import weight_of
from torch import Tensor, nn

from peft_kernels import QuantWeight
from peft_kernels.testing import assert_no_worse, assert_same_bits

pytestmark = pytest.mark.ecosystem
N, K = 64, 128


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, N)


def hqq(bits: int = 4, axis: int = 1) -> tuple[nn.Module, Tensor]:
    core = pytest.importorskip("hqq.core.quantize", reason="needs hqq")
    config = core.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    module = core.HQQLinear(linear(), config, compute_dtype=torch.float32, device="cpu")
    return module, module.dequantize()


def gptq(bits: int = 4, act_order: bool = False) -> tuple[nn.Module, Tensor]:
    """Rounded to the grid of each group, packed by gptqmodel's own code."""
    kernels = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="needs gptqmodel")
    dense, group = linear().half(), 32
    index = torch.arange(K) // group
    index = index[torch.randperm(K, generator=torch.Generator().manual_seed(1))] if act_order else index
    scales = torch.full((N, K // group), 0.02).half() + torch.rand(N, K // group).half() * 0.01
    zeros = torch.randint(1, 2**bits - 1, (N, K // group))
    codes = (dense.weight / scales[:, index]).round() + zeros[:, index]
    wanted = scales.float()[:, index] * (codes.clamp(0, 2**bits - 1).float() - zeros[:, index])
    dense.weight.data = wanted.half()
    module = kernels.TorchLinear(bits=bits, group_size=group, sym=False, desc_act=act_order, in_features=K,
                                 out_features=N, bias=True)  # fmt: skip
    module.pack(dense, scales.float(), zeros.float(), index.to(torch.int32))
    return module.eval(), wanted


def torchao(kind: str) -> tuple[nn.Module, Tensor]:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    module = linear()
    config = {"int8": lambda: quantization.Int8WeightOnlyConfig(version=2),
              "float8": quantization.Float8WeightOnlyConfig, "intx": quantization.IntxWeightOnlyConfig}[kind]()
    quantization.quantize_(module, config)
    return module, module.weight.dequantize().float()  # type: ignore[operator]


def aqlm(bits: int = 8) -> tuple[nn.Module, Tensor]:
    package: Any = pytest.importorskip("aqlm", reason="needs aqlm")
    utils: Any = pytest.importorskip("aqlm.utils")
    module = package.QuantizedLinear(K, N, 8, 1, 2, bits, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, module.codes.shape, generator=generator)
    module.codes.data = utils.pack_int_data(codes.clone(), bits).clone()
    for p in (module.codebooks, module.scales, module.bias):
        p.data = torch.randn(p.shape, generator=generator)
    return module, utils._dequantize_weight(codes, module.codebooks, module.scales).detach()


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "hqq": hqq, "hqq-8bit": lambda: hqq(8), "hqq-3bit": lambda: hqq(3), "hqq-columns": lambda: hqq(axis=0),
    "gptq": gptq, "gptq-8bit": lambda: gptq(8), "gptq-act-order": lambda: gptq(act_order=True),
    "torchao-int8": lambda: torchao("int8"), "torchao-float8": lambda: torchao("float8"),
    "aqlm": aqlm, "aqlm-16bit": lambda: aqlm(10),
}  # fmt: skip
CODED = ("hqq", "hqq-8bit", "gptq", "gptq-8bit", "gptq-act-order", "torchao-int8")
MERGING = [name for name in LAYERS if name.startswith(("hqq", "torchao"))]


def adapted(base: nn.Module) -> Any:
    config = LoraConfig(target_modules=["0"], init_lora_weights=False, r=4)
    return get_peft_model(nn.Sequential(base), config).eval()


@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_with_the_weight_that_their_package_decodes(name: str) -> None:
    module, wanted = LAYERS[name]()
    base = weight_of(module)
    assert base is not None
    found = base.read()[0]
    wide = wanted.double()
    # hqq and gptqmodel decode in the layer's dtype: theirs is the eager side
    assert_no_worse(found, wanted.float(), wide, wide.abs().max().expand_as(wide))
    layer = adapted(module).base_model.model[0]
    x = torch.randn(3, K)
    w, b = layer.merged_weight(["default"])
    exact = nn.functional.linear(x.double(), w.double(), None if b is None else b.double()).detach()
    eager = nn.functional.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype)).detach()
    size = nn.functional.linear(x.double().abs(), w.double().abs(), None if b is None else b.double().abs())
    assert_no_worse(layer(x).detach(), eager, exact, size.detach())
    assert isinstance((layer.base.fast() or (lambda: None))(), QuantWeight) is (name in CODED)


@pytest.mark.parametrize("name", MERGING)
def test_merging_requantises_by_the_package(name: str) -> None:
    layer = adapted(LAYERS[name]()[0]).base_model.model[0]
    x = torch.randn(3, K)
    before = layer(x).detach()
    error = layer.merge()
    assert error is not None
    assert error > 0
    layer.unmerge()
    assert_same_bits(layer(x).detach(), before)


def test_a_torchao_tensor_that_cannot_be_made_again_refuses_a_merge() -> None:
    model = adapted(torchao("intx")[0])
    before = model.base_model.model[0].base_layer.weight
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    assert model.base_model.model[0].base_layer.weight is before


@pytest.mark.parametrize("name", ["gptq", "gptq-2bit", "aqlm"])
def test_merging_is_refused_before_anything_changes(name: str) -> None:
    model = adapted(gptq(2)[0] if name == "gptq-2bit" else LAYERS[name]()[0])
    before = [t.clone() for t in model.base_model.model[0].base_layer.state_dict().values()]
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    after = model.base_model.model[0].base_layer.state_dict().values()
    for a, b in zip(before, after, strict=True):
        assert_same_bits(a, b)


def test_a_merged_model_of_hqq_is_one_of_hqq() -> None:
    model = adapted(hqq()[0])
    with pytest.warns(PeftWarning, match="requantising"):
        merged = model.merge_and_unload()
    assert type(merged[0]).__name__ == "HQQLinear"


@pytest.mark.parametrize("name", ["hqq", "gptq", "torchao-int8", "torchao-float8", "aqlm"])
def test_training_moves_the_loss(name: str) -> None:
    model = adapted(LAYERS[name]()[0]).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    x, losses = torch.randn(16, K), []
    for _ in range(3):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
