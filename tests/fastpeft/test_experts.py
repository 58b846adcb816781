"""Targets and files that name experts as the modules they were in transformers 4, on those that 5 joins."""

from __future__ import annotations

import copy
import importlib
import json
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.compat import transformers_keys as convert
from fastpeft.inject.old_experts import find_joined
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_kernels.testing import assert_same_bits

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
close = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))["close"]

EXPERTS = 3
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}),
    "qwen3": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": 8}),
    "qwen3_dense": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": 8, "mlp_only_layers": [0]}),
    "qwen2": ("Qwen2Moe", {"num_experts": EXPERTS, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}),
}
OLD = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}  # block, gate, up, down of a file
IDS = torch.arange(12).reshape(2, 6)


def model_of(name: str) -> Any:
    kind, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def adapted(library: Any, model: nn.Module, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")  # PEFT's, mistaken
        return library.get_peft_model(model, library.LoraConfig(**{"r": 2, "lora_alpha": 3} | options))


def said(model: Any) -> list[Any]:
    config = model.peft_config["default"]
    sets = [set(v or ()) for v in (config.target_modules, config.target_parameters)]
    return [*sets, config.rank_pattern, config.alpha_pattern]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("mixtral", ["w1", "w3"]),
        ("mixtral", ["gate", "w2"]),
        ("mixtral", "all-linear"),
        ("qwen3", ["q_proj", "gate_proj", "up_proj", "down_proj"]),
        ("qwen3", "all-linear"),
        ("qwen3", r".*\.(q_proj|gate_proj|up_proj|down_proj)"),
    ],
)
def test_new_adapters_are_pefts(name: str, targets: Any) -> None:
    ours = adapted(fastpeft, model_of(name), target_modules=copy.copy(targets))
    theirs = adapted(peft, model_of(name), target_modules=copy.copy(targets))
    assert said(ours) == said(theirs)
    state, expected = (lib.get_peft_model_state_dict(m) for lib, m in ((fastpeft, ours), (peft, theirs)))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    torch.manual_seed(2)
    state = {k: torch.randn_like(v) for k, v in sorted(state.items())}
    fastpeft.set_peft_model_state_dict(ours, state)
    peft.set_peft_model_state_dict(theirs, state)
    close(ours(IDS).logits, theirs(IDS).logits, times=64)


def old_file(name: str, folder: Path, targets: list[str], **options: Any) -> dict[str, Tensor]:
    """An adapter as it was saved with transformers 4, over attention, experts and the router; gives its tensors."""
    block, *names = OLD.get(name, ("mlp", "gate_proj", "up_proj", "down_proj"))
    model, tensors = model_of(name), {}
    torch.manual_seed(3)
    ranks = options.get("rank_pattern", {})

    def add(module: str, out: int, inputs: int) -> None:
        r = ranks.get(module.rpartition(".")[2], 2)
        if module.rpartition(".")[2] in targets:
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, inputs) * 0.3
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, r) * 0.3

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            add(path, *module.weight.shape)
    for experts in find_joined(model):
        module = model.get_submodule(experts.name)
        joined, down = module.gate_up_proj, module.down_proj
        root = experts.name.replace(".mlp.", f".{block}.").removesuffix(".experts")
        add(f"{root}.gate", EXPERTS, joined.shape[2])
        for i in range(EXPERTS):
            for old in names[:2]:
                add(f"{root}.experts.{i}.{old}", joined.shape[1] // 2, joined.shape[2])
            add(f"{root}.experts.{i}.{names[2]}", *down.shape[1:])
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | options))
    return tensors


def merged_by_hand(name: str, tensors: dict[str, Tensor], scaling: float) -> Any:
    """The model with each update added where its module's rows are now."""
    block, gate, up, down = OLD.get(name, ("mlp", "gate_proj", "up_proj", "down_proj"))
    model = model_of(name)
    with torch.no_grad():
        for key, a in tensors.items():
            if ".lora_A." not in key:
                continue
            update = scaling * tensors[key.replace("lora_A", "lora_B")] @ a
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").replace(f".{block}.", ".mlp.")
            root, _, rest = path.partition(".experts.")
            if not rest:
                model.get_submodule(path).weight += update
                continue
            expert, _, old = rest.partition(".")
            experts = model.get_submodule(f"{root}.experts")
            half = experts.gate_up_proj.shape[1] // 2
            rows = {gate: slice(0, half), up: slice(half, None), down: slice(None)}[old]
            (experts.down_proj if old == down else experts.gate_up_proj)[int(expert), rows] += update
    return model


