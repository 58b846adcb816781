"""Has it changed? Every way to write, by everything that is kept: no answer is older than what it is computed from."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import (
    ArrowConfig,
    BOFTConfig,
    HRAConfig,
    LoraConfig,
    NF4Linear,
    OFTConfig,
    PolyConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from fastpeft.recipes.optimizers import create_loraplus_optimizer
from fastpeft.recipes.optimizers.adamw import AdamW
from fastpeft.saving.hotswap import hotswap_adapter_from_state_dict
from torch import Tensor, nn

from peft_kernels import quantize_4bit

BNB = runpy.run_path(str(Path(__file__).with_name("layer_tools.py")))["QUANTISED"]
K, N = 64, 48
ROWS = ["a", "b", "__base__", "a"]
NAMES = ("a", "b")


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.lin = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin(x)
        return y


def nf4() -> NF4Linear:
    return NF4Linear(quantize_4bit(torch.randn(N, K), nested=True), None)


def bnb() -> nn.Module:
    pytest.importorskip("bitsandbytes")
    made: nn.Module = BNB["bnb-nf4"]()
    return made


def lora(dora: bool = False) -> LoraConfig:
    return LoraConfig(r=3, target_modules=["lin"], init_lora_weights=False, use_dora=dora)


# what is kept: (base layer, configuration, mode, with rows)
KEPT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str, bool]] = {
    "lora eval": (lambda: nn.Linear(K, N), lora, "no_grad", False),
    "lora training": (lambda: nn.Linear(K, N), lora, "train", False),
    "lora nf4": (nf4, lora, "no_grad", False),
    "lora nf4 training": (nf4, lora, "train", False),
    "lora bnb": (bnb, lora, "no_grad", False),
    "lora bnb training": (bnb, lora, "train", False),
    "rows": (lambda: nn.Linear(K, N), lora, "no_grad", True),
    "rows nf4": (nf4, lora, "no_grad", True),
    "rows bnb": (bnb, lora, "no_grad", True),
    "rows training": (nf4, lora, "train", True),
    "dora": (lambda: nn.Linear(K, N), lambda: lora(True), "no_grad", False),
    "dora with gradients": (lambda: nn.Linear(K, N), lambda: lora(True), "eval", False),
    "dora training": (nf4, lambda: lora(True), "train", False),
    "dora nf4": (nf4, lambda: lora(True), "no_grad", False),
    "dora nf4 with gradients": (nf4, lambda: lora(True), "eval", False),
    "dora bnb": (bnb, lambda: lora(True), "no_grad", False),
    "dora rows nf4": (nf4, lambda: lora(True), "no_grad", True),
    "dora rows bnb": (bnb, lambda: lora(True), "no_grad", True),
    "oft": (nf4, lambda: OFTConfig(oft_block_size=4, target_modules=["lin"], init_weights=False), "no_grad", False),
    "boft": (nf4, lambda: BOFTConfig(boft_block_size=4, target_modules=["lin"], init_weights=False), "no_grad", False),
    "poly": (lambda: nn.Linear(K, N), lambda: PolyConfig(r=3, target_modules=["lin"], init_weights=False), "no_grad",
             False),
    "arrow": (lambda: nn.Linear(K, N), lora, "no_grad", False),
    "hra": (nf4, lambda: HRAConfig(r=3, target_modules=["lin"], init_weights=False), "no_grad", False),
}  # fmt: skip
SCALES = ("absmax", "nested_absmax", "nested_code", "offset")


def made(kept: str) -> tuple[Any, Tensor]:
    base, config, mode, rows = KEPT[kept]
    torch.manual_seed(0)
    model: Any = get_peft_model(One(base()), config(), "a")
    if rows or kept == "arrow":
        model.add_adapter("b", config())
    if kept == "arrow":
        router = ArrowConfig(top_k=2, rng_seed=3)
        model.add_adapter("router", LoraConfig(r=3, target_modules=["lin"], arrow_config=router))
        model.set_adapter("router")
        model.set_requires_grad("a")  # for the optimizers
    for name in ("base_layer.weight", "base_layer.bias"):
        found = dict(model.get_base_model().lin.named_parameters()).get(name)
        if found is not None:
            found.requires_grad_(False)
    return model.train() if mode == "train" else model.eval(), torch.randn(len(ROWS), K)


def run(model: Any, x: Tensor, kept: str) -> Tensor:
    _, _, mode, rows = KEPT[kept]
    with torch.set_grad_enabled(mode != "no_grad"):
        if not rows:
            return model(x).detach()  # type: ignore[no-any-return]
        with model.base_model.rows_assigned(ROWS, steady=mode == "no_grad"):
            return model(x).detach()  # type: ignore[no-any-return]


def fresh(model: Any) -> Any:
    """A copy of the model, which keeps nothing of what the model keeps."""
    return copy.deepcopy(model)


def layer_of(model: Any) -> Any:
    return model.get_base_model().lin


def adapter_tensors(model: Any) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if _is_of_a(n)]


def _is_of_a(key: str) -> bool:
    return ".a." in key or key.endswith(".a")


# Ways to write an adapter


def _optimizer(make: Callable[[Any], Any]) -> Callable[[Any], None]:
    def step(model: Any) -> None:
        optimizer = make(model)
        for p in adapter_tensors(model):
            p.requires_grad_(True)
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _each(write: Callable[[Tensor], object]) -> Callable[[Any], None]:
    def of(model: Any) -> None:
        with torch.no_grad():
            for p in adapter_tensors(model):
                write(p)

    return of


def _replaced(model: Any) -> None:
    for module in model.modules():
        for name, p in [*module._parameters.items()]:
            if p is not None and any(p is other for other in adapter_tensors(model)):
                module._parameters[name] = nn.Parameter(torch.randn_like(p), requires_grad=p.requires_grad)


def _set_entry(model: Any) -> None:
    for _, container in layer_of(model).containers():
        if "a" not in container:
            continue
        other = copy.deepcopy(container["a"])
        for p in [other] if isinstance(other, nn.Parameter) else other.parameters():
            nn.init.normal_(p)
        container["a"] = other


def _loaded(model: Any) -> None:
    state = {k: v * 1.5 if _is_of_a(k) else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, strict=False)  # bitsandbytes' layers do not take their own keys


def _loaded_adapter(model: Any) -> None:
    state = get_peft_model_state_dict(model, adapter_name="a")
    set_peft_model_state_dict(model, {k: v * 1.5 for k, v in state.items()}, adapter_name="a")


def _swapped(model: Any) -> None:
    if not hasattr(layer_of(model), "lora_A"):
        pytest.skip("hot-swapping is LoRA's")
    state = {f"base_model.model.lin.{k}": v * 1.5 for k, _, v in layer_of(model).adapter_state("a")}
    hotswap_adapter_from_state_dict(model, state, "a", model.peft_config["a"])


def _tied(model: Any) -> None:
    """The same parameter under another name, written there."""
    other = nn.ParameterList(adapter_tensors(model))
    with torch.no_grad():
        for p in other:
            p.add_(torch.randn_like(p))


def _moved(model: Any) -> None:
    _each(lambda p: p.data.mul_(1.5))(model)
    model.double().float()


def _by_numpy(p: Tensor) -> None:
    array = p.detach().numpy()
    array *= 1.5


WRITES: dict[str, Callable[[Any], None]] = {
    "SGD": _optimizer(lambda m: torch.optim.SGD(adapter_tensors(m), lr=0.3)),
    "torch AdamW": _optimizer(lambda m: torch.optim.AdamW(adapter_tensors(m), lr=0.1)),
    "torch AdamW foreach": _optimizer(lambda m: torch.optim.AdamW(adapter_tensors(m), lr=0.1, foreach=True)),
    "torch AdamW fused": _optimizer(lambda m: torch.optim.AdamW(adapter_tensors(m), lr=0.1, fused=True)),
    "AdamW": _optimizer(lambda m: AdamW(adapter_tensors(m), lr=0.1)),
    "LoRA+": _optimizer(lambda m: create_loraplus_optimizer(m, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=4.0)),
    "copy_": _each(lambda p: p.copy_(torch.randn_like(p))),
    "a row": _each(lambda p: p.flatten()[-2:].mul_(5)),
    "data =": _each(lambda p: setattr(p, "data", torch.randn_like(p))),
    "data = twice": _each(lambda p: [setattr(p, "data", torch.randn_like(p)) for _ in range(2)]),
    "set_": _each(lambda p: p.set_(torch.randn_like(p))),  # type: ignore[call-overload]
    "data.copy_": _each(lambda p: p.data.copy_(torch.randn_like(p))),
    "data.mul_": _each(lambda p: p.data.mul_(1.5)),
    "numpy": _each(_by_numpy),
    "swap_tensors": _each(lambda p: torch.utils.swap_tensors(p, nn.Parameter(torch.randn_like(p)))),
    "replaced": _replaced,
    "entry": _set_entry,
    "load_state_dict": _loaded,
    "set_peft_model_state_dict": _loaded_adapter,
    "to": _moved,
    "hotswap": _swapped,
    "tied": _tied,
    "scale": lambda m: layer_of(m).set_scale("a", 2.5),
    "scaling[]": lambda m: layer_of(m).scaling.__setitem__("a", 2.5) if hasattr(layer_of(m), "scaling") else _skip(),
}


def _skip() -> None:
    pytest.skip("it has no scaling")


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kept", KEPT)
def test_a_write_to_an_adapter_is_seen(kept: str, write: str) -> None:
    if write == "scale" and kept.partition(" ")[0] in ("oft", "boft", "hra", "poly"):
        pytest.skip("it has no scaling")
    model, x = made(kept)
    before = [run(model, x, kept) for _ in range(3)][-1]
    WRITES[write](model)
    for _ in range(2):
        after = run(model, x, kept)
        assert not torch.equal(after, before)
        assert torch.equal(after, run(fresh(model), x, kept))
    assert after.dtype is before.dtype


# Ways to write a base weight


def _dense(model: Any) -> Iterator[tuple[Any, str, Tensor]]:
    base = layer_of(model).base_layer
    yield base._parameters, "weight", base.weight


def _scales(model: Any) -> Iterator[tuple[Any, str, Tensor]]:
    base = layer_of(model).base_layer
    for name in ("weight", *SCALES):
        yield base._buffers, name, base._buffers[name]


class _Fields:
    """The tensors of a bitsandbytes weight as items."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __setitem__(self, name: str, value: Tensor) -> None:
        setattr(self.owner, name, value)


