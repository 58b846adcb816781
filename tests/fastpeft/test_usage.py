"""Scripts written for PEFT with `import fastpeft as peft`: names and habits that no other file tries."""

import copy
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


def test_saving_embeddings_is_said_in_pefts_words():
    for model, target, save, told in (
        (llama(), "embed_tokens", "auto", "Setting `save_embedding_layers` to `True` as embedding layers found in"),
        (torch.nn.Sequential(torch.nn.Linear(4, 4)), "0", True, r"Could not identify embedding layer\(s\) because the"),
    ):
        model = fastpeft.get_peft_model(model, fastpeft.LoraConfig(r=2, target_modules=[target]))
        with pytest.warns(UserWarning, match=told):
            state = fastpeft.get_peft_model_state_dict(model, save_embedding_layers=save)
        assert any("base_layer" in key for key in state) == (save == "auto")


def test_a_prefix_is_not_handed_to_a_model_that_passes_over_it():
    """PEFT hands it on, and the output is the base model's."""
    peft = pytest.importorskip("peft")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.DebertaModel(transformers.DebertaConfig(**sizes, intermediate_size=16)).eval()
    ids, options = torch.tensor([[1, 2, 3]]), {"num_virtual_tokens": 2, "task_type": "FEATURE_EXTRACTION"}
    plain = model(input_ids=ids)[0]
    assert torch.equal(peft.get_peft_model(model, peft.PrefixTuningConfig(**options))(input_ids=ids)[0], plain)
    with pytest.raises(ValueError, match="does not support past key values"):
        fastpeft.get_peft_model(model, fastpeft.PrefixTuningConfig(**options))(input_ids=ids)


def test_a_nan_that_no_weight_takes_does_not_stop_a_safe_merge():
    """PEFT refuses it, though the merged weights are finite."""
    config = fastpeft.UniLoraConfig(target_modules=["0"], r=1, theta_d_length=256)  # of which 8 are taken
    model = fastpeft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    layer = model.base_model.model[0]
    taken = {int(i) for which in "AB" for i in getattr(layer, f"unilora_indices_{which}")["default"].flatten()}
    theta = model.base_model.unilora_theta_d["default"].data
    expected = layer.base_layer.weight.detach() + layer.get_delta_weight("default")
    theta[[i for i in range(256) if i not in taken]] = float("nan")
    assert torch.equal(model.merge_and_unload(safe_merge=True)[0].weight, expected)
    assert len(taken) == 8