OLD_TARGETS = {
    "mixtral": ["q_proj", "w1", "w2", "w3", "gate"],
    "qwen3": ["q_proj", "gate_proj", "up_proj", "down_proj", "gate"],
    "qwen3_dense": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.mark.parametrize(
    ("name", "options", "scaling"),
    [
        ("mixtral", {}, 1.5),
        ("mixtral", {"use_rslora": True}, 3 / 2**0.5),
        ("mixtral", {"rank_pattern": {"w2": 4}, "alpha_pattern": {"w2": 6}}, 1.5),
        ("qwen3", {}, 1.5),
        ("qwen3_dense", {}, 1.5),  # layer 0 has the names as modules
        ("qwen2", {}, 1.5),  # so has the shared expert
    ],
)
def test_old_files_compute_what_they_were_trained_to(
    name: str, options: dict[str, Any], scaling: float, tmp_path: Path
) -> None:
    tensors = old_file(name, tmp_path, OLD_TARGETS[name], **options)
    model = fastpeft.PeftModel.from_pretrained(model_of(name), tmp_path)
    expected = merged_by_hand(name, tensors, scaling)(IDS).logits
    close(model(IDS).logits, expected, times=64)
    if name in ("mixtral", "qwen3") and not options:  # what PEFT loads, too
        theirs = peft.PeftModel.from_pretrained(model_of(name), tmp_path)
        close(theirs(IDS).logits, expected, times=64)
        state = fastpeft.get_peft_model_state_dict(model)
        for key, value in peft.get_peft_model_state_dict(theirs).items():
            assert_same_bits(state[key], value)
    # Saved again it has today's names, and another copy of the model takes it.
    model.save_pretrained(tmp_path / "new")
    again = fastpeft.PeftModel.from_pretrained(model_of(name), tmp_path / "new")
    assert_same_bits(again(IDS).logits, model(IDS).logits)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert_same_bits(model(IDS).logits, again(IDS).logits)


def test_dropout_of_an_old_file_is_said_not_to_act(tmp_path: Path) -> None:
    tensors = old_file("mixtral", tmp_path, OLD_TARGETS["mixtral"], lora_dropout=0.1)
    with pytest.warns(fastpeft.PeftWarning, match=r"lora_dropout=0.1 does not act in .*gate_up_proj"):
        model = fastpeft.PeftModel.from_pretrained(model_of("mixtral"), tmp_path)
    close(model(IDS).logits, merged_by_hand("mixtral", tensors, 1.5)(IDS).logits, times=64)


@pytest.mark.parametrize("broken", ["missing", "shape"])
def test_incomplete_old_files_change_nothing(broken: str, tmp_path: Path) -> None:
    tensors = old_file("mixtral", tmp_path, OLD_TARGETS["mixtral"])
    key = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w3.lora_A.weight"
    if broken == "missing":
        del tensors[key]
    else:
        tensors[key] = torch.randn(5, 16)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    base = model_of("mixtral")
    before = [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match=r"experts\.2\.w3\.lora_A" if broken == "missing" else "several shapes"):
        fastpeft.PeftModel.from_pretrained(base, tmp_path)
    assert [type(m) for m in base.modules()] == before


def test_layers_and_expressions_select_experts_of_some_layers_only() -> None:
    """PEFT adapts the experts of every layer here."""
    for options in (
        {"target_modules": ["w1", "w2", "w3"], "layers_to_transform": [1]},
        {"target_modules": r".*\.layers\.1\..*\.(w1|w2|w3)"},
    ):
        model = adapted(fastpeft, model_of("mixtral"), **options)
        assert all(".layers.1." in key for key in fastpeft.get_peft_model_state_dict(model))
        parameters = model.peft_config["default"].target_parameters
        assert parameters == ["1.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["w1"]}, "without w3"),
        ({"target_modules": r".*experts\.0\.w2"}, "1 of the 3 experts"),
        ({"target_modules": ["w1", "w3"], "rank_pattern": {r"experts\.0\..*": 4}}, "several ranks"),
        ({"target_modules": ["w1", "w3"], "alpha_pattern": {"w3": 7}}, "several ranks or scalings"),
    ],
)
def test_what_one_parameter_cannot_hold_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fastpeft.PeftError, match=message):
        adapted(fastpeft, model_of("mixtral"), **options)


