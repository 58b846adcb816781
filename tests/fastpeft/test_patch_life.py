"""A patched model through its life: it stays PEFT's, whatever is done to it, and `unpatch` leaves no trace."""

from __future__ import annotations

import copy
import importlib
import pickle
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.compat.patch import hooks
from fastpeft.compat.patch.classes import SIDE, patched
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.hotswap import hotswap_adapter
from peft_versions import needs_peft
from torch import nn

from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("patch_tools.py")))
unpatched = tools["unpatched"]  # a fixture of every test here
NAMES = "IDS METHODS llama in_4bit configuration model_of forward step assert_same tuner_layers"
IDS, METHODS, llama, in_4bit, configuration, model_of, forward, step, assert_same, tuner_layers = (
    tools[n] for n in NAMES.split()
)


@pytest.mark.parametrize("kind", ["dense", "4bit"])
@pytest.mark.parametrize("method", METHODS)
def test_no_layer_of_a_llama_runs_pefts_forward(method: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "4bit":
        pytest.importorskip("bitsandbytes")
        needs_peft("!=0.20.0" if method == "oft" else ">=0", "it cannot make OFT's layers of 4 bits: TypeError")
    model = model_of(method, in_4bit(llama()) if kind == "4bit" else llama()).train()
    loss, grads = step(model)
    report = fastpeft.patch(model)
    for original in {type(layer)._fastpeft_class for layer in tuner_layers(model)}:
        monkeypatch.setattr(original, "forward", None)
    found, own = step(model)
    assert_same(found, loss)
    assert len(own) == len(grads)
    for a, b in zip(own, grads, strict=True):
        assert_same(a, b)
    assert report.ours == 14
    assert not report.calls
    assert not report.stays
    kernels = {"dora": "dora_linear", "oft": "butterfly_linear"}
    assert {kernel for _, _, kernel in report.served} == {kernels.get(method, "lora_linear")}


def test_gradient_checkpointing_autocast_and_half_precision() -> None:
    exact = step(model_of())[1]
    for options in ({"dtype": torch.bfloat16}, {}):
        model = model_of(base=llama(**options)).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=not options):
            (_, expected), _ = step(model), fastpeft.patch(model)
            (_, found) = step(model)
        for a, b, c in zip(found, expected, exact, strict=True):
            assert (a - c).norm() < 2 * (b - c).norm()


def test_state_and_classes_are_pefts_and_come_back() -> None:
    model = model_of()
    before = [(type(m), sorted(vars(m))) for m in model.modules()]
    keys, text, expected = list(model.state_dict()), repr(model), forward(model)
    fastpeft.patch(model)
    assert_same(forward(model), expected)
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert all(isinstance(layer, peft.tuners.lora.Linear) for layer in tuner_layers(model))
    assert sum(1 for _ in model.modules()) == len(before)
    fastpeft.unpatch(model)
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == before
    assert_same_bits(forward(model), expected)


