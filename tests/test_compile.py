"""The ops as torch's transforms see them: graphs with fixed and symbolic sizes, fake tensors, checkpointing, autocast,
torch.func; and copies of what they take."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels import QuantWeight
from peft_kernels.dispatch import use_backend
from peft_kernels.testing import assert_no_worse, assert_same_bits

N, K, R = 40, 64, 4


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def weights(kind: str) -> Any:
    w = torch.randn(N, K)
    return w if kind == "dense" else peft_kernels.quantize_4bit(w, nested=kind == "nested")


def linear(kind: str, **options: Any) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """lora_linear over a weight, and its trained tensors (float32 beside any x)."""
    a, b, bias = (torch.randn(s).requires_grad_() for s in ((R, K), (N, R), (N,)))
    weight = weights(kind)
    return lambda x: peft_kernels.lora_linear(x, weight, a, b, 0.5, bias, **options), [a, b, bias]


def gradients(f: Callable[[Tensor], Tensor], x: Tensor, trained: list[Tensor], seed: int = 3) -> list[Tensor]:
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = f(x)
    for leaf in trained:
        leaf.grad = None
    y.float().square().sum().backward()  # reentrant checkpointing knows no autograd.grad
    return [y.detach(), *(leaf.grad.clone() for leaf in (x, *trained))]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["dense", "plain", "nested"])
def test_a_graph_gives_eagers_bits(kind: str, dropout: float, dynamic: bool | None) -> None:
    f, trained = linear(kind, dropout_p=dropout)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 9):
        x = torch.randn(2, rows, K).bfloat16()
        for ours, theirs in zip(gradients(compiled, x, trained), gradients(f, x, trained), strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_gradients_have_the_same_bits(dropout: float, reentrant: bool) -> None:
    """The dropout's seed is drawn outside of the op, so recomputation draws the same one."""
    f, trained = linear("nested", dropout_p=dropout)
    x = torch.randn(6, K)
    saving = gradients(lambda x: checkpoint(f, x, use_reentrant=reentrant), x, trained)
    for ours, theirs in zip(saving, gradients(f, x, trained), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("way", ["eager", "compiled", "checkpointed"])
def test_autocast_rounds_x_once_and_sums_in_float32(way: str) -> None:
    f, trained = linear("nested")
    x = torch.randn(6, K)
    call = {
        "eager": f,
        "compiled": torch.compile(f, backend="aot_eager", fullgraph=True),
        "checkpointed": lambda x: checkpoint(f, x, use_reentrant=False),
    }[way]
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(call, x, trained)
    # What is not under autocast, given x as autocast rounds it.
    theirs = gradients(lambda x: f(x.bfloat16()), x, trained)
    assert ours[0].dtype == torch.bfloat16
    for mine, plain in zip(ours, theirs, strict=True):
        assert_same_bits(mine, plain)


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones() -> None:
    a, b = torch.randn(R, K), torch.randn(N, R)
    weight = weights("nested")
    x = torch.randn(2, 5, K).bfloat16()

    def call(x: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        qw = peft_kernels.quantize_4bit(b @ a)
        return [peft_kernels.lora_linear(x, weight, a, b, dropout_p=0.2), qw.packed, qw.absmax,
                peft_kernels.dequantize_4bit(qw, torch.bfloat16)]  # fmt: skip

    real = call(x, a, b)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = call(*(mode.from_tensor(t) for t in (x, a, b)))
        with pytest.raises(ValueError, match=r"a must be \[r, 64\]"):  # bad input fails while tracing too
            peft_kernels.lora_linear(mode.from_tensor(x), weight, mode.from_tensor(a[:, 1:]), mode.from_tensor(b))
    for fake, true in zip(fakes, real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (true.shape, true.dtype, true.stride())


# torch.func


def test_func_transforms_are_right_or_say_that_they_are_not_there() -> None:
    a, b, weight, x = (torch.randn(s) for s in ((R, K), (N, R), (N, K), (3, K)))

    def of_a(a: Tensor) -> Tensor:
        return peft_kernels.lora_linear(x, weight, a, b)

    with use_backend("reference"):
        plain = a.clone().requires_grad_()
        wanted = torch.autograd.grad(of_a(plain).sum(), plain)[0]
        assert_same_bits(torch.func.grad(lambda a: of_a(a).sum())(a), wanted)
        rows = torch.func.vmap(lambda x: peft_kernels.lora_linear(x[None], weight, a, b)[0])(x)
    each = torch.stack([peft_kernels.lora_linear(row[None], weight, a, b)[0] for row in x])
    assert_no_worse(rows, each, each.double(), each.double().abs().max().expand_as(each))
    # A derivative that is not there must not be a zero.
    for take in (
        lambda: torch.func.jvp(of_a, (a,), (a,)),
        lambda: torch.func.jacfwd(of_a)(a),
        lambda: torch.func.jvp(lambda g: peft_kernels.gated(g, x), (x,), (x,)),
    ):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward|vmap support"):
            take()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, a)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward|vmap support"):
            of_a(dual)
    with pytest.raises(RuntimeError, match=r"torch\.func\.vmap"):
        torch.func.vmap(of_a)(a.expand(2, R, K).clone().requires_grad_())


def functions() -> list[type[torch.autograd.Function]]:
    """Every autograd Function of the package."""
    names = [m.name for m in pkgutil.walk_packages(peft_kernels.__path__, "peft_kernels.") if "triton" not in m.name]
    found = [v for name in names for v in vars(importlib.import_module(name)).values()]
    return sorted({v for v in found if isinstance(v, type) and issubclass(v, torch.autograd.Function)}, key=str)


def test_no_function_gives_a_second_derivative_that_is_wrong() -> None:
    assert len(functions()) >= 4
    for function in functions():
        assert hasattr(function.backward, "__wrapped__"), f"{function}: its backward needs @once_differentiable"


def second(name: str, x: Tensor) -> Tensor:
    parts = [peft_kernels.Projection(w, *(torch.randn(s) * 0.1 for s in ((R, w.shape[1]), (w.shape[0], R))))
             for w in (torch.randn(N, K), torch.randn(N, K), torch.randn(K, N))]  # fmt: skip
    angles = [x.detach()[None]] * 2
    calls: dict[str, Callable[[], Tensor]] = {
        "lora_linear": lambda: peft_kernels.lora_linear(x, *parts[0]),
        "lora_linear_stacked": lambda: torch.cat(peft_kernels.lora_linear_stacked(x, parts[:2])),
        "gated": lambda: peft_kernels.gated(x, x),
        "rms_norm": lambda: peft_kernels.rms_norm(x, x.detach()[0], 1e-5),
        "layer_norm": lambda: peft_kernels.layer_norm(x, x.detach()[0], None, 1e-5),
        "gated_mlp": lambda: peft_kernels.gated_mlp(x, *parts),
        "attention": lambda: peft_kernels.attention(*[x[None, :, None]] * 3, cos=angles[0], sin=angles[1], scale=1.0),
    }
    return calls[name]()


@pytest.mark.parametrize(
    "name", ["lora_linear", "lora_linear_stacked", "gated", "gated_mlp", "rms_norm", "attention"]
)
def test_a_second_derivative_is_refused_by_its_name(name: str) -> None:
    x = torch.randn(3, K, requires_grad=True)
    (first,) = torch.autograd.grad(second(name, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# Copies


@pytest.mark.parametrize("nested", [False, True])
def test_copies_of_a_quantised_weight_share_nothing(nested: bool) -> None:
    weight = peft_kernels.quantize_4bit(torch.randn(N, K), nested=nested)
    flat = weight.flatten()  # kept from here on
    tensors = [t for t in flat if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]
    buffer = io.BytesIO()
    torch.save({k: v for k, v in vars(weight).items() if isinstance(v, Tensor)}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert_same_bits(loaded["packed"], weight.packed)
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert isinstance(twin, QuantWeight)
        assert_same_bits(peft_kernels.dequantize_4bit(twin), peft_kernels.dequantize_4bit(weight))
        assert twin.flatten()[0] is twin.packed  # not the original's, and not a second copy
        for theirs in (t for t in twin.flatten() if isinstance(t, Tensor)):
            theirs.zero_()
        assert not peft_kernels.dequantize_4bit(twin).any()
    for now, then in zip(tensors, before, strict=True):
        assert_same_bits(now, then)
