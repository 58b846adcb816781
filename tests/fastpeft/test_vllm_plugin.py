"""The plugin for vLLM: its signatures against those recorded of a named version and against an installed vLLM, each
method against its formula in float64, and with vLLM its own wrapper, chosen by its own selector, beside ours."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft.apps import vllm_plugin as plugin
from lora_tools import BF16, F16, F32, needs_native
from torch import Tensor

from peft_kernels import use_backend
from peft_kernels.testing import assert_no_worse

ROOT = Path(__file__).resolve().parents[2]
GOLDEN: dict[str, dict[str, list[Any]]] = json.loads(
    (ROOT / f"tests/golden/vllm_punica_{plugin.TESTED}.json").read_text()
)
HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")


def recorded(*classes: str) -> dict[str, list[tuple[str, str, Any]]]:
    """The methods of a class of vLLM's, named after its bases."""
    return {name: [tuple(each) for each in found] for cls in classes for name, found in GOLDEN[cls].items()}


CONTRACT = ("PunicaWrapperABC", "PunicaWrapperBase")


# ---- signatures -----------------------------------------------------------------------------------------------------
def test_every_method_has_the_recorded_parameters() -> None:
    base = recorded(*CONTRACT)
    ours = {name: plugin.parameters(s) for name, s in plugin.methods(plugin.LoraOps).items()}
    assert ours == {name: base[name] for name in ours}
    assert set(base) - set(ours) == plugin.LEFT
    assert plugin.disagreements(base) == []


@pytest.mark.parametrize("cls", ["PunicaWrapperCPU", "PunicaWrapperGPU"])
def test_the_platforms_wrappers_can_stand_below_ours(cls: str) -> None:
    """Both are made as the base is, and callers of what we put before theirs see the same parameters."""
    theirs, base = recorded(cls), recorded(*CONTRACT)
    assert theirs["__init__"] == base["__init__"]
    for name in plugin.methods(plugin.LoraOps):
        assert theirs.get(name, base[name]) == base[name]


@pytest.mark.parametrize("change", ["new", "gone", "renamed", "default"])
def test_a_changed_contract_is_noticed(change: str) -> None:
    base = recorded(*CONTRACT)
    if change == "new":
        base["add_lora_fp8"] = base["add_lora_linear"]
    elif change == "gone":
        del base["add_shrink"]
    else:
        name, kind, default = base["add_expand"][5]
        base["add_expand"][5] = ("offset", kind, default) if change == "renamed" else (name, kind, "1")
    (wrong,) = plugin.disagreements(base)
    assert wrong.startswith({"new": "add_lora_fp8", "gone": "add_shrink"}.get(change, "add_expand"))


def test_the_entry_point_is_the_plugins() -> None:
    lines = (ROOT / "pyproject.toml").read_text().split('[project.entry-points."vllm.general_plugins"]\n')[1]
    name, value = lines.splitlines()[0].split(" = ")
    assert name == plugin.NAME
    assert EntryPoint(name, value.strip('"'), "vllm.general_plugins").load() is plugin.register


@pytest.mark.parametrize("value", [None, "", "other", "fastpeft_other"])
def test_it_acts_only_where_it_is_named(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_vllm", lambda module: pytest.fail("looked at vLLM"))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    plugin.register()


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_using_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,fastpeft")
    with pytest.raises(ImportError, match=r"needs vLLM \(made for .* cannot be imported"):
        plugin.register()
    with pytest.raises(ImportError, match="needs vLLM"):
        _ = plugin.PunicaWrapper
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = plugin.Other


# ---- the methods against their formulas -----------------------------------------------------------------------------
S, R, K, SLICES = 4, 8, 48, (32, 16, 40)
TOKENS, SAMPLED = [2, -1, 0, 0, 3, -1, 2], [3, -1, 2]


@dataclass
class World:
    """One batch: rows and weights as vLLM has them, of ranks 8, 3, 1 and 5 (the rest of a slot is zero)."""

    x: Tensor
    y: Tensor
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]

    def to(self, f: Any) -> World:
        return World(f(self.x), f(self.y), tuple(map(f, self.a)), tuple(map(f, self.b)))


def make_world(dtype: torch.dtype, rows: int = len(TOKENS)) -> World:
    g = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    own = torch.arange(R)[None] < torch.tensor([8, 3, 1, 5])[:, None]
    a = tuple(draw(S, 1, R, K) * own[:, None, :, None] for _ in SLICES)
    b = tuple(draw(S, 1, n, R) * own[:, None, None] * 0.3 for n in SLICES)
    return World(draw(rows, K), draw(rows, sum(SLICES)), a, b).to(lambda t: t.to(dtype))


def wrapper(padding: int = 5) -> Any:
    """LoraOps with nothing below it: the indices are all of vLLM's state that these methods use."""
    made = object.__new__(plugin.LoraOps)
    made._token_lora_indices = torch.tensor(TOKENS + [-1] * padding)
    made._sampler_indices = torch.tensor(SAMPLED + [-1] * padding)
    return made


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, F32)