def test_methods_that_cannot_adapt_experts_name_what_they_leave_out() -> None:
    with pytest.warns(fastpeft.PeftWarning, match=r"LOHA cannot adapt joined experts.*gate_up_proj.*left out"):
        fastpeft.get_peft_model(model_of("mixtral"), fastpeft.LoHaConfig(target_modules="all-linear"))
    with pytest.warns(fastpeft.PeftWarning, match=r"\['q_proj', 'w2'\] mean too"):
        adapted(fastpeft, model_of("mixtral"), target_modules=["q_proj", "w2"], use_dora=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, r"target_modules: nothing in the model matches v_prj"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_prj"]}, r"exclude_modules: .* k_prj"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 3}}, r"rank_pattern: .* v_proj"),
        ({"target_modules": ".*x_proj", "target_parameters": ["gate.weight"]}, r"target_modules: .*x_proj"),
    ],
)
def test_names_that_match_nothing_are_said(options: dict[str, Any], message: str) -> None:
    with pytest.warns(fastpeft.PeftWarning, match=message):
        adapted(fastpeft, model_of("mixtral"), **options)


def test_names_that_match_say_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastpeft.PeftWarning)
        adapted(fastpeft, model_of("mixtral"), target_modules=["q_proj", "w1", "w2", "w3", "gate"])
        adapted(fastpeft, model_of("qwen3"), target_modules="all-linear", exclude_modules=["k_proj"])


STAND_IN = ("peft", "peft.utils", "peft.utils.other", "peft.utils.transformers_weight_conversion", "peft.tuners",
            "peft.tuners.tuners_utils")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("mixtral", ["w1", "w3", "gate"]),
        ("mixtral", ["w2"]),
        ("qwen3", ["gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_transformers_loads_old_files_with_our_conversions(
    name: str, targets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `model.load_adapter`, which asks `build_peft_weight_mapping` for the names in the model."""
    for path in STAND_IN:
        monkeypatch.setitem(sys.modules, path, importlib.import_module(path.replace("peft", "fastpeft", 1)))
    tensors = old_file(name, tmp_path, targets)
    model = model_of(name)
    report = model.load_adapter(str(tmp_path))
    assert not report.missing_keys
    assert not report.unexpected_keys
    close(model.eval()(IDS).logits, merged_by_hand(name, tensors, 1.5)(IDS).logits, times=64)
    converted = convert.convert_peft_adapter_state_dict_for_transformers(model_of(name), model.peft_config["default"],
                                                                         tensors)  # fmt: skip
    for key, tensor in fastpeft.get_peft_model_state_dict(model).items():
        assert_same_bits(converted[f"base_model.model.{key}"], tensor)


def test_a_configuration_is_converted_in_place() -> None:
    config = fastpeft.LoraConfig(target_modules=["q_proj", "w1", "w3"], r=2, lora_alpha=3)
    convert.convert_peft_config_for_transformers(config, model_of("mixtral"), None)
    assert (config.target_modules, config.target_parameters) == ({"q_proj"}, ["gate_up_proj"])
    assert (config.rank_pattern, config.alpha_pattern) == ({r".*\.gate_up_proj": 4}, {r".*\.gate_up_proj": 6})
    untouched = fastpeft.LoraConfig(target_modules=["q_proj"])
    convert.convert_peft_config_for_transformers(untouched, model_of("mixtral"))
    assert untouched == fastpeft.LoraConfig(target_modules=["q_proj"])
