"""Which modules an adapter goes into, against PEFT; and that nothing has changed where it goes into none."""

from __future__ import annotations

import copy
import gc
import time
import warnings
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft import LoraConfig, NoMatchingPeftModuleError, PeftError, get_peft_model, inject_adapter_in_model
from fastpeft.config.patterns import CPU_SECONDS, first_match, match_names
from fastpeft.config.targets import minimal_suffixes
from fastpeft.files.checks import AdapterFileError
from fastpeft.inject.modules import iter_adapter_tensors
from fastpeft.layer.layer import AdapterLayer
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, **options))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50))


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3))


def both(make: Any, **options: Any) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        ours = get_peft_model(make(), LoraConfig(**options))
        torch.manual_seed(1)
        return ours, peft.get_peft_model(make(), peft.LoraConfig(**options))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that an injection might touch."""
    return {
        "types": {name: type(module) for name, module in model.named_modules()},
        "grads": {name: p.requires_grad for name, p in model.named_parameters()},
        "values": {name: t.clone() for name, t in model.state_dict().items()},
        "attributes": sorted(vars(model)),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    now = fingerprint(model)
    assert now["types"] == before["types"]
    assert now["grads"] == before["grads"]
    assert now["attributes"] == before["attributes"]
    assert list(now["values"]) == list(before["values"])
    assert all(torch.equal(a, b) for a, b in zip(now["values"].values(), before["values"].values(), strict=True))


SELECTIONS: list[tuple[Any, dict[str, Any]]] = [
    (llama, {"target_modules": ["q_proj", "down_proj"]}),
    (llama, {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]}),
    (llama, {"target_modules": r".*\.(q|v)_proj"}),
    (llama, {"target_modules": r"model\.layers\.[02]\..*_proj", "exclude_modules": r".*mlp.*"}),
    (llama, {"target_modules": "all-linear"}),
    (llama, {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]}),
    (llama, {}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    (llama, {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["blocks", "layers"]}),
    (llama, {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "modules_to_save": ["lm_head"]}),
    (llama, {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2, r"layers\.1\..*k_proj": 3}}),
    (llama, {"target_modules": ["q_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}}),
    (llama, {"target_modules": ["q_proj"], "bias": "all"}),
    (gpt2, {}),
    (gpt2, {"target_modules": "all-linear", "bias": "lora_only"}),
    (gpt2, {"target_modules": ["wte", "c_attn"], "bias": "all"}),
    (bert, {}),
    (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
]


@pytest.mark.parametrize(
    ("make", "options"), SELECTIONS, ids=[f"{make.__name__}-{i}" for i, (make, _) in enumerate(SELECTIONS)]
)
def test_the_same_modules_are_adapted_as_by_peft(make: Any, options: dict[str, Any]) -> None:
    ours, theirs = both(make, **options)
    a, b = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert set(a) == set(b)
    for name, parameter in b.items():
        assert a[name].shape == parameter.shape, name
        assert a[name].requires_grad == parameter.requires_grad, name
        assert torch.equal(a[name], parameter), name
    assert set(ours.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_trained_and_saved_as_by_peft(bias: str) -> None:
    ours, theirs = both(bert, target_modules=["query", "dense"], bias=bias)
    a, b = fastpeft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert set(a) == set(b)
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        ours.add_adapter("other", LoraConfig(target_modules=["query"], bias=bias))


def test_all_linear_is_written_as_the_shortest_names_that_mean_the_same() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules="all-linear"))
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert model.peft_config["default"].target_modules == names
    assert minimal_suffixes(["a.x", "b.x"], ["a.x", "b.x", "c.y"]) == {"x"}
    assert minimal_suffixes(["a.x"], ["a.x", "b.x"]) == {"a.x"}
    assert minimal_suffixes(["x"], ["x", "b.x"]) == {"x"}  # no suffix tells them apart; the name does, by itself


def test_nothing_matches() -> None:
    model = llama()
    before = fingerprint(model)
    with pytest.raises(NoMatchingPeftModuleError, match=r"\['query'\] not found.*could be targeted.*q_proj \(3\)"):
        get_peft_model(model, LoraConfig(target_modules=["query"]))
    with pytest.raises(NoMatchingPeftModuleError, match="left out by exclude_modules"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]))
    with pytest.raises(NoMatchingPeftModuleError, match="layers_to_transform=9"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], layers_to_transform=9))
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig())
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["q_proj", "mlp"]}, ValueError, "'model.layers.0.mlp'.*not supported"),
        ({"target_modules": ["embed_tokens"], "modules_to_save": ["layers"]}, TypeError, "ModuleList"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"(": 2}}, PeftError, "regular expression"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "corda"}, ValueError, "preprocess_corda"),
        ({"target_modules": "(q_proj"}, PeftError, "not a valid regular expression"),
    ],
)
def test_a_failed_injection_changes_nothing(options: dict[str, Any], error: Any, message: str) -> None:
    model = llama()
    before = fingerprint(model)
    config = LoraConfig(**options)
    targets = copy.copy(config.target_modules)
    with pytest.raises(error, match=message):
        get_peft_model(model, config)
    assert_unchanged(model, before)
    assert config.target_modules == targets
    assert config.base_model_name_or_path is None
    # The same for a second adapter.
    peft_model = get_peft_model(model, LoraConfig(target_modules=["v_proj"]))
    before = fingerprint(peft_model)
    with pytest.raises(error, match=message):
        peft_model.add_adapter("other", LoraConfig(**options))
    assert_unchanged(peft_model, before)
    assert list(peft_model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["", "a.b", "default/x", "../x", " a", "a ", "a\tb", "x" * 65, "ä", 3])
def test_an_adapter_name_that_is_no_name_is_refused(name: Any) -> None:
    model = llama()
    before = fingerprint(model)
    with pytest.raises(AdapterFileError, match="adapter name"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]), adapter_name=name)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "name", ["train", "keys", "values", "forward", "weight", "0", "lora_A", "x" * 64, "a-b_c", "a b"]
)
def test_every_allowed_adapter_name_works(name: str) -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name=name)
    x = torch.randint(0, 50, (1, 4))
    y = model(x).logits
    layer = model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A[name].weight.shape == (8, 16)
    assert f"base_model.model.model.layers.0.self_attn.q_proj.lora_A.{name}.weight" in model.state_dict()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        layer.lora_B[name].weight.zero_()
    assert not torch.equal(model(x).logits, y)
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model(x).logits, y)
    model.train(False)
    assert not layer.training
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("second")
    model.delete_adapter(name)
    assert list(model.peft_config) == ["second"]


HOSTILE = ["(.*.*)*x!", "(a+)+b", r"(\w+\.?)*!", "((a|b|.)*)*!", ".*.*.*.*.*.*.*.*.*!", "(?:.|..)*!", r"(.*)\1\1\1*!"]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_catastrophic_pattern_ends_in_time_and_changes_nothing(pattern: str) -> None:
    model = llama()
    before = fingerprint(model)
    # Processor time, so that a busy machine does not fail the test.
    start = time.process_time()
    with pytest.raises(PeftError, match=r"took more than|not found|repeats \d+ times|regular expression"):
        get_peft_model(model, LoraConfig(target_modules=pattern))
    assert time.process_time() - start < 2 * CPU_SECONDS
    assert_unchanged(model, before)


@pytest.mark.parametrize("field", ["exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"])
def test_patterns_are_bounded_wherever_they_stand(field: str) -> None:
    names = ["a" * 60 + "." + "b" * 60 + ".q_proj"]
    pattern = "((a|b|.)*)*[!?]"
    with pytest.raises(PeftError, match="took more than"):
        match_names(pattern, names)
    value: Any = {pattern: 4} if field.endswith("_pattern") and field != "layers_pattern" else pattern
    extra = {"layers_to_transform": 1} if field == "layers_pattern" else {}
    model = nn.Sequential()
    model.add_module("a" * 60, nn.Sequential())
    model[0].add_module("b" * 60, nn.Sequential())
    model[0][0].add_module("q_proj", nn.Linear(2, 2))
    with pytest.raises(PeftError, match="took more than"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], **{field: value}, **extra))


def test_many_patterns_share_one_bound() -> None:
    names = ["a" * 40 + ".q_proj"]
    start = time.process_time()
    with pytest.raises(PeftError, match=r"301 patterns .* took more than"):
        first_match({f"(a|a?)+{i}[!?]": i for i in range(300)} | {"(a|b|.)*[!?]": 7}, names)
    assert time.process_time() - start < 2 * CPU_SECONDS
    assert first_match({f"x{i}.*": i for i in range(300)} | {".*proj": 7}, names) == {names[0]: 7}


def test_an_involved_but_honest_pattern_gives_what_re_gives() -> None:
    import re

    pattern = (
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\..*(k|v)_proj)"
    )
    names = [n for n, _ in llama().named_modules()] + ["language.x.mlp.q_proj", "text.mlp.up_proj"]
    assert set(match_names(pattern, names)) == {n for n in names if re.fullmatch(pattern, n)}
    assert match_names("(?i).*Q_PROJ", ["a.q_proj"]) == {"a.q_proj": ""}
    assert first_match({"x.y": 1, ".*": 2}, ["a.x.y", "x.z"]) == {"a.x.y": 1, "x.z": 2}


@pytest.mark.parametrize("pattern", ["(?:q_proj){e<=1}", "[[:alpha:]]_proj", "q_proj{x}"])
def test_what_re_and_regex_read_otherwise_is_refused(pattern: str) -> None:
    with pytest.raises(PeftError, match="braces that are no repeat count, or a class"):
        match_names(pattern, ["a.q_proj"])


def test_injection_without_a_wrapper_is_pefts() -> None:
    torch.manual_seed(1)
    ours = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), llama(), "ad")
    torch.manual_seed(1)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), llama(), "ad")
    assert type(ours) is LlamaForCausalLM
    assert set(ours.state_dict()) == set(theirs.state_dict())
    a = fastpeft.get_peft_model_state_dict(ours, adapter_name="ad")
    b = peft.get_peft_model_state_dict(theirs, adapter_name="ad")
    assert set(a) == set(b)
    assert all(torch.equal(a[k], b[k]) for k in a)
    # A second one goes beside the first, and the targets may come from a state dict's keys.
    inject_adapter_in_model(LoraConfig(target_modules=["v_proj"]), ours, "other", state_dict=a)
    names = {memory for memory, _, _ in iter_adapter_tensors(ours, "other")}
    assert names == {k.replace("lora_A.", "lora_A.other.").replace("lora_B.", "lora_B.other.") for k in a}
    assert set(ours.peft_config) == {"ad", "other"}


def test_keys_in_memory_and_in_files() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]))
    keys = {memory: file for memory, file, _ in iter_adapter_tensors(model, "default")}
    q, e = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.embed_tokens"
    assert keys[f"{q}.lora_A.default.weight"] == f"{q}.lora_A.weight"
    assert keys[f"{e}.lora_embedding_A.default"] == f"{e}.lora_embedding_A"
    assert keys["base_model.model.lm_head.modules_to_save.default.weight"] == "base_model.model.lm_head.weight"
    state = model.state_dict()
    assert all(torch.equal(state[memory], t) for memory, _, t in iter_adapter_tensors(model, "default"))


def test_a_model_of_smollms_depth_is_adapted_within_a_second() -> None:
    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            vocab_size=49152,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    gc.collect()
    gc.disable()  # what other tests left is not this one's to look through
    try:
        start = time.thread_time()
        peft_model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"), low_cpu_mem_usage=True)
        took = time.thread_time() - start
    finally:
        gc.enable()
    assert took < 1.0
    assert len(peft_model.get_layer_status()) == 210


def test_the_last_of_many_adapters_costs_what_the_second_costs() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    times = []
    for i in range(40):
        start = time.process_time()
        model.add_adapter(f"a{i}", LoraConfig(r=2, target_modules="all-linear"))
        times.append(time.process_time() - start)
    early, late = sorted(times[1:11])[5], sorted(times[30:])[5]
    assert late < 2 * early, f"{early * 1e3:.1f} ms, then {late * 1e3:.1f} ms"


def test_adapting_twice_warns_and_stacks() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.warns(fastpeft.PeftWarning, match="second time"):
        again = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), "second")
    layer = again.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, AdapterLayer)
    assert isinstance(layer.base_layer, nn.Linear)
    assert set(layer.lora_A) == {"default", "second"}