def shrunk(x: Tensor, a: Tensor, indices: list[int], scale: float) -> Tensor:
    """Row by row, in float32 or more."""
    acc = wide(x)
    rows = [x[m].to(acc) @ a[i, 0].to(acc).t() * scale if i >= 0 else x.new_zeros(a.shape[2], dtype=acc)
            for m, i in enumerate(indices)]  # fmt: skip
    return torch.stack(rows)


def added(y: Tensor, low: Tensor, b: Tensor, indices: list[int], offset: int = 0, add: bool = True) -> Tensor:
    y = y.clone()
    for m, i in enumerate(indices):
        if i >= 0:
            part, at = b[i, 0].to(low.dtype) @ low[m], slice(offset, offset + b.shape[2])
            y[m, at] = (y[m, at].to(low.dtype) * add + part).to(y.dtype)
    return y


def linear(w: World, scale: float, add: bool = True) -> Tensor:
    y, offset = w.y, 0
    for a, b in zip(w.a, w.b, strict=True):
        y = added(y, shrunk(w.x, a, TOKENS, scale), b, TOKENS, offset, add)
        offset += b.shape[2]
    return y


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_native)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=[F32, BF16, F16], ids=str)
def world(request: pytest.FixtureRequest) -> World:
    return make_world(request.param)


def check(actual: Tensor, formula: Any, w: World) -> None:
    """As eager code in the same dtypes, measured against float64."""
    assert_no_worse(actual, formula(w), formula(w.to(Tensor.double)), formula(w.to(lambda t: t.double().abs())))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_add_lora_linear(world: World, scale: float, add: bool) -> None:
    y, buffer = world.y.clone(), tuple(torch.full((len(TOKENS), R), float("nan")) for _ in SLICES)
    wrapper().add_lora_linear(y, world.x, world.a, world.b, scale, SLICES, buffer=buffer, add_inputs=add)
    check(y, lambda w: linear(w, scale, add), world)
    for i, low in enumerate(buffer):
        check(low, lambda w, i=i: shrunk(w.x, w.a[i], TOKENS, scale), world)
    alone = [m for m, i in enumerate(TOKENS) if i < 0]
    assert torch.equal(y[alone], world.y[alone])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("stacked", [True, False])
def test_shrink_and_expand(world: World, stacked: bool) -> None:
    """The halves, as with tensor parallelism: a part of the columns, from an offset on, and vLLM's stray keyword."""
    low: Any = torch.full((len(SLICES), len(TOKENS), R), float("nan"))
    low = low if stacked else tuple(low)
    made = wrapper()
    made.add_shrink(low, world.x, world.a, 1.0)
    for i in range(len(SLICES)):
        check(low[i], lambda w, i=i: shrunk(w.x, w.a[i], TOKENS, 1.0), world)
    y = world.y.clone()
    made.add_expand(y, low[1:2], world.b[1:2], SLICES[1:2], offset_start=SLICES[0], add_input=True)
    check(y, lambda w: added(w.y, shrunk(w.x, w.a[1], TOKENS, 1.0), w.b[1], TOKENS, SLICES[0]), world)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("add", [True, False])
def test_embedding(world: World, add: bool) -> None:
    looked_up, y = world.x[:, :R].contiguous(), world.y.clone()
    wrapper().add_lora_embedding(y, looked_up, world.b[0], add_inputs=add)
    check(y, lambda w: added(w.y, w.x[:, :R].to(wide(w.x)), w.b[0], TOKENS, 0, add), world)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("width", [SLICES[2], SLICES[2] - 3, SLICES[2] + 3])
def test_logits(world: World, width: int) -> None:
    """Rows are those that are sampled; y may be padded more or less than the stack is."""
    rows = make_world(world.x.dtype, len(SAMPLED))
    y, buffer = rows.y[:, :width].clone(), torch.full((len(SAMPLED), R), float("nan"))
    wrapper().add_lora_logits(y, rows.x, rows.a[2], rows.b[2], 2.0, buffer=buffer)
    check(y, lambda w: added(w.y[:, :width], shrunk(w.x, w.a[2], SAMPLED, 2.0), w.b[2][:, :, :width], SAMPLED), rows)
    check(buffer, lambda w: shrunk(w.x, w.a[2], SAMPLED, 2.0), rows)


def test_rows_beyond_the_batch_are_the_base() -> None:
    """A recorded graph has more rows than there are tokens."""
    w = make_world(F32, len(TOKENS) + 3)
    y = w.y.clone()
    wrapper().add_lora_linear(y, w.x, w.a, w.b, 1.0, SLICES)
    assert torch.equal(y[len(TOKENS) :], w.y[len(TOKENS) :])
    assert not torch.equal(y[: len(TOKENS)], w.y[: len(TOKENS)])


