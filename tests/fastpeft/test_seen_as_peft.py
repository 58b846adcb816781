"""`import fastpeft as peft`: objects are instances of PEFT's classes, and PEFT's own functions take them."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
import transformers
from fastpeft.layer.layer import AdapterLayer
from fastpeft.layer.seen_layers import layer_classes
from fastpeft.methods.registry import registry
from forms import by_form, matrix
from peft import functional
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from peft_versions import needs_peft
from torch import nn

from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("model_tools.py")))
llama, config, X = (tools[name] for name in ("llama", "config", "X"))
# Of the PEFT that is there; without those that have no layers of their own (X-LoRA's are LoRA's).
METHODS = {k: m for k, m in registry().items() if hasattr(peft, m.config_class.__name__) and m.examples}
HEAD = {"modules_to_save": ["lm_head"]}


def model(**options: Any) -> Any:
    torch.manual_seed(1)
    return fastpeft.get_peft_model(llama(), fastpeft.LoraConfig(**config(**options)))


def hidden_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)


def test_models_are_pefts_models() -> None:
    made = model(**HEAD)
    layer = made.get_base_model().model.layers[0].self_attn.q_proj
    head = made.get_base_model().lm_head
    for thing, classes in (
        (made, (peft.PeftModel, peft.PeftModelForCausalLM, nn.Module)),
        (made.base_model, (BaseTuner, peft.LoraModel)),
        (layer, (BaseTunerLayer, peft.tuners.lora.LoraLayer, peft.tuners.lora.Linear)),
        (head, (AuxiliaryTrainingWrapper, ModulesToSaveWrapper)),
        (made.active_peft_config, (peft.PeftConfig, peft.LoraConfig)),
    ):
        assert [cls for cls in classes if not isinstance(thing, cls)] == []
    for thing, cls in (
        (made, peft.PeftMixedModel), (made, peft.PeftModelForSeq2SeqLM), (made.base_model, peft.IA3Model),
        (layer, nn.Linear), (layer, peft.tuners.lora.Embedding), (layer, peft.tuners.ia3.IA3Layer),
        (head, TrainableTokensWrapper), (made.active_peft_config, peft.IA3Config),
    ):  # fmt: skip
        assert not isinstance(thing, cls)
    assert type(layer) is AdapterLayer
    assert layer.__class__.__name__ == "AdapterLayer"
    assert "reset_lora_parameters" not in dir(layer)
    mixed = fastpeft.get_peft_model(llama(), fastpeft.LoraConfig(**config()), mixed=True)
    assert isinstance(mixed, peft.PeftMixedModel)
    tokens = model(trainable_token_indices=[1, 2]).get_base_model().get_input_embeddings()
    assert isinstance(tokens, TrainableTokensWrapper)


def test_before_peft_is_imported_they_are_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as hidden:
        hidden_peft(hidden)
        made = model()
        assert made.__class__ is type(made)
        assert not isinstance(made, peft.PeftModel)
    assert isinstance(made, peft.PeftModel)
    monkeypatch.setattr(peft.__spec__, "_initializing", True, raising=False)
    assert not isinstance(made, peft.PeftModel)  # PEFT is being imported: its classes are not there yet


def test_this_package_under_pefts_name_is_no_other_class(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(**HEAD)
    hidden_peft(monkeypatch)
    monkeypatch.setitem(sys.modules, "peft", fastpeft)
    for path in ("tuners.tuners_utils", "utils.other"):
        monkeypatch.setitem(sys.modules, f"peft.{path}", __import__(f"fastpeft.{path}", fromlist=["_"]))
    assert [m for m in made.modules() if m.__class__ is not type(m)] == []


@pytest.mark.full_form
@pytest.mark.parametrize("order", ["fastpeft, peft", "peft, fastpeft"])
def test_whichever_is_imported_first(order: str) -> None:
    ask = "assert isinstance(fastpeft.LoraConfig(), peft.LoraConfig)"
    subprocess.run([sys.executable, "-c", f"import {order}; {ask}"], check=True)


@pytest.mark.full_form
def test_peft_is_not_imported_to_answer() -> None:
    code = "import sys, fastpeft; assert not isinstance(fastpeft.LoraConfig(), int); assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def options_of(method: Any) -> dict[str, Any]:
    return {"target_modules": ["q_proj"], **({"total_step": 9} if method.model_name == "AdaLoraModel" else {})}


@pytest.mark.parametrize("method", [pytest.param(m, id=k.value) for k, m in METHODS.items()])
def test_every_methods_configuration_and_layers(method: Any) -> None:
    name = method.config_class.__name__
    assert isinstance(method.config_class(**options_of(method)), getattr(peft, name))
    if not method.examples:  # its layers are whole modules (test_methods_whole.py)
        return
    label = "Norm" if method.kinds == ("norm",) else "Linear"
    found = layer_classes([method.peft_type.value], label)
    ours, theirs = found[-1], f"peft.tuners.{method.peft_type.value.lower()}.layer"
    assert issubclass(ours, BaseTunerLayer)
    assert ours.__module__ == theirs


def test_layers_with_adapters_of_any_two_methods_are_of_both_classes() -> None:
    layer = AdapterLayer(nn.Linear(4, 4))
    for methods in itertools.permutations((method for method in METHODS.values() if method.examples), 2):
        layer.methods = {method.model_name: method for method in methods}
        assert isinstance(layer, BaseTunerLayer)
        for method in methods:
            module = sys.modules[f"peft.tuners.{method.peft_type.value.lower()}.layer"]
            wanted = method.model_name.removesuffix("Model").lower() + "layer"
            name = next(name for name in vars(module) if name.lower() == wanted)
            assert isinstance(layer, getattr(module, name)), (method.model_name, name)


def test_an_object_survives_copies() -> None:
    made = model(**HEAD)
    expected = made(X).logits
    layer = made.get_base_model().model.layers[0].self_attn.q_proj
    for copied in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), torch_saved(made)):
        assert [type(m) for m in copied.modules()] == [type(m) for m in made.modules()]
        assert_same_bits(copied(X).logits, expected)
    for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
        assert type(copied) is AdapterLayer
    own = made.active_peft_config
    replaced = dataclasses.replace(own, peft_type=None)
    for config in (pickle.loads(pickle.dumps(own)), copy.deepcopy(own), copy.copy(own), replaced):
        assert type(config) is fastpeft.LoraConfig
        assert config == own
    shown: Any = own.__class__
    assert type(shown(r=3)) is fastpeft.LoraConfig
    assert pickle.loads(pickle.dumps(shown)) is fastpeft.LoraConfig


def torch_saved(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_library_can_give_a_layer_another_class() -> None:
    """As FSDP2 and parametrisations do: a class that derives from the one that the layer shows."""
    layer = model().get_base_model().model.layers[0].self_attn.q_proj

    class Sharded:
        pass

    given = type("ShardedLayer", (Sharded, layer.__class__), {"shards": 2})
    layer.__class__ = given
    assert type(layer).__mro__[1:3] == (Sharded, AdapterLayer)
    assert not any(cls.__module__.startswith("peft.") for cls in type(layer).__mro__)
    assert isinstance(layer, (Sharded, BaseTunerLayer))
    assert isinstance(layer, peft.tuners.lora.Linear)
    assert layer.shards == 2
    other = copy.deepcopy(layer)
    other.__class__ = given
    assert type(other) is type(layer)
    layer.__class__ = type("Twice", (given,), {"shards": 3})
    assert type(layer).__mro__[2:4] == (Sharded, AdapterLayer)
    assert layer.shards == 3
    assert type(given(nn.Linear(2, 2))) is type(other)
    layer.__class__ = AdapterLayer
    assert type(layer) is AdapterLayer
    shown = layer.__class__
    layer.__class__ = shown
    assert type(layer) is AdapterLayer


# ---- PEFT's own functions on our objects -------------------------------------------------------------------------

STATES = {
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 1]},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only", "lora_bias": True},
}


@pytest.mark.parametrize("options", STATES.values(), ids=STATES)
def test_pefts_functions_read_and_write_our_state(options: dict[str, Any]) -> None:
    made = model(**options)
    expected = fastpeft.get_peft_model_state_dict(made)
    found = peft.get_peft_model_state_dict(made)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(found[key], value)
    wanted = {key: torch.randn_like(value) for key, value in found.items()}
    result = peft.set_peft_model_state_dict(made, dict(wanted))
    assert not result.unexpected_keys
    for key, value in fastpeft.get_peft_model_state_dict(made).items():
        assert_same_bits(value, wanted[key])


@pytest.mark.parametrize("options", [STATES["head"], STATES["tokens"]], ids=["head", "tokens"])
def test_pefts_functions_switch_and_delete_our_adapters(options: dict[str, Any]) -> None:
    ours, theirs = tools["pair"](**options)
    tools["add_both"](ours, theirs, "other", **options)
    for made in (ours, theirs):
        peft.tuners.tuners_utils.set_adapter(made.get_base_model(), "other")
    tools["assert_same_outputs"](ours, theirs)
    assert trained(ours) == trained(theirs)
    left = [functional.delete_adapter(m.get_base_model(), "other", prefix="lora_") for m in (ours, theirs)]
    assert left[0] == left[1] == ["default"]
    tools["assert_same_outputs"](ours, theirs)


def trained(made: nn.Module) -> set[str]:
    return {name for name, parameter in made.named_parameters() if parameter.requires_grad}


def test_transformers_and_pefts_wrap_policies_find_our_layers() -> None:
    policies = [peft.utils.other.fsdp_auto_wrap_policy(m) for m in tools["pair"]()]
    asked = [
        {name for name, module in made.named_modules() if policy(module=module, recurse=False, nonwrapped_numel=0)}
        for made, policy in zip(tools["pair"](), policies, strict=True)
    ]
    assert asked[0] == asked[1]
    assert asked[0]


@pytest.mark.parametrize(("name", "options"), matrix(
    [(m.config_class.__name__, options) for m in METHODS.values() for options in m.examples],
    lambda name, options: name in ("LoraConfig", "ShiraConfig", "OFTConfig") and not options.keys() - {"r"},
))  # fmt: skip
def test_peft_takes_our_configurations(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT's `get_peft_model` makes of ours what it makes of its own, to the bit; that can be saved and read."""
    target = "embed_tokens" if name == "TrainableTokensConfig" else "q_proj"
    options = {"target_modules": [target], **({"total_step": 9} if name == "AdaLoraConfig" else {}), **options}
    nested = {n: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for n, v in options.items()}
    if missing := options.keys() - {field.name for field in dataclasses.fields(getattr(peft, name))}:
        needs_peft(">=0.21", f"its {name} has no {', '.join(missing)}")
    made = []
    for library, given in ((fastpeft, options), (peft, nested)):
        torch.manual_seed(1)
        try:
            made.append(peft.get_peft_model(llama(), getattr(library, name)(**given)))
        except ValueError as error:
            made.append(str(error))  # an example for larger layers
    ours, theirs = made
    if isinstance(theirs, str):
        assert ours == theirs
        return
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    state = ours.state_dict()
    for key, value in theirs.state_dict().items():
        assert_same_bits(state[key], value)
    ours.save_pretrained(tmp_path)
    assert isinstance(fastpeft.PeftConfig.from_pretrained(tmp_path), type(ours.active_peft_config))
    assert isinstance(peft.PeftConfig.from_pretrained(tmp_path), getattr(peft, name))


