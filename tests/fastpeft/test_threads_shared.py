"""State that threads share beside rows: where another comes in between, each has its answer, and what was there stays.

The other comes in at the one place where it matters, from within a function that is replaced.
"""

from __future__ import annotations

import importlib
import itertools
import runpy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft import LoraConfig, get_peft_model
from fastpeft.methods.math.cache import Cache
from fastpeft.weights.bnb import undo_cpu_packing
from torch import Tensor, nn

from peft_kernels import Fingerprint, PreparedCall, lora_linear, prepared
from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("model_tools.py")))


def test_a_kept_value_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, mine, other = Cache(), torch.zeros(3), torch.ones(3)
    cache.get([mine], (), lambda: mine + 1)
    unchanged = Fingerprint.unchanged

    def another_comes(self: Fingerprint) -> bool:
        monkeypatch.setattr(Fingerprint, "unchanged", unchanged)
        found = unchanged(self)
        cache.get([other], (), lambda: other + 1)
        return found

    monkeypatch.setattr(Fingerprint, "unchanged", another_comes)
    assert torch.equal(cache.get([mine], (), lambda: mine + 1), mine + 1)


def test_a_prepared_call_is_seen_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    call, x, w = PreparedCall(lora_linear), torch.randn(3, 8), torch.randn(4, 8)
    found: list[Tensor] = []

    class Slow:
        def __setattr__(self, name: str, value: Any) -> None:
            found.append(call(x, w))
            super().__setattr__(name, value)

        def holds(self, x: Tensor, given: Any) -> bool:
            return bool(self.given)  # type: ignore[attr-defined]

        def run(self, x: Tensor) -> Tensor:
            return x

    made = itertools.chain([Slow()], itertools.repeat(None))
    monkeypatch.setattr(prepared, "_bind_of", lambda function, graph: lambda x, arguments: next(made))
    assert call(x, w) is x
    assert_same_bits(found[0], lora_linear(x, w))


def test_turns_of_a_rotation_are_those_of_its_angles() -> None:
    from fastpeft.families.angles import Angles
    from fastpeft.families.description import Attention

    mine, other = (torch.rand(1, 1, 4) for _ in range(2))
    came: list[bool] = []

    class Shared(Angles):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_made" and value and not came:
                came.append(True)
                self.get(Attention(), other, other)

    angles = Shared()
    for _ in range(2):
        assert_same_bits(angles.get(Attention(), mine, mine).cos, mine)
    assert came


def test_a_repacked_weight_is_brought_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    weight = SimpleNamespace(
        data=torch.zeros(2),
        quant_state=SimpleNamespace(packing_format_for_cpu=True, absmax=torch.ones(2, 1), nested=True, state2=1),
    )
    with ThreadPoolExecutor(1) as pool:
        others = []

        def back(data: Tensor, state: Any) -> tuple[Tensor, Any]:
            if not others:
                others.append(pool.submit(undo_cpu_packing, weight))
                with pytest.raises(TimeoutError):
                    others[0].result(timeout=0.05)  # it waits
            state.packing_format_for_cpu = False
            return data + 1, state

        monkeypatch.setattr(functional, "_convert_weight_packed_for_cpu_inverse", back)
        undo_cpu_packing(weight)
        others[0].result()
    assert_same_bits(weight.data, torch.ones(2))
    assert weight.quant_state.state2 is None


def test_a_head_that_one_thread_defers_is_another_threads_own() -> None:
    model = tools["llama"]()
    ids = torch.arange(1, 13).view(2, 6)
    whole = model(input_ids=ids, labels=ids)
    fastpeft.accelerate(model, layers=False, loss=True)
    head, norm = model.get_output_embeddings(), model.model.norm
    inside, ended = threading.Event(), threading.Event()
    found: list[Any] = []

    def hook(*_: Any) -> None:
        name = threading.current_thread().name
        if name.startswith("other"):  # goes on when the first has ended
            inside.set()
            assert ended.wait(60)
        elif not name.startswith("plain"):
            found.append(plain.submit(lambda: model(input_ids=ids)).result())
            found.append(other.submit(lambda: model(input_ids=ids, labels=ids)))
            assert inside.wait(60)

    handle = norm.register_forward_hook(hook)
    with ThreadPoolExecutor(1, "plain") as plain, ThreadPoolExecutor(1, "other") as other:
        first = model(input_ids=ids, labels=ids)
        ended.set()
        second = found[1].result()
    handle.remove()
    assert type(found[0].logits) is Tensor
    assert_same_bits(found[0].logits, whole.logits)
    assert torch.equal(first.loss, second.loss)
    assert "forward" not in head.__dict__
    assert_same_bits(model(input_ids=ids).logits, whole.logits)


def replicas(model: nn.Module) -> nn.Module:
    """One as DataParallel makes them, of copies of the parameters."""
    modules = list(model.modules())
    made = {module: module._replicate_for_data_parallel() for module in modules}  # type: ignore[operator]
    for module, replica in made.items():
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else made[child])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() * 2)
    return made[model]


def test_a_replica_computes_with_its_own_parameters() -> None:
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["0", "1"], "init_lora_weights": False}
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), LoraConfig(**options), "a")
    model.add_adapter("b", LoraConfig(**options))
    model.eval()
    x, names = torch.randn(2, 6), ["a", "b"]
    with torch.no_grad():
        model(x), model(x, adapter_names=names)
        replica = replicas(model)
        found = replica(x), replica(x, adapter_names=names)
        for parameter in model.parameters():
            parameter.mul_(2)
        wanted = model(x), model(x, adapter_names=names)
        model.double()
        exact = model(x.double()), model(x.double(), adapter_names=names)
    for mine, theirs, true in zip(found, wanted, exact, strict=True):
        assert_no_worse(mine, theirs, true, 16 * true.abs().max().expand_as(true))
