"""SHiRA and SuperTuning, whose updates are sparse."""

from __future__ import annotations

import copy
import runpy
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
import torch.nn.functional as F
from fastpeft.files.checks import KeyMismatchError
from fastpeft.methods.math.sparse import sparse_linear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_kernels.testing import assert_no_worse

tools = runpy.run_path(str(Path(__file__).with_name("simple_tools.py")))
IDS, Net, check, load, make, trained = (tools[name] for name in ("IDS", "Net", "check", "load", "make", "trained"))


def test_shira_with_a_mask_of_ones_own(tmp_path: Path) -> None:
    def diagonals(base: nn.Module, r: int) -> Tensor:
        weight: Any = base.weight
        mask = torch.zeros_like(weight).flatten()
        mask[: r * sum(weight.shape)] = 1
        return mask.view_as(weight)

    models = []
    for library in (fastpeft, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = library.ShiraConfig(target_modules=["up"], r=2, mask_type="mine", init_weights=False)
        config.mask_fn = diagonals
        torch.manual_seed(1)
        models.append(library.get_peft_model(Net(), config).eval())
    ours, theirs = models
    check(ours(IDS).detach(), theirs(IDS).detach(), copy.deepcopy(theirs).double()(IDS).detach())
    ours.save_pretrained(tmp_path)
    check(load(fastpeft, tmp_path)(IDS).detach(), ours(IDS).detach(), copy.deepcopy(theirs).double()(IDS).detach())
    with pytest.warns(fastpeft.PeftWarning, match="is not known"):
        config = fastpeft.ShiraConfig(target_modules=["up"], mask_type="mine")
    with pytest.raises(ValueError, match=r"set `config\.mask_fn`"):
        fastpeft.get_peft_model(Net(), config)
    config = fastpeft.ShiraConfig(target_modules=["up"], r=1)
    config.mask_fn = lambda base, r, **_: torch.ones_like(base.weight)
    with pytest.raises(ValueError, match="has 240 ones, but r=1 asks for 32"):
        fastpeft.get_peft_model(Net(), config)
    with pytest.raises(ValueError, match="more than the 240"):
        fastpeft.get_peft_model(Net(), fastpeft.ShiraConfig(target_modules=["up"], r=9))


@pytest.mark.parametrize("value", [-1, 20])
def test_positions_outside_the_weight_are_refused(value: int, tmp_path: Path) -> None:
    make(fastpeft, "Shira", {"target_modules": ["up"], "r": 1}).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "indices" in k)
    tensors[key][0, 3] = value
    save_file(tensors, file)
    with pytest.raises(KeyMismatchError, match="outside the weight's shape"):
        load(fastpeft, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 400])
@pytest.mark.parametrize(
    ("name", "options"), [("Shira", {"r": 5}), ("Supertuning", {"sparsity": 0.8, "select_top": False})]
)
def test_sparse_updates_on_either_side(name: str, options: dict[str, Any], tokens: int, dtype: torch.dtype) -> None:
    """For few tokens S acts on activations, for many in the weight: as the dense layer does in float64."""
    torch.manual_seed(0)
    config = getattr(fastpeft, f"{name}Config")(target_modules=["0"], init_weights=False, **options)
    model = fastpeft.get_peft_model(nn.Sequential(nn.Linear(60, 50)).to(dtype), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    values = next(iter(trained(model).values()))
    x, dy = torch.randn(2, tokens, 60, dtype=dtype, requires_grad=True), torch.randn(2, tokens, 50, dtype=dtype)
    y = model(x)
    y.backward(dy)
    results = []
    for wide in (dtype, torch.float64):
        delta = layer.get_delta_weight("default").detach().to(wide)
        w = (layer.weight.detach().to(wide) + delta).requires_grad_()
        inputs = x.detach().to(wide).requires_grad_()
        out = F.linear(inputs, w, layer.bias.detach().to(wide))
        out.backward(dy.to(wide))
        results.append((out.detach(), inputs.grad, w.grad[delta != 0]))  # type: ignore[index]
    scale = dy.double().abs().mean() * max(60, tokens)  # terms of a sum
    order = torch.argsort(fastpeft_positions(layer))
    for mine, eager, exact in zip((y.detach(), x.grad, values.grad[order]), *results, strict=True):
        assert_no_worse(mine, eager, exact, (exact.abs().mean() + scale).expand(exact.shape))


def fastpeft_positions(layer: Any) -> Tensor:
    if hasattr(layer, "shira_indices"):
        rows, columns = layer.shira_indices["default"].long()
        return rows * layer.in_features + columns
    return layer.supertuning_indices["default"].long()


def test_sparse_products_in_double_precision_have_the_right_gradients() -> None:
    torch.manual_seed(0)
    indices = torch.randperm(30)[:11].int()
    values = torch.randn(11, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, v: sparse_linear(a, v, indices, (5, 6)), (x, values))


def test_supertuning_refuses_what_cannot_be() -> None:
    for options, error in (
        ({"sparsity": 1.0}, "sparsity must be in"), ({"r": 0}, "positive integer"), ({"lora_alpha": 2.0}, "explicit r"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            fastpeft.SupertuningConfig(**options)
    with pytest.raises(ValueError, match="leaves no trainable entries"):
        fastpeft.get_peft_model(Net(), fastpeft.SupertuningConfig(target_modules=["up"], sparsity=0.9999))
