"""DoRA: what evaluation keeps and when it lets it go, the full gradient, every start of LoRA's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import fastpeft
import peft
import pytest
import torch
import torch.utils.checkpoint
from fastpeft import LoraConfig, get_peft_model
from fastpeft.layer.layer import AdapterLayer
from fastpeft.methods.math.cache import Cache
from fastpeft.methods.math.row_norms import norms
from fastpeft.methods.registry import get_method
from fastpeft.testing import SAMPLE_BASES, add_adapter, make_layer
from fastpeft.weights.nf4_linear import NF4Linear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels import quantize_4bit, use_backend
from peft_kernels.dispatch import BackendUnavailable
from peft_kernels.testing import assert_no_worse, assert_same_bits

LORA = get_method("LORA")
BASES = ("linear", "nf4", "transformers-conv1d", "embedding", "conv1d", "conv2d", "conv3d")


def dora_layer(base: str, **options: Any) -> tuple[AdapterLayer, Tensor]:
    """A layer in evaluation with a DoRA on it, and an input."""
    layer = make_layer(base)
    layer.base_layer.requires_grad_(False)
    add_adapter(layer, "a", LORA, LoraConfig(**{"r": 3, "use_dora": True, **options}))
    layer.set_adapter("a")
    return layer.eval(), SAMPLE_BASES[base].input()


class Counted(TorchDispatchMode):
    """Counts the norms that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def norms(self) -> int:
        return sum("dora_norm" in name or "_normed" in name for name in self.names)


@pytest.mark.parametrize("base", BASES)
def test_evaluation_computes_the_norms_once_and_training_each_time(base: str) -> None:
    layer, x = dora_layer(base)
    with torch.no_grad():
        first = layer(x)
        with Counted() as seen:
            assert_same_bits(layer(x), first)
        assert seen.norms == 0
        layer.train()
        for expected in (1, 2):
            with seen:
                layer(x)
            assert seen.norms == expected
        with Counted() as seen:
            assert_same_bits(layer.eval()(x), first)
    with torch.inference_mode():  # tensors of their own are not needed: these have versions
        with Counted() as seen:
            assert_same_bits(layer(x), first)
        assert seen.norms == 0


def test_an_evaluation_forward_is_one_call() -> None:
    for base in ("linear", "nf4"):
        layer, x = dora_layer(base)
        with torch.no_grad():
            layer(x)
            with Counted() as seen:
                layer(x)
        real = [name for name in seen.names if not name.startswith(("aten.detach", "aten.view", "aten._unsafe_view"))]
        assert real == ["peft_kernels.dora_linear.default"], seen.names


def _transpose(parameter: Tensor) -> None:
    """Lay its memory out by columns."""
    parameter.data = parameter.data.t().contiguous().t()