def test_copies_and_pickles_are_patched() -> None:
    model = model_of()
    fastpeft.patch(model)
    expected = forward(model)
    shallow = copy.copy(tuner_layers(model)[0])
    shallow.set_adapter([])
    assert_same(shallow(torch.ones(1, 64)), shallow.base_layer(torch.ones(1, 64)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(forward(other), expected)
        layer = tuner_layers(other)[0]
        assert vars(layer)[SIDE].served
        assert layer.lora_A.default is not tuner_layers(model)[0].lora_A.default
        layer.lora_B.default.weight.data.mul_(2)  # a copy's layers read its own tensors
        assert not torch.equal(forward(other), expected)
        assert_same_bits(forward(model), expected)
    data = pickle.dumps(model)
    fastpeft.unpatch()
    other = pickle.loads(data)  # as it was pickled
    assert type(tuner_layers(other)[0]) is not peft.tuners.lora.Linear
    fastpeft.unpatch(other)
    assert type(tuner_layers(other)[0]) is peft.tuners.lora.Linear


def test_adapters_come_go_and_change() -> None:
    """Every change beside a model that is not patched, with a forward after each."""
    models = [model_of(), model_of()]
    fastpeft.patch(models[1])

    def check() -> None:
        assert_same(forward(models[1]), forward(models[0]))

    def both(act: Any) -> None:
        for model in models:
            torch.manual_seed(5)
            act(model)
        check()

    check()
    both(lambda m: m.add_adapter("dora", configuration("dora", target_modules=["q_proj", "down_proj"])))
    both(lambda m: m.set_adapter("dora"))
    both(lambda m: m.add_adapter("more", configuration(r=3)))
    both(lambda m: m.base_model.set_adapter(["default", "more"]))
    both(lambda m: m.base_model.set_adapter(["default", "dora"]))  # of which PEFT's sum is not ours
    assert any("several" in reason for layer in tuner_layers(models[1]) for reason in vars(layer)[SIDE].calls)
    both(lambda m: m.set_adapter("default"))
    both(lambda m: [layer.set_scale("default", 3.0) for layer in tuner_layers(m)])
    both(lambda m: [layer.lora_A["default"].weight.data.mul_(1.5) for layer in tuner_layers(m)])
    both(lambda m: m.train())
    both(lambda m: m.eval())
    both(lambda m: m.merge_adapter())
    both(lambda m: m.unmerge_adapter())
    both(lambda m: m.delete_adapter("default"))
    both(lambda m: m.add_adapter("default", configuration("rslora", r=5)))
    both(lambda m: m.set_adapter("default"))
    both(lambda m: m.base_model.disable_adapter_layers())
    with torch.no_grad():
        base = llama()(input_ids=IDS).logits
    assert_same(forward(models[1]), base)


def test_hotswap_files_and_unloading(tmp_path: Path) -> None:
    other = model_of("lora", r=2)
    torch.manual_seed(9)
    for p in other.parameters():
        p.data.normal_(std=0.1) if p.requires_grad else None
    other.save_pretrained(tmp_path / "other")
    model, plain = model_of(), model_of()
    fastpeft.patch(model)
    forward(model)
    for m in (model, plain):
        hotswap_adapter(m, str(tmp_path / "other"), "default", torch_device="cpu")
    assert_same(forward(model), forward(plain))
    model.save_pretrained(tmp_path / "patched")
    plain.save_pretrained(tmp_path / "plain")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    merged = model.merge_and_unload()
    assert not tuner_layers(merged)
    assert_same_bits(forward(merged), forward(plain.merge_and_unload()))


def test_scales_that_change_for_a_while() -> None:
    model, plain = model_of(), model_of()
    fastpeft.patch(model)
    for first in (False, True):  # the patched layer's view is made inside, or there already
        for m in (model, plain) if first else ():
            forward(m)
        with rescale_adapter_scale(model, 0.25), rescale_adapter_scale(plain, 0.25):
            assert_same(forward(model), forward(plain))
        assert_same(forward(model), forward(plain))


def test_rows_with_adapters_of_their_own() -> None:
    models = [model_of(), model_of()]
    for model in models:
        torch.manual_seed(5)
        model.add_adapter("other", configuration(r=3))
    fastpeft.patch(models[1])
    for names in (["default", "other"], ["__base__", "other"], ["other", "other"]):
        a, b = (forward(m, adapter_names=names) for m in models)
        assert_same(b, a)
    assert not any(vars(layer)[SIDE].calls for layer in tuner_layers(models[1]))
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        forward(models[1], adapter_names=["other"])


def test_a_compiled_graph_is_pefts() -> None:
    model, x = model_of(), torch.randn(3, 64)
    fastpeft.patch(model)
    layer = tuner_layers(model)[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    expected, served = layer(x), vars(layer)[SIDE].served
    assert_same(compiled(x), expected)
    assert_same(torch.export.export(layer, (x,)).module()(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out, and its users are still there
        assert_same(torch.jit.trace(layer, x, check_trace=False)(x), expected)
    assert vars(layer)[SIDE].served == served
    with pytest.raises(ValueError, match="is compiled already"):
        fastpeft.patch(compiled)


def test_hooks_and_other_forwards_are_kept() -> None:
    model, seen = model_of(), []
    fastpeft.patch(model)
    expected, layer = forward(model), tuner_layers(model)[0]
    layer.lora_A["default"].register_forward_hook(lambda *_: seen.append("A"))
    layer.base_layer.register_forward_hook(lambda *_: seen.append("base"))
    assert_same(forward(model), expected)
    assert sorted(seen) == ["A", "base"]
    plain = layer.base_layer.forward
    layer.base_layer.forward = lambda x: 2 * plain(x)  # as hooks of accelerate do
    assert (forward(model) - expected).norm() > 0.01 * expected.norm()
    assert ["another forward" in reason for reason in vars(layer)[SIDE].calls] == [True]
    other = tuner_layers(model)[1]
    other.forward = lambda x: x
    assert ("lora.Linear", "somebody gave it another forward") in fastpeft.patch(model).stays


def test_the_report() -> None:
    model = model_of(base=llama(), target_modules=["q_proj", "embed_tokens"])
    report = fastpeft.patch(model)
    assert dict(report.served) == {("lora.Linear", "Lora", "lora_linear"): 2, ("lora.Embedding", "Lora", "torch"): 1}
    assert "lora.Embedding  Lora    torch" in str(report)
    twice = fastpeft.patch(model)
    assert twice.served == report.served
    assert str(twice) == str(report)


def test_what_is_of_another_package_is_named_and_stays() -> None:
    class Theirs(peft.tuners.lora.Linear):
        pass

    Theirs.__module__ = "somewhere.layers"
    config = configuration(target_modules=["q_proj", "gate_proj"])
    config._register_custom_module({nn.Linear: Theirs})
    model = peft.get_peft_model(llama(), config).eval()
    layers = tuner_layers(model)
    layers[0].__class__ = peft.tuners.lora.Linear
    report = fastpeft.patch(model)
    assert dict(report.stays) == {("somewhere.layers.Theirs", "a class of another package than PEFT"): 3}
    assert [type(layer) is Theirs for layer in layers] == [False, True, True, True]


@pytest.mark.parametrize("already", [False, True], ids=["later", "already"])
def test_patch_of_everything(already: bool) -> None:
    original = BaseTuner.inject_adapter
    model = model_of() if already else None
    fastpeft.patch()
    fastpeft.patch()
    if model is None:
        model = model_of()
    else:
        model.set_adapter("default")
    assert all(layer in patched for layer in tuner_layers(model))
    model.add_adapter("more", configuration(target_modules=["q_proj", "lm_head"]))
    assert model.base_model.model.lm_head in patched
    fastpeft.unpatch()
    assert BaseTuner.inject_adapter is original
    assert type(tuner_layers(model)[0]) is peft.tuners.lora.Linear
    assert not set(tuner_layers(model_of())) & set(patched)


def test_hooks_come_with_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = "".join(f"    def {name}(self):\n        return 1\n" for name in ("inject_adapter", "set_adapter"))
    (tmp_path / "late_tuners.py").write_text(f"class BaseTuner:\n{methods}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hooks, "TUNERS", "late_tuners")
    seen: list[Any] = []
    own = hooks.Hooks(seen.append)
    own.install()
    own.install()
    tuner = importlib.import_module("late_tuners").BaseTuner()
    assert tuner.inject_adapter() == 1
    assert seen == [tuner]
    assert own not in sys.meta_path
    own.remove()
    assert tuner.set_adapter() == 1
    assert seen == [tuner]
    assert not hasattr(tuner.inject_adapter, "__wrapped__")
    del sys.modules["late_tuners"]


@pytest.mark.full_form
def test_patch_before_peft_is_imported() -> None:
    script = """
import sys, fastpeft
fastpeft.patch()
assert "peft" not in sys.modules
import peft, torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTuner
assert BaseTuner.inject_adapter.__wrapped__ and not [f for f in sys.meta_path if type(f).__name__ == "Hooks"]
model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(4, 4)))
model(torch.randn(2, 4))
assert model[0].__dict__["_fastpeft_side"].served == 1
fastpeft.unpatch()
assert not hasattr(BaseTuner.inject_adapter, "__wrapped__") and type(model[0]) is peft.tuners.lora.Linear
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_what_cannot_be_patched() -> None:
    base = llama()
    with pytest.raises(ValueError, match="has no layer with an adapter of PEFT"):
        fastpeft.patch(base)
    ours = fastpeft.get_peft_model(llama(), fastpeft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="is fastpeft's own"):
        fastpeft.patch(ours)
    with pytest.raises(TypeError, match="needs a model"):
        fastpeft.patch("model")  # type: ignore[arg-type]
    model = model_of()
    model.base_model.model.lm_head.compile(backend="eager")
    with pytest.raises(ValueError, match=r"lm_head is compiled already"):
        fastpeft.patch(model)
    class FullyShardedDataParallel(nn.Module):
        pass

    whole = FullyShardedDataParallel()
    whole.inside = model_of()
    with pytest.raises(ValueError, match=r"the model is wrapped by FSDP already"):
        fastpeft.patch(whole)
    assert not patched