def test_clusters_of_another_base_are_refused(tmp_path):
    """PEFT takes the tensors over, and adds a cluster's rows to others'."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    bases = [torch.nn.Sequential(torch.nn.Linear(64, 64)) for _ in range(2)]
    peft.get_peft_model(bases[0], peft.AdamssConfig(target_modules=["0"])).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(bases[1]), tmp_path).base_model.model[0]
    assert not torch.equal(theirs.scatter_index["default"], bases[0][0].scatter_index["default"])
    with pytest.raises(fastpeft.files.checks.KeyMismatchError, match="size mismatch"):
        fastpeft.PeftModel.from_pretrained(bases[1], tmp_path)


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
def test_embeddings_resized_after_a_model_came_from_the_hub_are_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--some--llama", "0" * 40
    for folder in (repo / "refs", repo / "snapshots" / commit):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    model = fastpeft.get_peft_model(llama(), fastpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = "some/llama"
    for size, saved in ((model.config.vocab_size, False), (7, True)):
        (repo / "snapshots" / commit / "config.json").write_text(f'{{"vocab_size": {size}}}')
        assert any("embed_tokens" in key for key in fastpeft.get_peft_model_state_dict(model)) == saved


def test_functional_without_a_peft_model():
    from fastpeft import functional

    base = llama()
    model = functional.inject_adapter_in_model(fastpeft.LoraConfig(target_modules=["q_proj"]), base, "one")
    assert model is base
    functional.inject_adapter_in_model(fastpeft.LoHaConfig(target_modules=["v_proj"]), base, "two")
    functional.set_adapter(model, ["two", "one"])
    layers = [m for m in model.modules() if isinstance(m, fastpeft.AdapterLayer)]
    assert all(layer.active_adapters == ["two", "one"] for layer in layers)
    functional.set_requires_grad(model, "one", False)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".one" in n} == set()
    model.half()
    functional.cast_adapter_dtype(model, "one")
    dtypes = {name: {p.dtype for n, p in model.named_parameters() if f".{name}" in n} for name in ("one", "two")}
    assert dtypes == {"one": {torch.float32}, "two": {torch.float16}}
    assert functional.delete_adapter(model, "two", prefix="hada_") == ["one"]
    with pytest.warns(fastpeft.PeftWarning, match="unmerged|Unmerging"):
        _merged_then_set(functional, model, layers)
    assert functional.delete_adapter(model, "one") is None


def _merged_then_set(functional, model, layers):
    next(layer for layer in layers if "one" in layer.methods).merge()
    with pytest.raises(ValueError, match="while they are merged"):
        functional.delete_adapter(model, "one")
    functional.set_adapter(model, "one")


def test_the_base_models_state_has_the_keys_that_it_had():
    peft = pytest.importorskip("peft")
    before = {k: v.clone() for k, v in llama().state_dict().items()}
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = fastpeft.get_peft_model(llama(), fastpeft.LoraConfig(**options))
    state = fastpeft.get_base_model_state_dict(model)
    assert {k: v.tolist() for k, v in state.items()} == {k: v.tolist() for k, v in before.items()}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**options))
    assert state.keys() == peft.get_base_model_state_dict(theirs).keys()
    shared = fastpeft.get_peft_model(llama(), fastpeft.VeraConfig(target_modules=["q_proj"], r=2))
    assert fastpeft.get_base_model_state_dict(shared).keys() == before.keys()
    fastpeft.set_base_model_state_dict(model, {k: v + 1 for k, v in before.items()})
    assert torch.equal(model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight,
                       before["model.layers.1.self_attn.q_proj.weight"] + 1)  # fmt: skip
    del before["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        fastpeft.set_base_model_state_dict(model, before)
    found = fastpeft.set_base_model_state_dict(model, {**before, "more": torch.zeros(1)}, strict=False)
    assert found == (["model.norm.weight"], ["more"])


def test_weights_of_a_file_and_its_layers(tmp_path):
    from fastpeft.tuners.lora.bnb import Linear4bit
    from fastpeft.utils.integrations import dequantize_module_weight

    model = fastpeft.get_peft_model(llama(), fastpeft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    state = fastpeft.load_peft_weights(tmp_path, device="cpu")
    assert state.keys() == fastpeft.get_peft_model_state_dict(model).keys()
    renamed = fastpeft.load_peft_weights(tmp_path, key_mapping={"^model.layers": "layers", "^layers": "none"})
    assert all(key.startswith("base_model.model.layers.") for key in renamed)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert not isinstance(layer, Linear4bit)
    assert torch.equal(dequantize_module_weight(layer), layer.base_layer.weight)
    with pytest.raises(TypeError, match="LlamaMLP"):
        dequantize_module_weight(model.base_model.model.model.layers[0].mlp)


def test_the_package_is_its_own_in_utils():
    from fastpeft import import_utils
    from fastpeft.tuners.tuners_utils import check_target_module_exists, inspect_matched_modules
    from fastpeft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD

    peft = pytest.importorskip("peft")
    assert FEEDFORWARD == peft.utils.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert import_utils.is_transformers_ge_v5_4_0 is True
    assert import_utils.is_diffusers_available() == bool(importlib.util.find_spec("diffusers"))
    config = fastpeft.LoraConfig(target_modules=["q_proj"], exclude_modules=["layers.0.self_attn.q_proj"])
    assert check_target_module_exists(config, "model.layers.1.self_attn.q_proj")
    assert not check_target_module_exists(config, "model.layers.0.self_attn.q_proj")
    found = inspect_matched_modules(fastpeft.get_peft_model(llama(), config).base_model)
    assert found["matched"] == ["model.layers.1.self_attn.q_proj"]