def test_a_y_that_cannot_be_written_is_refused() -> None:
    w = make_world(F32, 8)
    with pytest.raises(RuntimeError, match="view"):
        wrapper().add_lora_linear(w.y.t().reshape(4, 2, -1).transpose(0, 2), w.x, w.a, w.b, 1.0, SLICES)


# ---- with vLLM ------------------------------------------------------------------------------------------------------
@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's selector on its CPU platform, after the plugin was registered, twice as may happen."""
    from vllm import platforms
    from vllm.lora.punica_wrapper import punica_selector
    from vllm.platforms.cpu import CpuPlatform

    platform = type("Cpu", (CpuPlatform,), {})()  # what `register` changes goes with it
    for module in (platforms, punica_selector):
        monkeypatch.setattr(module, "current_platform", platform, raising=False)
    monkeypatch.setenv("VLLM_PLUGINS", "fastpeft")
    monkeypatch.setattr(plugin, "_replaced", [])
    plugin.register()
    plugin.register()
    assert platform.get_punica_wrapper() == "fastpeft.apps.vllm_plugin.PunicaWrapper"
    yield lambda: punica_selector.get_punica_wrapper(32, max_batches=8, device="cpu")
    vars(plugin).pop("PunicaWrapper", None)


@needs_vllm
def test_an_installed_vllm_has_what_is_recorded() -> None:
    from vllm.lora.punica_wrapper import punica_base

    found = {name: plugin.parameters(s) for name, s in plugin.methods(punica_base.PunicaWrapperBase).items()}
    assert plugin.disagreements(found) == []
    import vllm

    if vllm.__version__.split("+")[0] == plugin.TESTED:
        assert found == recorded(*CONTRACT)


@needs_vllm
@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_vllm_finds_our_wrapper_and_it_does_as_its_own(chosen: Any, dtype: torch.dtype, prefill: bool) -> None:
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    ours, theirs = chosen(), PunicaWrapperCPU(32, 8, "cpu")
    assert isinstance(ours, plugin.LoraOps)
    assert isinstance(ours, PunicaWrapperCPU)
    ids = [10, 11, 12, 13]  # in slots 0 to 3
    first = LoRAMapping((11,) * 9, (11,) * 9, is_prefill=prefill)
    mapping = LoRAMapping(tuple(0 if i < 0 else ids[i] for i in TOKENS),
                          tuple(0 if i < 0 else ids[i] for i in SAMPLED), is_prefill=prefill)  # fmt: skip
    for each in (ours, theirs):
        each.update_metadata(first, list(ids), S + 1, 100)
        each.update_metadata(mapping, list(ids), S + 1, 100)
    assert ours._token_lora_indices.tolist() == TOKENS + [-1] * (32 - len(TOKENS))
    assert ours._sampler_indices.tolist() == SAMPLED + [-1] * (32 - len(SAMPLED))

    w, e = make_world(dtype), make_world(dtype).to(Tensor.double)
    got, want = w.y.clone(), w.y.clone()
    ours.add_lora_linear(got, w.x, w.a, w.b, 1.0, SLICES)
    theirs.add_lora_linear(want, w.x, w.a, w.b, 1.0, SLICES)
    assert_no_worse(got, want, linear(e, 1.0), linear(e.to(Tensor.abs), 1.0))

    h = make_world(dtype, len(SAMPLED))
    got, want = h.y[:, : SLICES[2]].clone(), h.y[:, : SLICES[2]].clone()
    whole = (torch.randn(S, 1, SLICES[2], K).to(dtype), torch.randn(S, SLICES[2]).to(dtype))
    enabled = torch.tensor([True, True, False, True])
    for each, y in ((ours, got), (theirs, want)):
        each.add_lora_logits(y, h.x, h.a[2], h.b[2], 1.0)
        each.apply_lora_full_linear(y, h.x, *whole, enabled)
    exact = added(h.y[:, : SLICES[2]].double(), shrunk(h.x.double(), h.a[2].double(), SAMPLED, 1.0),
                  h.b[2].double(), SAMPLED)  # fmt: skip
    size = added(h.y[:, : SLICES[2]].double().abs(), shrunk(h.x.double().abs(), h.a[2].double().abs(), SAMPLED, 1.0),
                 h.b[2].double().abs(), SAMPLED)  # fmt: skip
    exact[0] = h.x[0].double() @ whole[0][3, 0].double().t() + whole[1][3].double()
    size[0] = h.x[0].double().abs() @ whole[0][3, 0].double().abs().t() + whole[1][3].double().abs()
    assert_no_worse(got, want, exact, size)


@needs_vllm
def test_another_contract_is_refused(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    monkeypatch.setattr(PunicaWrapperBase, "add_lora_fp8", lambda self: None, raising=False)
    with pytest.raises(RuntimeError, match=r"add_lora_fp8 is new.*leave 'fastpeft' out"):
        chosen()
