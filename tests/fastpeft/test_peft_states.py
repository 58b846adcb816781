"""States and messages of PEFT's that its users look at: merged, disabled and deleted adapters, what is said then."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import fastpeft
import peft
import pytest
import torch
from fastpeft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_kernels.testing import assert_no_worse, assert_same_bits


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(12, 8)
        self.up = nn.Linear(8, 8, bias=bias)
        self.down = nn.Linear(8, 8, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.emb(ids))))  # type: ignore[no-any-return]


IDS = torch.arange(12)[None]
BOTH = ["up", "down"]


def model_of(config: str = "LoraConfig", has_bias: bool = True, **options: Any) -> Any:
    start = {"init_lora_weights": False} if config == "LoraConfig" else {"init_weights": False}
    return get_peft_model(Net(has_bias), getattr(fastpeft, config)(**{"target_modules": BOTH, **start, **options}))


def test_merging_what_is_merged_is_said() -> None:
    model = model_of()
    model.add_adapter("other", LoraConfig(target_modules=["up"], init_lora_weights=False))
    model.merge_adapter()
    once = model(IDS)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert_same_bits(model(IDS), once)
    with pytest.warns(UserWarning, match="were merged default. You are now additionally merging other"):
        model.merge_adapter(["other"])
    assert model.model.up.merged_adapters == ["default", "other"]


def test_a_merged_adapter_is_not_deleted_and_another_leaves_the_merge() -> None:
    model = model_of()
    model.add_adapter("other", LoraConfig(target_modules=BOTH))
    model.merge_adapter()
    message = r"Cannot delete adapter\(s\) \['default'\] while they are merged. Please unmerge them first."
    with pytest.raises(ValueError, match=message):
        model.delete_adapter(["other", "default"])
    assert model.model.up._all_available_adapter_names() == ["default", "other"]
    model.delete_adapter("other")
    assert model.model.up.merged_adapters == ["default"]
    with pytest.raises(ValueError, match=message):
        model.model.up.delete_adapter("default")


def test_disabling_where_some_layers_are_disabled_warns_and_enables_all_after_it() -> None:
    model = model_of()
    model.model.up.enable_adapters(False)
    message = "some adapter layers that are enabled and others that are disabled"
    with pytest.warns(UserWarning, match=message), model.disable_adapter():
        assert not model.has_active_enabled_adapter
    assert not model.model.up.disable_adapters
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert model.model.up.disable_adapters


@pytest.mark.parametrize(
    ("config", "options"),
    [("OFTConfig", {"oft_block_size": 2, "module_dropout": 0.5}),
     ("BOFTConfig", {"boft_block_size": 2, "boft_dropout": 0.5}),
     ("LoKrConfig", {"r": 2, "rank_dropout": 0.5}), ("PveraConfig", {"r": 2})],
)  # fmt: skip
def test_a_merge_in_training_drops_and_draws_nothing(config: str, options: dict[str, Any]) -> None:
    model = model_of(config, **options).train()
    still = copy.deepcopy(model).eval()
    still.merge_adapter()
    model.merge_adapter()
    assert_same_bits(model.model.up.weight, still.model.up.weight)
    assert model.model.up.training
    assert all(m.training for m in model.model.up.modules())


@pytest.mark.parametrize("size", [1, 3])
def test_dora_of_a_convolution_with_groups_is_pefts(size: int) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 8, size, groups=2), torch.randn(2, 6, 5, 4)
    results = []
    for library, dtype in ((fastpeft, torch.float32), (peft, torch.float32), (peft, torch.float64)):
        base = nn.Sequential()
        base.add_module("conv", copy.deepcopy(layer))
        torch.manual_seed(1)
        model = library.get_peft_model(base, library.LoraConfig(r=4, use_dora=True, target_modules=["conv"]))
        torch.manual_seed(2)
        for p in [p for p in model.parameters() if p.requires_grad]:
            p.data.add_(torch.randn(p.shape) * 0.3)
        y = model.to(dtype)(x.to(dtype))
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, theirs, exact in zip(*results, strict=True):
        assert_no_worse(ours, theirs, exact, exact.abs() + exact.abs().mean())


def test_tensors_that_layers_share_are_none_of_the_base_models() -> None:
    keys = Net().state_dict().keys()
    for config, options in (("UniLoraConfig", {"theta_d_length": 9}), ("VeraConfig", {"r": 2}), ("LoraConfig", {})):
        found = fastpeft.get_base_model_state_dict(model_of(config, **options))
        assert found.keys() == keys
        assert all(torch.equal(found[key], value) for key, value in Net().state_dict().items())


def test_a_state_dict_brings_biases_that_another_adapter_trained() -> None:
    trained = model_of(bias="all", init_lora_weights=True)
    with torch.no_grad():
        trained.model.up.bias.fill_(1.25)
    state = fastpeft.get_peft_model_state_dict(trained)
    plain = model_of(init_lora_weights=True)
    result = fastpeft.set_peft_model_state_dict(plain, state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_bits(plain(IDS), trained(IDS))


def test_counters_of_a_copied_module_are_saved_and_loaded(tmp_path: Path) -> None:
    def base() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    model = get_peft_model(base(), LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    model(torch.randn(3, 4))
    model.save_pretrained(tmp_path)
    loaded = fastpeft.PeftModel.from_pretrained(base(), tmp_path)
    assert loaded.model[1].modules_to_save["default"].num_batches_tracked == 1


def test_the_same_rows_are_trained_by_one_active_adapter() -> None:
    options = {"target_modules": ["up"], "trainable_token_indices": {"emb": [0, 3]}}
    model = get_peft_model(Net(), LoraConfig(**options))
    model.add_adapter("other", LoraConfig(**{**options, "trainable_token_indices": {"emb": [3]}}))
    model.add_adapter("apart", LoraConfig(**{**options, "trainable_token_indices": {"emb": [4]}}))
    assert model.model.emb.active_adapters == ["default"]
    for act in (model.base_model.set_adapter, model.merge_adapter):
        with pytest.raises(
            ValueError, match=r"other are already defined.*\[3\].*one adapter .* TrainableTokensWrapper"
        ):
            act(["default", "other"])
    assert model.active_adapters == ["default"]
    model.base_model.set_adapter(["default", "apart"])
    assert model.model.emb.original_module is model.model.emb.token_adapter.base_layer


def test_what_cannot_be_merged_says_what_is_wrong_in_pefts_words() -> None:
    with pytest.warns(
        UserWarning, match="`lora_bias=True` was passed but the targeted layer of type Linear has no bias"
    ):
        model = model_of(has_bias=False, lora_bias=True)
    with pytest.raises(
        RuntimeError, match="Impossible to merge LoRA with `lora_bias=True` because the base layer has no"
    ):
        model.merge_adapter()
    model = get_peft_model(Net(), fastpeft.IA3Config(target_modules=["up"], feedforward_modules=[]))
    with torch.no_grad():
        model.model.up.base_layer.bias.fill_(torch.finfo(torch.float32).max)
        model.model.up.ia3_l["default"].fill_(2.0)
    broken = "NaNs detected in the merged weights. The adapter default seems to be broken .* in the merged bias"
    with pytest.raises(ValueError, match=broken):
        model.model.up.merge(safe_merge=True)


def test_supertuning_with_a_rank_keeps_the_models_precision() -> None:
    model = get_peft_model(Net().bfloat16(), fastpeft.SupertuningConfig(target_modules=BOTH, r=2, sparsity=0.5))
    assert model(IDS).dtype is torch.bfloat16


def test_model_types_can_be_added_to_a_methods_targets() -> None:
    from fastpeft.tuners.delora.model import TRANSFORMERS_MODELS_TO_DELORA_TARGET_MODULES_MAPPING as DELORA
    from fastpeft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA

    base = Net()
    base.config = {"model_type": "of-ours"}  # type: ignore[assignment]
    DELORA["of-ours"] = ["up"]
    try:
        assert "of-ours" not in LORA
        assert get_peft_model(base, fastpeft.DeloraConfig()).targeted_module_names == ["up"]
    finally:
        del DELORA["of-ours"]


def test_shared_vectors_can_be_started_anew() -> None:
    for config, name in (("TinyLoraConfig", "_init_tinylora_v"), ("VBLoRAConfig", "_init_vblora_vector_bank")):
        options = {"vector_length": 2, "num_vectors": 4} if config == "VBLoRAConfig" else {"init_weights": True}
        model = get_peft_model(Net(), getattr(fastpeft, config)(target_modules=BOTH, **options))
        shared = [p for p in model.parameters() if p.requires_grad][-1 if config == "TinyLoraConfig" else 0]
        with torch.no_grad():
            for p in model.parameters():
                p.zero_() if p.requires_grad else None
        getattr(model.base_model, name)(model.peft_config["default"], "default")
        assert any(p.any() for p in model.parameters() if p.requires_grad), shared.shape


def test_a_wrapper_of_a_parameter_names_it() -> None:
    model = get_peft_model(Net(), LoraConfig(target_parameters=["up.weight"]))
    assert model.model.up.parameter_name == "weight"
    assert "parameter_name='weight'" in repr(model.model.up)


class Own(nn.Module):
    """A linear layer of nobody's type."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + 1.0


