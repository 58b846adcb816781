"""Small layers of other quantisers, made with their packages: pairs of a layer and the weight that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

N, K = 64, 128


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, N)


def hqq(bits: int = 4, axis: int = 1) -> tuple[nn.Module, Tensor]:
    core = pytest.importorskip("hqq.core.quantize", reason="needs hqq")
    config = core.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    module = core.HQQLinear(linear(), config, compute_dtype=torch.float32, device="cpu")
    return module, module.dequantize()


def _codes(bits: int, group: int, act_order: bool = False) -> tuple[nn.Linear, Tensor, Tensor, Tensor, Tensor]:
    """A dense layer on the grid of its groups, in float16; scales, zero points, each column's group, W in float32."""
    dense = linear().half()
    index = torch.arange(K) // group
    index = index[torch.randperm(K, generator=torch.Generator().manual_seed(1))] if act_order else index
    scales = torch.full((N, K // group), 0.02).half() + torch.rand(N, K // group).half() * 0.01
    zeros = torch.randint(1, 2**bits - 1, (N, K // group))
    codes = (dense.weight / scales[:, index]).round() + zeros[:, index]
    wanted = scales.float()[:, index] * (codes.clamp(0, 2**bits - 1).float() - zeros[:, index])
    dense.weight.data = wanted.half()
    return dense, scales, zeros, index, wanted.detach()


def gptq(bits: int = 4, act_order: bool = False) -> tuple[nn.Module, Tensor]:
    """Rounded to the grid of each group, packed by gptqmodel's own code."""
    kernels = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="needs gptqmodel")
    dense, scales, zeros, index, wanted = _codes(bits, 32, act_order)
    module = kernels.TorchLinear(bits=bits, group_size=32, sym=False, desc_act=act_order, in_features=K,
                                 out_features=N, bias=True)  # fmt: skip
    module.pack(dense, scales.float(), zeros.float(), index.to(torch.int32))
    return module.eval(), wanted


def awq() -> tuple[nn.Module, Tensor]:
    """As `gptq`, in AWQ's order."""
    kernels = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq", reason="needs gptqmodel")
    dense, scales, zeros, _, wanted = _codes(4, 32)
    module = kernels.AwqTorchLinear(bits=4, group_size=32, sym=False, desc_act=False, in_features=K, out_features=N,
                                    bias=True)  # fmt: skip
    module.pack(dense, scales, zeros)
    module.post_init()
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


def int8() -> tuple[nn.Module, Tensor]:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    dense = linear()
    module = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0)
    module.weight = bnb.nn.Int8Params(dense.weight.data, requires_grad=False, has_fp16_weights=False)
    module.bias = dense.bias
    module = module.to("cpu").requires_grad_(False)
    return module, module.weight.data.float() * (module.weight.SCB / 127).unsqueeze(1)


LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "hqq": hqq, "hqq-8bit": lambda: hqq(8), "hqq-3bit": lambda: hqq(3), "hqq-columns": lambda: hqq(axis=0),
    "gptq": gptq, "gptq-8bit": lambda: gptq(8), "gptq-act-order": lambda: gptq(act_order=True),
    "gptq-2bit": lambda: gptq(2), "gptq-3bit": lambda: gptq(3), "awq": awq,
    "torchao-int8": lambda: torchao("int8"), "torchao-float8": lambda: torchao("float8"),
    "aqlm": aqlm, "aqlm-16bit": lambda: aqlm(10), "bnb-int8": int8,
}  # fmt: skip
