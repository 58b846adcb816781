"""Layers with adapters by row in training, as one autograd node: values, gradients, and what takes the ordinary way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastpeft import LoraConfig, get_peft_model, quantize_model
from fastpeft.layer.by_row.train import linears
from torch import Tensor, nn

from peft_kernels import AdapterStack, multi_lora_linear, native, philox
from peft_kernels.ops.multi_lora_linear import prepared as by_pointer
from peft_kernels.testing import assert_no_worse, assert_same_bits

K, SIZES = 64, {"q": 48, "k": 32, "v": 32}
ROWS = ("a", "__base__", "b", "a", "c")
RANKS = {"a": 4, "b": 2, "c": 3}


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, size in SIZES.items():
            setattr(self, name, nn.Linear(K, size, bias=name == "q"))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)  # type: ignore[operator]


def model(nf4: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    base: Any = Three()
    if nf4:
        quantize_model(base, "nf4")
    made: Any = None
    for name, r in RANKS.items():
        config = LoraConfig(r=r, lora_alpha=3, target_modules=list(SIZES), init_lora_weights=False, **options)
        if made is None:
            made = get_peft_model(base, config, name)
        else:
            made.add_adapter(name, config)
    made.set_adapter("a")
    made.set_requires_grad(["b", "c"])
    for layer in layers(made):
        layer.set_rows(ROWS)
    return made.train()


def layers(made: Any) -> list[Any]:
    return [getattr(made.get_base_model(), name) for name in SIZES]


def results(made: Any, x: Tensor, together: bool) -> list[Tensor]:
    """Outputs, and the gradients of x and of every adapter's tensors."""
    x = x.clone().requires_grad_()
    ys = linears(x, layers(made)) if together else [layer(x) for layer in layers(made)]
    assert ys is not None
    g = torch.Generator().manual_seed(3)
    total = sum((y * torch.randn(y.shape, generator=g).to(y.dtype)).sum() for y in ys)
    parameters = [p for p in made.parameters() if p.requires_grad]
    return [*(y.detach() for y in ys), *torch.autograd.grad(total, [x, *parameters])]  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["by pointer", "stacked"])
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_each_layer_in_float64(nf4: bool, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[int] = []
    run = by_pointer.forward_layers
    monkeypatch.setattr(by_pointer, "forward_layers", lambda x, of, *seed: served.append(len(of)) or run(x, of, *seed))
    if way == "stacked":  # as where the backend is another
        monkeypatch.setattr(by_pointer, "serves_layer", lambda x, layer: False)
    made = model(nf4)
    x = torch.randn(len(ROWS), 3, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact_model = model(nf4).double()
    exact = results(exact_model, x.double(), False)  # float64 takes the ordinary way, by the reference
    if dtype is torch.bfloat16:
        for layer in layers(made):
            if not nf4:
                layer.base_layer.to(dtype)
        exact_model = model(nf4)
        for layer in layers(exact_model):
            if not nf4:
                layer.base_layer.to(dtype)
        exact = results(exact_model.double(), x.double(), False)
    ours, eager = results(made, x, True), results(made, x, False)
    assert len(ours) == 3 + 1 + 2 * 3 * len(RANKS)
    assert served == ([] if way == "stacked" or native.available() is not None else [3, 1, 1, 1])
    for mine, theirs, best in zip(ours, eager, exact, strict=True):
        assert_no_worse(mine, theirs, best, best.abs().max().expand_as(best) * 4)


def test_tensors_that_lie_by_columns() -> None:
    made, x = model(), torch.randn(len(ROWS), K)
    eager, exact = results(made, x, False), results(model().double(), x.double(), False)
    results(made, x, True)  # what serves these layers is known from here on
    for layer in layers(made):
        for weight in (layer.base_layer.weight, layer.lora_A["b"].weight):
            weight.data = weight.data.t().contiguous().t()
    for mine, theirs, best in zip(results(made, x, True), eager, exact, strict=True):
        assert_no_worse(mine, theirs, best, best.abs().max().expand_as(best) * 4)


def test_dropout_is_that_of_the_op() -> None:
    made = model(lora_dropout=0.4)
    x = torch.randn(len(ROWS), 2, K)
    layer = layers(made)[0]
    torch.manual_seed(5)
    found = linears(x, [layer])
    assert found is not None
    torch.manual_seed(5)
    seed = philox.draw_seed(x.device)
    stack = AdapterStack.pack(
        [(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in ("a", "b", "c")]
    )
    slots = torch.tensor([0, -1, 1, 0, 2])
    assert_same_bits(found[0], multi_lora_linear(x, layer.weight, stack, slots, layer.bias, 0.4, seed))


def test_what_takes_the_ordinary_way() -> None:
    x = torch.randn(len(ROWS), K)
    made = model()
    with torch.no_grad():
        assert linears(x, layers(made)) is None
    assert linears(x.double(), layers(model().double())) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linears(x, layers(made)) is None
    assert linears(x[:2], layers(made)) is None  # and there says that the rows do not fit
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layers(made)[0](x[:2])
    layers(made)[0].bias.requires_grad_()
    assert linears(x, layers(made)[:1]) is None
    assert linears(x, layers(made)[1:]) is not None
    layers(made)[1].set_rows(None)
    assert linears(x, layers(made)[1:]) is None
    dora = model(use_dora=True)
    assert linears(x, layers(dora)) is None
    assert layers(dora)[0](x).shape == (len(ROWS), SIZES["q"])


def test_an_adapter_that_does_not_train_gets_no_gradient() -> None:
    made = model()
    made.set_requires_grad(["b"], False)
    x = torch.randn(len(ROWS), K)
    found = linears(x, layers(made))
    assert found is not None
    sum(y.sum() for y in found).backward()  # type: ignore[union-attr]
    has = {name for name, p in made.named_parameters() if p.grad is not None}
    assert all(".b." not in name for name in has)
    assert len(has) == 2 * 3 * 2