def test_layers_of_a_users_class_go_on_modules_of_a_users_type(tmp_path: Path) -> None:
    from fastpeft.tuners import lora

    class Halved(lora.Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(x, *args, **kwargs) * 0.5

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), Own())
    config = LoraConfig(target_modules=["0", "1"], init_lora_weights=False)
    config._register_custom_module({Own: Halved})
    with pytest.warns(UserWarning, match=r"Unsupported layer type .*Own'>' encountered, proceed at your own risk"):
        model = get_peft_model(copy.deepcopy(base), config)
    layer = model.model[1]
    assert isinstance(layer, Halved)
    assert not isinstance(model.model[0], Halved)
    x = torch.randn(3, 8)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = (layer.base_layer(x) + x @ a.T @ b.T * layer.scaling["default"]) * 0.5
    assert_no_worse(layer(x), expected, expected.double(), expected.double().abs() + 1)
    y = model(x)
    model.save_pretrained(tmp_path)
    other = LoraConfig.from_pretrained(tmp_path)
    other._register_custom_module({Own: Halved})
    loaded = fastpeft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=other)
    assert_same_bits(loaded(x), y)
    model.merge_adapter()
    assert_no_worse(model(x), y, y.double(), y.double().abs() + 1)
    wrong = LoraConfig(target_modules=["1"])
    wrong._register_custom_module({Own: nn.Linear})
    with pytest.raises(TypeError, match="should be a class that derives from"):
        get_peft_model(copy.deepcopy(base), wrong)
    none = LoraConfig(target_modules=["0"])
    none._register_custom_module({nn.LSTM: Halved})
    with pytest.raises(ValueError, match="a LSTM, has no matrix `weight`"):
        get_peft_model(nn.Sequential(nn.LSTM(4, 4)), none)