CHANGES: dict[str, Callable[[AdapterLayer], object]] = {
    "a": lambda layer: layer.lora_A["a"].weight.data.mul_(2.0),  # no new version
    "a in place": lambda layer: nn.init.normal_(layer.lora_A["a"].weight),
    "a replaced": lambda layer: setattr(layer.lora_A["a"], "weight", nn.Parameter(torch.randn(3, 24))),
    "b": lambda layer: nn.init.normal_(layer.lora_B["a"].weight),
    "b data": lambda layer: setattr(layer.lora_B["a"].weight, "data", torch.randn(20, 3)),
    "m": lambda layer: nn.init.normal_(layer.lora_magnitude_vector["a"].weight),
    "scale": lambda layer: layer.set_scale("a", 3.0),
    "scaling": lambda layer: layer.scaling.__setitem__("a", 0.3),
    "loaded": lambda layer: layer.load_state_dict({k: v * 1.5 for k, v in layer.state_dict().items()}),
    "dtype": lambda layer: layer.bfloat16().float(),
    "bias data": lambda layer: setattr(layer.base_layer.bias, "data", torch.randn(20)),
    "bias replaced": lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.randn(20), False)),
    "w data": lambda layer: layer.base_layer.weight.data.mul_(2.0),
    "w transposed": lambda layer: (
        _transpose(layer.base_layer.weight),
        layer(torch.ones(1, 24)),
        layer.base_layer.weight.data.mul_(2.0),
    ),
    "w in place": lambda layer: nn.init.normal_(layer.base_layer.weight),
    "w replaced": lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(torch.randn(20, 24), False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_goes_when_something_changes(change: str) -> None:
    for grad in (False, True):  # the gain is kept, or the norm alone
        layer, x = dora_layer("linear")
        with torch.set_grad_enabled(grad):
            before = layer(x).detach()
            with torch.no_grad():
                CHANGES[change](layer)
            after = layer(x).detach()
        assert not torch.equal(after, before)
        assert_same_bits(after, copy.deepcopy(layer)(x).detach())  # a copy keeps nothing


@pytest.mark.parametrize("base", ["linear", "nf4"])
def test_inputs_and_backends_may_change_between_calls(base: str) -> None:
    layer, x = dora_layer(base)
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        for given in (x, x, x[:1], x[0], x.bfloat16(), x.double(), x[:0], x.unsqueeze(1), x):
            assert_same_bits(layer(given), copy.deepcopy(fresh)(given))
        with use_backend("cuda"), pytest.raises(BackendUnavailable):
            layer(x)
        w = layer.base_layer.weight
        w.data = w.data.flatten()[:-1]  # where it was
        with pytest.raises(ValueError, match="dora_linear: weight must be"):
            layer(x)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", ["linear", "nf4"])
def test_a_step_of_training_has_the_operators_bits_however_it_is_taken(base: str, dora: bool, p: float) -> None:
    layer, x = dora_layer(base, use_dora=dora, lora_dropout=p)
    layer.train()
    with torch.no_grad():
        for weight in layer.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    plain, watched = contextlib.nullcontext, Counted

    def step(x: Tensor, forward: Any = plain, backward: Any = plain, run: Any = layer) -> list[Tensor]:
        x = x.detach().requires_grad_()
        torch.manual_seed(0)
        with forward():
            y = run(x)
        trained = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]
        with backward():
            return [y.detach(), *torch.autograd.grad(y, trained, torch.ones_like(y))]

    def check(given: Tensor, *how: Any) -> None:
        for got, expected in zip(step(given, *how), step(given, watched, watched), strict=True):
            assert_same_bits(got, expected)

    def hooks() -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)

    def checkpointed(x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    for given in (x, x, x[:1], x[0], x[:0], x.unsqueeze(1), x.bfloat16(), x.double(), x):
        check(given)
    for how in ((plain, watched), (watched, plain), (hooks,), (plain, plain, checkpointed)):
        check(x, *how)
    a = layer.lora_A["a"].weight
    a.data = a.data * 2  # elsewhere, without a version
    check(x)
    y = layer(x)
    with use_backend("cuda"), pytest.raises(BackendUnavailable):
        y.sum().backward()
    y = layer(x)
    with torch.no_grad():
        a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = layer(x.requires_grad_())
    (dx,) = torch.autograd.grad(y.pow(2).sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    w = layer.base_layer.weight
    w.data = w.data.flatten()[:-1]  # where it was
    with pytest.raises(ValueError, match="weight must be"):
        layer(x)


@pytest.mark.parametrize("base", ["embedding", "conv2d", "transformers-conv1d"])
def test_what_other_layers_keep_goes_too(base: str) -> None:
    layer, x = dora_layer(base)
    parts = [p for n, p in layer.named_parameters() if "magnitude" not in n and "bias" not in n]
    assert len(parts) == 3
    with torch.no_grad():
        for part in parts:
            before = layer(x)
            part.add_(torch.randn_like(part))
            after = layer(x)
            assert not torch.equal(after, before)
            assert_same_bits(after, copy.deepcopy(layer)(x))


def test_4bit_scales_that_change_and_merges() -> None:
    base = NF4Linear(quantize_4bit(torch.randn(40, 64), nested=True), None)
    layer = AdapterLayer(base, "x")
    add_adapter(layer, "a", LORA, LoraConfig(r=3, use_dora=True))
    layer.set_adapter("a")
    x = torch.randn(2, 64)
    with torch.no_grad():
        y = layer.eval()(x)
        layer.merge()
        assert not torch.equal(layer(x), y)  # quantised once more
        layer.unmerge()
        assert_same_bits(layer(x), y)
        base.quant_weight().absmax.add_(1)
        assert not torch.equal(layer(x), y)
        assert_same_bits(layer(x), copy.deepcopy(layer)(x))


def test_tensors_without_versions_are_not_kept() -> None:
    kept, made = Cache(), []
    with torch.inference_mode():
        t = torch.ones(3)
        for _ in range(2):
            kept.get((t,), (), lambda: made.append(1) or t * 2)
    assert len(made) == 2
    plain = torch.ones(3)
    with torch.inference_mode():  # a value that is kept can take part in a graph later
        value = kept.get((plain,), (), lambda: plain * 2)
    assert not value.is_inference()


@pytest.mark.parametrize("base", BASES)
def test_the_full_gradient(base: str) -> None:
    """Of A and B through the norm, as autograd has it for the merged weight; m's is the same either way."""
    grads = {}
    for full in (False, True):
        torch.manual_seed(1)
        layer, x = dora_layer(base, dora_full_gradient=full)
        layer.double().train()
        # ids without the padding's row, whose gradient embeddings leave out
        x = x.double() if x.is_floating_point() else x.masked_fill(x == 3, 4)
        trained = [p for p in layer.parameters() if p.requires_grad]
        weights = torch.randn(layer(x).shape, dtype=torch.float64)
        grads[full] = torch.autograd.grad((layer(x) * weights).sum(), trained)
        if full:
            w, b = (None if t is None else t.detach().double() for t in layer.base.read())
            merged, bias = layer.methods["a"].merged(layer.view("a"), None, w, b)
            y = layer.base.apply(x, merged, bias)
            want = torch.autograd.grad((y * weights).sum(), trained)
            for got, exact in zip(grads[True], want, strict=True):
                assert_no_worse(got.float(), exact.float(), exact, exact.abs().max().expand_as(exact))
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    for name, one, other in zip(names, grads[False], grads[True], strict=True):
        if "magnitude" in name:
            assert_no_worse(one.float(), other.float(), other, other.abs().max().expand_as(other))
        else:
            assert not torch.equal(one, other), name


def test_the_full_gradient_is_an_option_of_dora() -> None:
    with pytest.raises(ValueError, match="dora_full_gradient=True"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(dora_full_gradient=True, target_modules=["0"]))
    assert "dora_full_gradient" not in LoraConfig(use_dora=True).to_dict()
    assert LoraConfig(use_dora=True, dora_full_gradient=True).to_dict()["dora_full_gradient"]


def test_norms_of_an_8bit_weight_have_the_full_gradient_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft.weights import base
    from fastpeft.weights.dense import LinearWeight

    class Decoded(LinearWeight):  # as a weight that no kernel reads in place
        quantized = "8bit"

    monkeypatch.setattr(base, "TILE", 3 * 24)
    module = nn.Linear(24, 20).double()
    a, b = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((3, 24), (20, 3)))
    want = (module.weight.detach() + 0.7 * b @ a).norm(dim=1)
    got = norms(Decoded(module), a, b, 0.7)
    assert_no_worse(got.detach().float(), want.detach().float(), want.detach())
    for one, other in zip(*(torch.autograd.grad(t.sum(), (a, b)) for t in (got, want)), strict=True):
        assert_no_worse(one.float(), other.float(), other, other.abs().max().expand_as(other))


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "loftq", True, False])
def test_every_start_leaves_the_base_s_output(start: str | bool) -> None:
    """m begins as the norms of what the start leaves, so that the layer computes what LoRA's would, and PEFT's DoRA.

    Those that look at data are in test_init_data.py, quantised bases in test_init_quantised.py."""
    outputs = []
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    for library, dora in ((fastpeft, True), (fastpeft, False), (peft, True)):
        if start == "loftq" and library is peft:  # it asks for CUDA there
            continue
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(64, 48))
        more = {"loftq_config": {"loftq_bits": 4}} if start == "loftq" else {}
        config = library.LoraConfig(r=4, use_dora=dora, init_lora_weights=start, target_modules=["0"], **more)
        outputs.append(library.get_peft_model(model, config).eval()(x).detach())
    for other in outputs[1:]:
        assert_no_worse(outputs[0], other, other.double(), 8 * other.double().abs().max().expand(5, 48))
