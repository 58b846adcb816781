"""Scripts written for PEFT with `import fastpeft as peft`: names and habits that no other file tries."""

import importlib

import fastpeft
import pytest
import torch

transformers = pytest.importorskip("transformers")


def llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})).eval()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("peft_model", "PeftModelForCausalLM"),
        ("tuners.lora.layer", "LoraLayer"),
        ("tuners.lora.config", "LoraConfig"),
        ("tuners.lora.model", "LoraModel"),
        ("tuners.loha.layer", "LoHaLayer"),
        ("tuners.ia3.model", "IA3Model"),
        ("utils.save_and_load", "get_peft_model_state_dict"),
        ("utils.other", "ModulesToSaveWrapper"),
    ],
)
def test_submodules_of_peft(module, name):
    assert hasattr(importlib.import_module(f"fastpeft.{module}"), name)


def test_layers_of_submodules_answer_isinstance():
    from fastpeft.tuners.loha.layer import LoHaLayer
    from fastpeft.tuners.lora.layer import Linear, LoraLayer

    model = fastpeft.get_peft_model(llama(), fastpeft.LoraConfig(target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, LoraLayer)
    assert isinstance(layer, Linear)
    assert not isinstance(layer, LoHaLayer)
    assert importlib.import_module("fastpeft.tuners").lora.layer.LoraLayer


@pytest.mark.parametrize("name", ["PromptTuningConfig", "XLoraConfig", "PrefixTuningConfig"])
def test_what_is_not_there_yet_says_so(name):
    with pytest.raises(AttributeError, match="not there yet"):
        getattr(fastpeft, name)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
@pytest.mark.parametrize("save", ["auto", True])
def test_of_embeddings_only_targeted_ones_are_saved(targets, save):
    peft = pytest.importorskip("peft")
    states = []
    for package in (peft, fastpeft):
        model = package.get_peft_model(llama(), package.LoraConfig(r=2, target_modules=["q_proj", *targets]))
        states.append(package.get_peft_model_state_dict(model, save_embedding_layers=save))
    assert sorted(states[0]) == sorted(states[1])
