"""The adapters to other projects' kernels on a GPU, held against stand-ins that have their signatures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from bench import subjects
from bench.gpu import others
from peft_kernels import dequantize_4bit, lora_linear, use_backend
from peft_kernels.testing import assert_no_worse


def test_what_is_absent_or_refuses_is_named() -> None:
    absent: dict[str, str] = {}

    def refuses() -> others.Calls:
        raise ValueError("no such\nthing")

    assert others.optional(absent, "a", "surely_not_installed", refuses) == []
    assert others.optional(absent, "b", "torch", refuses) == []
    assert others.optional(absent, "c", "torch", lambda: [lambda: 1 / 0]) == []
    (found,) = others.optional(absent, "d", "torch", lambda: [lambda: 1])
    assert found.name == "d"
    assert absent == {"a": "surely_not_installed is not installed", "b": "ValueError: no such",
                      "c": "ZeroDivisionError: division by zero"}  # fmt: skip


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    """A module of that name, and its parents, for the time of a test."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def layer_and_inputs() -> tuple[torch.nn.Module, Tensor, Tensor, Tensor, Callable[[Tensor], None]]:
    """A PEFT layer over bitsandbytes' Linear4bit with x, A and B, and a check of a result against the reference."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    (q,) = subjects.quant_copies(128, 64, 1)
    (layer,) = subjects.with_adapter(peft, [subjects.bnb_layer(q, torch.float32)], 16, 0.0, True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), use_backend("reference"):
        eager, exact = (lora_linear(x.to(t), q, a.to(t), b.to(t), layer.scaling["default"])
                        for t in (torch.float32, torch.float64))  # fmt: skip
    magnitude = x.abs() @ dequantize_4bit(q, torch.float32).abs().t()
    return layer, x, a, b, lambda y: assert_no_worse(y.detach(), eager, exact, magnitude)


def test_unsloths_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """`apply_lora_o(self, X)` takes [batch, length, width] and reads PEFT's attributes of self.o_proj."""
    layer, x, _, _, check = layer_and_inputs()
    import bitsandbytes.functional as bnb

    def apply_lora_o(self: object, X: Tensor) -> Tensor:
        proj = self.o_proj  # type: ignore[attr-defined]
        batch, length, _ = X.shape
        weight, adapter = proj.base_layer.weight, proj.active_adapters[0]
        w = bnb.dequantize_4bit(weight.data, weight.quant_state).float()
        low = X @ proj.lora_A[adapter].weight.t() @ proj.lora_B[adapter].weight.t()
        return (X @ w.t() + proj.scaling[adapter] * low).view(batch, length, -1)

    stand_in(monkeypatch, "unsloth.kernels", apply_lora_o=apply_lora_o)
    through = others.unsloth(layer)
    check(through(x))
    gradients = subjects.step_call(layer, x, torch.ones(3, 128), through)()
    assert [tuple(g.shape) for g in gradients] == [(3, 64), (16, 64), (128, 16)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("newer", [False, True])
def test_vllms_adapter(newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lora_shrink(x, [A], out, *meta, scaling)`, then `lora_expand(low, [B], y, *meta, offset_start, add_inputs)`;
    what lies between is from `LoRAKernelMeta.meta_args`, which newer versions give a second parameter."""
    layer, x, a, b, check = layer_and_inputs()

    class LoRAKernelMeta:
        @staticmethod
        def make(max_loras: int, max_num_tokens: int, device: object) -> LoRAKernelMeta:
            assert (max_loras, max_num_tokens) == (1, 3)
            return LoRAKernelMeta()

        def prepare_tensors(self, token_lora_mapping: Tensor) -> None:
            self.mapping = token_lora_mapping
            assert token_lora_mapping.tolist() == [0, 0, 0]

        if newer:

            def meta_args(self, token_nums: int, specialize_active_lora: bool) -> tuple[object, ...]:
                return self.mapping[:token_nums], "more"
        else:

            def meta_args(self, token_nums: int) -> tuple[object, ...]:
                return self.mapping[:token_nums], "more"

    def lora_shrink(
        inputs: Tensor, weights: list[Tensor], out: Tensor, mapping: Tensor, more: str, scaling: float
    ) -> None:
        assert (weights[0].shape, out.shape, out.dtype) == ((1, 16, 64), (1, 3, 16), torch.float32)
        out[0] = scaling * inputs @ weights[0][0].t()

    def lora_expand(
        inputs: Tensor, weights: list[Tensor], out: Tensor, mapping: Tensor, more: str, offset_start: int = 0,
        add_inputs: bool = False,
    ) -> None:  # fmt: skip
        assert (weights[0].shape, offset_start, add_inputs) == ((1, 128, 16), 0, True)
        out += inputs[0].to(out.dtype) @ weights[0][0].t()

    stand_in(monkeypatch, "vllm.lora.ops.triton_ops", LoRAKernelMeta=LoRAKernelMeta, lora_shrink=lora_shrink,
             lora_expand=lora_expand)  # fmt: skip
    call = others.vllm(layer.base_layer, x, a, b, layer.scaling["default"])  # type: ignore[arg-type]
    first, second = call(), call()
    assert torch.equal(first, second), "nothing accumulates between calls"
    check(first)