class Tied(Net):
    _tied_weights_keys: ClassVar[Any] = {"lm_head.weight": "emb.weight"}

    def __init__(self) -> None:
        super().__init__()
        self.config = {"tie_word_embeddings": True, "model_type": "net"}
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.emb.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.emb


@pytest.mark.parametrize("library", [fastpeft, peft])
def test_slips_are_warned_of_as_peft_does(library: Any) -> None:
    lora = library.LoraConfig
    for category, match, config, net in (
        (RuntimeWarning, r"rank_pattern keys did not match any targeted module and were ignored: \['tpyo'\]",
         lora(target_modules=["up"], rank_pattern={"up": 2, "tpyo": 3}), Net()),
        (RuntimeWarning, "were set but no module was matched",
         lora(target_modules=["pu"], target_parameters=["up.weight"]), Net()),
        (RuntimeWarning, "were set but no parameter was matched",
         lora(target_modules=["up"], target_parameters=["pu.weight"]), Net()),
        (UserWarning, "a tied layer is part of the adapter, but `ensure_weight_tying` is not set to True",
         lora(target_modules=["up"], modules_to_save=["lm_head"]), Tied()),
        (UserWarning, "a tied layer is part of the adapter, but no implementation exists to tie the adapters",
         library.LoHaConfig(target_modules=["lm_head"]), Tied()),
        (UserWarning, "Adapter name 'lora' should not be contained in the prefix 'lora_'",
         lora(target_modules=["up"]), Net()),
    ):  # fmt: skip
        name = "lora" if "prefix" in match else "default"
        with pytest.warns(category, match=match):
            library.get_peft_model(net, config, name)