def test_pefts_injection_into_our_layers_is_refused() -> None:
    base = model().get_base_model()
    with pytest.raises(TypeError, match="PEFT itself can put no adapter: add it with"):
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), base, "other")
    fastpeft.inject_adapter_in_model(fastpeft.LoraConfig(target_modules=["q_proj"]), model().get_base_model(), "other")


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, Any]:
        ids = [(row + i) % 50 for i in range(6)]
        return {"input_ids": ids, "labels": ids, "idx": row}  # a column that no model takes


def test_the_trainer_trains_and_saves_our_adapter(tmp_path: Path) -> None:
    ours, theirs = tools["pair"](init_lora_weights=True)
    logged, best, steps = [], [], by_form(short=4, full_form=20)
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2}
    saved = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    for made in (ours, theirs):
        arguments = transformers.TrainingArguments(
            str(tmp_path / type(made).__module__), max_steps=steps, per_device_train_batch_size=4,
            load_best_model_at_end=True, **options, **saved,
        )  # fmt: skip
        trainer = transformers.Trainer(made, arguments, train_dataset=Rows(), eval_dataset=Rows())
        trainer.train()
        best.append(Path(trainer.state.best_model_checkpoint))
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logged[0] == pytest.approx(logged[1], rel=2e-3)
    assert logged[0][0] > logged[0][-1]
    folder = best[0]
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {file.name for file in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    tools["assert_same_outputs"](ours.eval(), peft.PeftModel.from_pretrained(llama(), folder).eval())
