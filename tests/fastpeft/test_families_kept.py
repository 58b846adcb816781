"""Projections that are kept between tokens: whatever is changed under them, the modules say it again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.families.projections import Linears, linears
from fastpeft.weights.lookups import Lookups
from torch import Tensor, nn

from peft_kernels import quantize_4bit
from peft_kernels.testing import assert_same_bits

K, N = 64, 48


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(K, N), nn.Linear(K, 2 * N, bias=False)


def model(quantized: bool = True) -> Any:
    torch.manual_seed(0)
    two = Two()
    if quantized:
        fastpeft.quantize_model(two, "nf4", skip=[])
    config = fastpeft.LoraConfig(r=4, lora_dropout=0.5, target_modules=["q", "k"], init_lora_weights=False)
    found = fastpeft.get_peft_model(two, config).eval()
    found.add_adapter("other", fastpeft.LoraConfig(r=2, target_modules=["q", "k"], init_lora_weights=False))
    return found


def layers(found: Any) -> tuple[Any, Any]:
    return found.base_model.model.q, found.base_model.model.k


def _data(found: Any) -> None:
    layers(found)[0].lora_A["default"].weight.data = torch.randn(4, K)


def _replaced(found: Any) -> None:
    layers(found)[0].lora_B["default"].weight = nn.Parameter(torch.randn(N, 4))


def _requantized(found: Any) -> None:
    layers(found)[0].base_layer.set_quant_weight(quantize_4bit(torch.randn(N, K), "nf4", 64, True))


def _absmax(found: Any) -> None:
    base = layers(found)[0].base_layer
    base.nested_absmax = base.nested_absmax * 2


def _bias(found: Any) -> None:
    layers(found)[0].base_layer.bias = nn.Parameter(torch.randn(N))


def _scaled(found: Any) -> None:
    layers(found)[0].scaling["default"] = 3.0


def _hook(found: Any) -> None:
    layers(found)[1].register_forward_hook(lambda module, args, y: y + 1)


def _inner_hook(found: Any) -> None:
    layers(found)[0].lora_A["default"].register_forward_hook(lambda module, args, y: y + 1)


def _base_hook(found: Any) -> None:
    layers(found)[0].base_layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _forward(found: Any) -> None:
    layer = layers(found)[1]
    own = layer.forward
    layer.forward = lambda x: own(x) * 2


def _rows(found: Any) -> None:
    for layer in layers(found):
        layer.set_rows(["other"])


def _scattered(found: Any) -> None:
    layers(found)[0].base_layer.compute_dtype = torch.bfloat16
    layers(found)[0].changed()


CHANGES: dict[str, Callable[[Any], object]] = {
    "another adapter": lambda m: m.set_adapter("other"),
    "both": lambda m: m.base_model.set_adapter(["default", "other"]),
    "deleted": lambda m: m.delete_adapter("default"),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "merged": lambda m: m.merge_adapter(),
    "a parameter's data": _data, "a parameter": _replaced, "another 4-bit weight": _requantized, "scales": _absmax,
    "a bias": _bias, "a scaling": _scaled, "a hook": _hook, "a hook inside": _inner_hook,
    "a hook of the base": _base_hook, "a forward": _forward, "rows": _rows, "another dtype of computing": _scattered,
    "values": lambda m: layers(m)[0].lora_A["default"].weight.data.mul_(2),
    "no scaling": lambda m: layers(m)[0].scaling.update(default=0.0),
    "cast": lambda m: m.to(torch.float32).bfloat16().float(),
}  # fmt: skip


def kept(of: Linears) -> bool:
    return of._kept is not None and of._kept.found is not None and of._kept.lookups.hold()


def apart(x: Tensor, found: Any) -> list[Tensor]:
    return [layer(x.unsqueeze(1)).squeeze(1) for layer in layers(found)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    found, of, x = model(), Linears(), torch.randn(1, K)
    with torch.no_grad():
        for _ in range(3):
            first = linears(of, x, False, *layers(found))
        assert kept(of)
        before = apart(x, found)
        for got, expected in zip(first, before, strict=True):
            assert_same_bits(got, expected)
        CHANGES[change](found)
        for _ in range(3):
            expected_now = apart(x, found)
            for got, expected in zip(linears(of, x, False, *layers(found)), expected_now, strict=True):
                assert_same_bits(got, expected)
        changed = any(not torch.equal(a, b) for a, b in zip(before, expected_now, strict=True))
    assert changed or change == "cast"


def test_dropout_of_a_layer_in_training_is_not_left_out() -> None:
    found, of, x = model(), Linears(), torch.randn(1, K)
    with torch.no_grad():
        for _ in range(3):
            linears(of, x, False, *layers(found))
        assert kept(of)
        found.train()
        draws = [linears(of, x, False, *layers(found))[0] for _ in range(4)]
    assert not all(torch.equal(draws[0], other) for other in draws[1:])


def test_a_call_with_rows_of_its_own() -> None:
    found, of, x = model(), Linears(), torch.randn(1, K)
    with torch.no_grad():
        for _ in range(3):
            linears(of, x, False, *layers(found))
        with found.base_model.rows_assigned(["other"]):
            expected = apart(x, found)
            for got, want in zip(linears(of, x, False, *layers(found)), expected, strict=True):
                assert_same_bits(got, want)
        assert kept(of)


def test_other_modules_and_another_dtype() -> None:
    found, other, of, x = model(), model(), Linears(), torch.randn(1, K)
    _data(other)
    with torch.no_grad():
        for given in (found, other, found):
            for _ in range(2):
                for got, want in zip(linears(of, x, False, *layers(given)), apart(x, given), strict=True):
                    assert_same_bits(got, want)
        assert linears(of, x.bfloat16(), False, *layers(found))[0].dtype is torch.bfloat16


def test_with_gradients_nothing_is_kept() -> None:
    found, of = model(), Linears()
    for _ in range(3):
        of.projections(torch.randn(1, K), layers(found))
    assert of._kept is None


def test_a_copy_keeps_nothing() -> None:
    found, of = model(), Linears()
    with torch.no_grad():
        for _ in range(3):
            linears(of, torch.randn(1, K), False, *layers(found))
    assert kept(of)
    assert copy.deepcopy(of)._kept is None


def test_layers_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    one = bnb.nn.Linear4bit(K, N, compute_dtype=None, quant_type="nf4")
    one.load_state_dict({"weight": torch.randn(N, K), "bias": torch.randn(N)})
    one, of, x = one.to("cpu"), Linears(), torch.randn(1, K)
    with torch.no_grad():
        first = [linears(of, x, False, one)[0] for _ in range(3)]
        assert kept(of)
        for held, name, turn in (one.weight, "data", torch.flipud), (one.weight.quant_state, "absmax", torch.square):
            setattr(held, name, turn(getattr(held, name)))
            now = [linears(of, x, False, one)[0] for _ in range(3)]
            assert not torch.equal(first[0], now[0])
            assert_same_bits(now[2], now[0])
            first = now


def test_lookups() -> None:
    held, module, other = {"a": 1}, torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    lookups = Lookups()
    lookups.entries(held, "a", "b")
    lookups.calls_of(module)
    assert lookups.keeps
    assert lookups.hold()
    held["b"] = 2
    assert not lookups.hold()
    del held["b"]
    other.register_forward_hook(print)
    assert lookups.hold()
    hook = module.register_forward_pre_hook(print)
    assert not lookups.hold()
    assert not lookups.hold()
    hook.remove()
    assert lookups.hold()
    lookups.entries(type("NoDict", (), {})(), "a")
    assert not lookups.keeps
