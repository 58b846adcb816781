"""Values that models keep (norms, factors, packed adapters, prepared calls), against a copy that keeps nothing.

Every registered method, over every kind of base weight, alone or by row, in every mode: something that the output is
computed from is written in one of `WAYS`, and the next answer has to be the copy's, bit for bit. A write of some
elements that leaves no version (`t.data[3] *= 5`) is what nothing sees (docs/architecture.md): `layer.changed()` says
it.
"""

from __future__ import annotations

import copy
import runpy
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from fastpeft import NF4Linear, get_peft_model
from torch import Tensor, nn

from peft_kernels import quantize_4bit

from .cases import bytes_of
from .draws import Draw

K, N = 24, 20
ROWS = ["a", "b", "__base__", "a"]
KINDS: list[Any] = runpy.run_path(str(Path(__file__).parents[1] / "fastpeft" / "kind_tools.py"))["kinds"]()


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.lin = layer

    def forward(self, x: Tensor) -> Any:
        return self.lin(x)


def _bnb(nested: bool) -> nn.Module:
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit(K, N, quant_type="nf4", compress_statistics=nested).to("cpu")


BASES: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Linear(K, N),
    "nf4": lambda: NF4Linear(quantize_4bit(torch.randn(N, K)), torch.randn(N)),
    "nf4 nested": lambda: NF4Linear(quantize_4bit(torch.randn(N, K), nested=True, nested_blocksize=32), None),
    "bnb": lambda: _bnb(False),
    "bnb nested": lambda: _bnb(True),
}
MODES = ("no_grad", "inference_mode", "eval", "train")


class Target:
    """A tensor that the output is computed from, and where it is held: `holder[key]`, or an attribute."""

    def __init__(self, name: str, tensor: Tensor, holder: Any, key: str) -> None:
        self.name, self.tensor, self.holder, self.key = name, tensor, holder, key

    def replace(self, value: Tensor) -> None:
        if hasattr(self.tensor, "quant_state"):  # bitsandbytes' own class, whose state goes with it
            self.tensor.data = value
            return
        parameter = isinstance(self.tensor, nn.Parameter)
        value = nn.Parameter(value, requires_grad=self.tensor.requires_grad) if parameter else value
        if isinstance(self.holder, dict):
            self.holder[self.key] = value
        else:
            setattr(self.holder, self.key, value)


def targets(model: nn.Module) -> Iterator[Target]:
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for key, t in held.items():
                if t is not None:
                    yield Target(f"{prefix}.{key}", t, held, key)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            second = state.state2 if state.nested else None
            for owner, key in ((state, "absmax"), (second, "absmax"), (second, "code"), (second and state, "offset")):
                if owner is not None:
                    yield Target(f"{prefix}.{key}", getattr(owner, key), owner, key)


def other(t: Tensor) -> Tensor:
    """Other values of the same form."""
    t = t.detach()
    if not t.is_floating_point():
        return (t.flip(0) ^ 5) if t.dtype is torch.uint8 and t.dim() else t.clone()
    return t.flip(0) * 1.5 + 0.1 if t.dim() else t * 1.5 + 0.1


def _numpy(t: Tensor) -> None:
    array = t.detach().numpy()
    array[...] = other(t).numpy()


def _inference(t: Tensor) -> None:
    with torch.inference_mode():
        t.copy_(other(t))


def _foreach(t: Tensor) -> None:
    torch._foreach_copy_([t.detach() if t.is_inference() else t], [other(t)])


def _storage(t: Tensor) -> None:
    if t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes:
        t.untyped_storage().copy_(other(t).clone(memory_format=torch.contiguous_format).untyped_storage())


def _sgd(t: Tensor) -> None:
    if t.is_leaf and t.requires_grad:
        t.grad = torch.randn_like(t)
        torch.optim.SGD([t], lr=0.3).step()
        t.grad = None


def _swap(t: Tensor) -> None:
    if not hasattr(t, "quant_state") and not weakref.getweakrefcount(t):
        torch.utils.swap_tensors(t, copy.deepcopy(t).copy_(other(t)))


def _row(t: Tensor) -> None:
    if t.dim():
        t[-1:].copy_(other(t)[-1:])