@pytest.mark.parametrize("library", [fastpeft, peft])
def test_a_state_dict_and_a_configuration_that_differ(library: Any) -> None:
    config = library.LoraConfig(target_modules=BOTH)
    state = library.get_peft_model_state_dict(library.inject_adapter_in_model(config, Net()))
    less = {key: value for key, value in state.items() if not key.startswith("up.")}
    one = library.LoraConfig(target_modules=["up"])
    for given, keys, match in ((config, less, r"PEFT config contained these additional target modules: \['up'\]"),
                               (one, state, r"state_dict contained these additional target modules: \['down'\]")):
        with pytest.warns(RuntimeWarning, match=match):
            net = library.inject_adapter_in_model(given, Net(), state_dict=keys)
        assert library.get_peft_model_state_dict(net).keys() == keys.keys()
    parameters = library.LoraConfig(target_modules=[], target_parameters=["up.weight"])
    with pytest.raises(ValueError, match="from a state_dict but the PEFT config uses `target_parameters`"):
        library.inject_adapter_in_model(parameters, Net(), state_dict=state)


@pytest.mark.parametrize("library", [fastpeft, peft])
def test_shards_that_nobody_gathered_are_not_saved_silently(library: Any, tmp_path: Path) -> None:
    model = library.get_peft_model(Net(), library.LoraConfig(target_modules=["up"]))
    model.base_model.model.up.lora_A["default"].weight.data = torch.zeros(32)
    with pytest.warns(UserWarning, match=r"1 LoRA tensor\(s\) have invalid shape: .*lora_A.weight:\(32,\)"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("library", [fastpeft, peft])
def test_what_has_no_form_is_refused_as_peft_refuses_it(library: Any) -> None:
    own = Net()
    own.scale = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"on the top-level module is not supported \(parameter 'scale'\)"):
        library.get_peft_model(own, library.LoraConfig(target_parameters=["scale"]))
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    for name, options in (("BOFTConfig", {"boft_block_size": 4}), ("HRAConfig", {"r": 4}), ("HiraConfig", {"r": 4})):
        with pytest.raises(NotImplementedError, match=r"does not support .* layers with groups > 1"):
            library.get_peft_model(grouped, getattr(library, name)(target_modules=["0"], **options))
    mamba = nn.Sequential(nn.ModuleDict({"in_proj": nn.Linear(4, 4), "out_proj": nn.Linear(4, 4)}))
    mamba.config = {"model_type": "falcon_mamba"}
    if library is fastpeft:  # PEFT knows configurations as objects alone
        with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
            library.get_peft_model(mamba, library.LoraConfig(target_modules=["in_proj", "out_proj"]))
        library.get_peft_model(mamba, library.LoraConfig(target_modules=["in_proj"]))
    for options in ({"init_lora_weights": "gaussian"}, {"use_dora": True}):
        with pytest.raises(ValueError, match="The argument lora_bias=True is"):
            library.LoraConfig(lora_bias=True, **options)
    for options, name in (({"use_dora": True}, "DoRA"), ({"loftq_config": {"loftq_bits": 4}}, "LOFTQ")):
        with pytest.raises(ValueError, match=f"ADALORA does not support {name}"):
            library.AdaLoraConfig(total_step=1, init_lora_weights="loftq" if name == "LOFTQ" else True, **options)
    with pytest.raises(TypeError, match="must be a list of strings or None"):
        library.LoraConfig(target_parameters="up.weight")


@pytest.mark.parametrize("library", [fastpeft, peft])
@pytest.mark.parametrize("config", ["LoraConfig", "VBLoRAConfig"])
def test_modules_that_transformers_moved_since(library: Any, config: str, tmp_path: Path) -> None:
    class Moved(nn.Module):
        _checkpoint_conversion_mapping: ClassVar[Any] = {"^(up|down)": r"inner.\1", "^inner": "none"}

        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids)  # type: ignore[no-any-return]

    sizes = {"num_vectors": 4, "vector_length": 8, "r": 2} if config == "VBLoRAConfig" else {"init_lora_weights": False}
    saved = library.get_peft_model(Net(), getattr(library, config)(target_modules=BOTH, **sizes)).eval()
    saved.save_pretrained(tmp_path)
    torch.testing.assert_close(library.PeftModel.from_pretrained(Moved(), tmp_path)(IDS), saved(IDS), atol=0, rtol=0)