def _bnb_fields(model: Any) -> Iterator[tuple[Any, str, Tensor]]:
    weight = layer_of(model).base_layer.weight
    state = weight.quant_state
    yield _Fields(weight), "data", weight
    yield _Fields(state), "absmax", state.absmax
    if state.nested:
        yield _Fields(state.state2), "absmax", state.state2.absmax
        yield _Fields(state.state2), "code", state.state2.code
        yield _Fields(state), "offset", state.offset


def other(t: Tensor) -> Tensor:
    """Other values of the same kind."""
    t = t.detach()
    return t.flip(0).roll(1, 0).contiguous() ^ 5 if t.dtype is torch.uint8 else t * 1.5 + 0.1


BASE_WRITES: dict[str, Callable[[Any, str, Tensor], object]] = {
    "replaced": lambda store, name, t: store.__setitem__(name, _like(t, other(t))),
    "copy_": lambda store, name, t: t.copy_(other(t)),
    "data =": lambda store, name, t: setattr(t, "data", other(t)),
    "set_": lambda store, name, t: t.set_(other(t)),  # type: ignore[call-overload]
    "data.copy_": lambda store, name, t: t.data.copy_(other(t)),
}


def _like(t: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if type(t) is nn.Parameter else value


@pytest.mark.parametrize("write", BASE_WRITES)
@pytest.mark.parametrize("kept", KEPT)
def test_a_write_to_the_base_weight_is_seen(kept: str, write: str) -> None:
    kind = KEPT[kept][0]
    find = _bnb_fields if kind is bnb else _scales if kind is nf4 else _dense
    count = len([*find(made(kept)[0])])
    for i in range(count):  # one tensor at a time
        model, x = made(kept)
        before = [run(model, x, kept) for _ in range(3)][-1]
        store, name, tensor = [*find(model)][i]
        with torch.no_grad():
            BASE_WRITES[write](store, name, tensor)
        for _ in range(2):
            after = run(model, x, kept)
            assert not torch.equal(after, before), name
            assert torch.equal(after, run(fresh(model), x, kept)), name


# A layer's version, hooks, and what nothing can see


def test_the_version_rises_with_adapters_modes_and_containers() -> None:
    model, _ = made("lora eval")
    layer = layer_of(model)
    changes: list[Callable[[], object]] = [
        lambda: model.add_adapter("b", lora()),
        lambda: model.set_adapter("b"),
        lambda: model.train(),
        lambda: layer.lora_A.__setitem__("a", nn.Linear(K, 3, bias=False)),
        lambda: setattr(layer.lora_A, "a", nn.Linear(K, 3, bias=False)),
        lambda: layer.lora_A["b"].to(torch.float32) and layer.lora_A.to(torch.float32),
        lambda: model.merge_adapter(),
        lambda: model.unmerge_adapter(),
        lambda: model.disable_adapter_layers(),
        lambda: layer.changed(),
        lambda: model.delete_adapter("b"),
    ]
    for change in changes:
        before = layer.version
        change()
        assert layer.version > before
    before = layer.version
    model.eval().eval()
    after = layer.version
    model.eval()
    assert after > before
    assert layer.version == after  # nothing was changed


@pytest.mark.parametrize("kept", ["lora eval", "lora training", "rows", "dora", "lora nf4"])
def test_a_hook_is_seen(kept: str) -> None:
    model, x = made(kept)
    before = [run(model, x, kept) for _ in range(3)][-1]
    layer_of(model).lora_A["a"].register_forward_hook(lambda module, args, y: y + 1)
    assert not torch.equal(run(model, x, kept), before)


@pytest.mark.parametrize("kept", ["rows", "dora", "dora nf4", "oft", "boft", "hra"])
def test_what_leaves_no_trace_is_said_by_changed(kept: str) -> None:
    """Elements that are not among those that a fingerprint compares, written without a version."""
    model, x = made(kept)
    [run(model, x, kept) for _ in range(3)]
    for p in adapter_tensors(model):
        p.data.flatten()[1::7] *= 3
    layer_of(model).changed()
    assert torch.equal(run(model, x, kept), run(fresh(model), x, kept))