WAYS: dict[str, Callable[[Target], object]] = {
    "copy_": lambda h: h.tensor.copy_(other(h.tensor)),
    "a row": lambda h: _row(h.tensor),
    "inference copy_": lambda h: _inference(h.tensor),
    "data.copy_": lambda h: h.tensor.data.copy_(other(h.tensor)),
    "data =": lambda h: setattr(h.tensor, "data", other(h.tensor)),
    "set_": lambda h: h.tensor.set_(other(h.tensor)),  # type: ignore[call-overload]
    "replaced": lambda h: h.replace(other(h.tensor)),
    "foreach": lambda h: _foreach(h.tensor),
    "swap_tensors": lambda h: _swap(h.tensor),
    "out=": lambda h: torch.add(other(h.tensor), 0, out=h.tensor),
    "storage": lambda h: _storage(h.tensor),
    "numpy": lambda h: _numpy(h.tensor),
    "SGD": lambda h: _sgd(h.tensor),
}
# Of a whole model.
MODEL_WAYS: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": lambda m: m.load_state_dict(_state(m), strict=False),
    "load_state_dict(assign)": lambda m: m.load_state_dict(_state(m), strict=False, assign=True),
    "half and back": lambda m: m.bfloat16().float(),
}


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {k: other(v) for k, v in model.state_dict().items() if ".base_layer." not in k}


def build(kind: Any, base: str, mode: str, rows: bool) -> Any:
    """A model with adapters a and b; None where the method does not go on that base, or not by row."""
    if not _fits(kind, base, rows):
        return None
    model: Any = get_peft_model(One(BASES[base]()), kind.config(target_modules=["lin"]), "a")
    model.add_adapter("b", kind.config(target_modules=["lin"]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    return model.train() if mode == "train" else model.eval()


_known: dict[tuple[Any, str, bool], bool] = {}


def _fits(kind: Any, base: str, rows: bool) -> bool:
    key = (kind, base, rows)
    if key not in _known:
        _known[key] = False
        try:
            model: Any = get_peft_model(One(BASES[base]()), kind.config(target_modules=["lin"]), "a")
            model.add_adapter("b", kind.config(target_modules=["lin"]))
            answer(model.eval(), torch.randn(len(ROWS), K), "no_grad", rows)
            _known[key] = True
        except (ValueError, NotImplementedError):
            pass  # said by the method
    return _known[key]


def answer(model: Any, x: Tensor, mode: str, rows: bool) -> Tensor:
    torch.manual_seed(11)  # the same dropout
    how = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, nullcontext)
    with how():
        if not rows:
            return model(x).detach()  # type: ignore[no-any-return]
        with model.base_model.rows_assigned(ROWS, steady=mode == "no_grad"):
            return model(x).detach()  # type: ignore[no-any-return]


def case(seed: int) -> str | None:
    """Run the writes of a seed: a text of a failure, or None."""
    d = Draw(seed)
    torch.manual_seed(seed)
    kind, base, mode, rows = d.one(KINDS), d.one([*BASES]), d.one(MODES), d.maybe(0.4)
    model = build(kind, base, mode, rows)
    if model is None:
        return None
    x, said = torch.randn(len(ROWS), K), []
    for _ in range(3):
        answer(model, x, mode, rows)
    for _ in range(d.random.randint(1, 3)):
        said.append(_write(d, model))
        for _ in range(2):
            got, wanted = answer(model, x, mode, rows), answer(copy.deepcopy(model), x, mode, rows)
            if not torch.equal(bytes_of(got.nan_to_num(7.0)), bytes_of(wanted.nan_to_num(7.0))):
                off = (got - wanted).abs().max().item()
                where = f"{kind!r} on {base}, {mode}{', by row' if rows else ''}"
                return f"off by {off:.3g} of {wanted.abs().max().item():.3g} (seed {seed}: {where}: {'; '.join(said)})"
    return None


def _write(d: Draw, model: Any) -> str:
    if d.maybe(0.15):
        way = d.one([*MODEL_WAYS])
        MODEL_WAYS[way](model)
        return way
    held = d.one([t for t in targets(model) if t.tensor.numel()])
    if d.maybe(0.1) and held.tensor.dim():
        held.tensor.data[-1:].copy_(other(held.tensor)[-1:])
        model.get_base_model().lin.changed()
        return f"a row of {held.name} without a version, and changed()"
    way = d.one([*WAYS])
    with torch.no_grad():
        WAYS[way](held)
    return f"{way} of {held.name}"
