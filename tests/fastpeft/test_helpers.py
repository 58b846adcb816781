"""`fastpeft.helpers` and the reduction of intruder dimensions, against PEFT's."""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path
from typing import Any

import fastpeft
import fastpeft.helpers
import fastpeft.tuners.lora.intruders
import fastpeft.utils.incremental_pca
import fastpeft.utils.integrations
import peft
import peft.helpers
import peft.utils.incremental_pca
import peft.utils.integrations
import pytest
import torch
from torch import nn

pytest.importorskip("peft.tuners.lora.intruders", reason="PEFT before 0.19 has none")
tools = runpy.run_path(str(Path(__file__).with_name("init_tools.py")))
X, model, wrap, tensors, nf4 = (tools[name] for name in ("X", "model", "wrap", "tensors", "nf4"))
assert_near = tools["assert_near"]
LIBRARIES = (fastpeft, peft)
PCA = fastpeft.utils.incremental_pca.IncrementalPCA, peft.utils.incremental_pca.IncrementalPCA


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(12, 10 + i) for i in range(5))
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = nn.Parameter(torch.randn(3, 6, 8))
        self.mlp.down_proj = nn.Parameter(torch.randn(3, 8, 40))
        self.mlp.other = nn.Parameter(torch.randn(3, 8, 4))


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"max_dim_size_to_analyze": 12},
                                     {"moe_param_suffixes": (".other",), "top_p": 1.0}])  # fmt: skip
def test_kappa_targets(options: dict[str, Any]) -> None:
    ours, theirs = (
        lib.helpers.find_kappa_target_modules(Experts(), show_progress=False, **options) for lib in LIBRARIES
    )
    assert ours == theirs
    assert ours["target_modules"]


@pytest.mark.parametrize("options", [{}, {"num_modules": 2}, {"threshold": 5.0}, {"top_p": 0.01}])
def test_kappa_selector(options: dict[str, Any]) -> None:
    for method in ("get_best_targets", "get_best_target_parameters"):
        ours, theirs = (
            getattr(lib.helpers.KappaTuneSelector(Experts(), show_progress=False), method)(**options)
            for lib in LIBRARIES
        )
        assert ours == theirs


def test_kappa_of_a_quantised_layer() -> None:
    selector = fastpeft.helpers.KappaTuneSelector(nf4())
    assert set(selector.get_best_targets()) == {"first", "second"}
    assert fastpeft.find_kappa_target_modules(nn.Tanh(), show_progress=False)["target_modules"] == []


def test_rescaling_is_for_the_time_being() -> None:
    ours, theirs = (wrap(lib, model(), init_lora_weights=False, lora_alpha=6) for lib in LIBRARIES)
    before = ours(X)  # makes the layers' plans
    for lib, adapted in zip(LIBRARIES, (ours, theirs), strict=True):
        held = adapted.base_model.model.first.scaling
        with lib.helpers.rescale_adapter_scale(adapted, 0.5):
            adapted.inside = adapted(X)
            assert adapted.base_model.model.first.scaling == {"default": 0.75}
            assert held == {"default": 1.5}
        assert adapted.base_model.model.first.scaling == held
    assert_near(ours.inside, theirs.inside)
    assert not torch.equal(ours.inside, before)
    assert torch.equal(ours(X), before)
    with fastpeft.helpers.rescale_adapter_scale(ours, 0.0):
        assert torch.equal(ours(X), model()(X))
    with pytest.raises(RuntimeError, match="inside"), fastpeft.helpers.rescale_adapter_scale(ours, 0.5):
        raise RuntimeError("inside")
    assert torch.equal(ours(X), before)
    with pytest.raises(TypeError, match="multiplier"), fastpeft.helpers.rescale_adapter_scale(ours, "2"):
        pass
    with pytest.raises(ValueError, match="scaling"), fastpeft.helpers.rescale_adapter_scale(model(), 2):
        pass


@pytest.mark.parametrize("options", [{}, {"n_components": 3}, {"n_components": 2, "batch_size": 10},
                                     {"n_components": 3, "lowrank": True, "lowrank_seed": 7}])  # fmt: skip
def test_principal_components_of_batches(options: dict[str, Any]) -> None:
    rows = torch.randn(45, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    ours, theirs = (IncrementalPCA(**options).fit(rows) for IncrementalPCA in PCA)
    for name in ("components_", "singular_values_", "explained_variance_", "explained_variance_ratio_", "mean_", "var_",
                 "noise_variance_"):  # fmt: skip
        assert_near(getattr(ours, name), getattr(theirs, name))
    assert_near(ours.transform(rows), theirs.transform(rows))
    assert ours.partial_fit(rows[:9]).n_samples_seen_ == theirs.partial_fit(rows[:9]).n_samples_seen_
    assert_near(ours.components_, theirs.components_)
    for IncrementalPCA in PCA:
        with pytest.raises(ValueError, match="features"):
            IncrementalPCA().fit(rows).partial_fit(rows[:, :5])
        with pytest.raises(ValueError, match="n_components=7 invalid for n_features=6"):
            IncrementalPCA(7).fit(rows)
        with pytest.raises(ValueError, match="less or equal to the batch number of samples 3"):
            IncrementalPCA(4).partial_fit(rows[:3])


@pytest.mark.parametrize("library", LIBRARIES)
def test_modules_without_memory(library: Any) -> None:
    integrations = library.utils.integrations
    with integrations.init_empty_weights():
        empty = nn.BatchNorm1d(4)
        full = integrations.skip_init_on_device(model)()
        again = nn.Linear(2, 2)
    assert all(p.is_meta for p in (*empty.parameters(), *again.parameters()))
    assert not any(p.is_meta for p in full.parameters())
    assert not empty.running_mean.is_meta
    with integrations.init_empty_weights(include_buffers=True):
        assert nn.BatchNorm1d(4).running_mean.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_inputs_are_not_cast() -> None:
    """Something else casts: a hook, as diffusers' layerwise casting has."""
    adapted = wrap(fastpeft, model(), init_lora_weights=False, target_modules=["first"])
    layer = adapted.base_model.model.first
    expected = layer(X)
    seen = []
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    with torch.no_grad():
        stored = a.weight.data
        a.weight.data = stored.half()  # at rest, in a dtype that it does not compute in

        def upcast(module: nn.Module, args: Any) -> None:
            seen.append(args[0].dtype)
            module.weight.data = stored

        handle = a.register_forward_pre_hook(upcast)
        with fastpeft.helpers.disable_input_dtype_casting(adapted):
            assert_near(layer(X), expected)
        handle.remove()
    assert seen == [torch.float32]
    assert layer.cast_input_dtype_enabled
    with fastpeft.helpers.disable_input_dtype_casting(adapted, active=False):
        assert layer.cast_input_dtype_enabled
    a.half(), b.half()
    assert layer(X).dtype is torch.float32
    with pytest.raises(RuntimeError), fastpeft.helpers.disable_input_dtype_casting(adapted):
        layer(X)


def test_what_is_an_adapter(tmp_path: Any) -> None:
    wrap(fastpeft, model()).save_pretrained(tmp_path / "a")
    for lib in LIBRARIES:
        assert lib.helpers.check_if_peft_model(str(tmp_path / "a"))
        assert not lib.helpers.check_if_peft_model(str(tmp_path))


@pytest.mark.parametrize("options", [{}, {"top_k": 16, "threshold_epsilon": 0.9, "mitigation_lambda": 0.2},
                                     {"threshold_epsilon": 0.0}])  # fmt: skip
def test_intruder_dimensions(options: dict[str, Any]) -> None:
    adapters, said = [], []
    for lib in LIBRARIES:
        adapted = wrap(lib, model(), init_lora_weights=False, lora_alpha=40)
        lines: list[str] = []
        lib.tuners.lora.intruders.reduce_intruder_dimension(adapted, logging_sink=lines.append, **options)
        said.append([line.rpartition(".")[2] for line in lines])
        assert adapted.active_adapters == ["intruder_reduced"]
        adapters.append(adapted)
    assert said[0] == said[1]
    terms = X.shape[1]
    assert_near(adapters[0](X), adapters[1](X), terms)
    ours, theirs = (
        [m.base_model.model.get_submodule(n).get_delta_weight("intruder_reduced") for n in ("first", "second")]
        for m in adapters
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, terms)


def test_intruders_of_a_quantised_layer() -> None:
    adapted = wrap(fastpeft, nf4(), init_lora_weights=False, lora_alpha=40)
    fastpeft.tuners.lora.intruders.reduce_intruder_dimension(adapted, logging_sink=None)
    layer = adapted.base_model.model.first
    assert not torch.equal(layer.get_delta_weight("default"), layer.get_delta_weight("intruder_reduced"))


def test_reducing_intruders_takes_nothing_from_the_base_again() -> None:
    """PEFT makes the new adapter a PiSSA as well, which takes its part of what the first one left."""
    adapted = wrap(fastpeft, model(), init_lora_weights="pissa")
    before = tensors(adapted.base_model.model.first.base_layer)
    fastpeft.tuners.lora.intruders.reduce_intruder_dimension(adapted, logging_sink=None)
    assert torch.equal(tensors(adapted.base_model.model.first.base_layer)["weight"], before["weight"])
    with pytest.raises(ValueError, match="variant"):
        fastpeft.tuners.lora.intruders.reduce_intruder_dimension(wrap(fastpeft, model(), use_dora=True))


def test_signatures_of_the_base_model() -> None:
    ours, other = wrap(fastpeft, model()), wrap(fastpeft, model())
    expected = ours(X)
    fastpeft.helpers.update_signature(ours)
    assert list(inspect.signature(ours.forward).parameters) == ["x"]
    assert list(inspect.signature(other.forward).parameters) == ["args", "kwargs"]  # PEFT's changes the class
    assert torch.equal(ours(X), expected)
    with pytest.raises(ValueError, match="not supported"):
        fastpeft.helpers.update_signature(ours, "backward")


def test_the_trainer_s_loss_has_monteclora_s_regulariser() -> None:
    class Trainer:
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            return (torch.tensor(2.0), "outputs") if return_outputs else torch.tensor(2.0)

    class Ours(fastpeft.helpers.MontecloraTrainerMixin, Trainer):
        pass

    plain, sampled = wrap(fastpeft, model()), wrap(fastpeft, model(), monteclora_config=fastpeft.MontecloraConfig())
    assert Ours().compute_loss(plain, {}) == 2.0
    loss, outputs = Ours().compute_loss(sampled, {}, return_outputs=True)
    assert outputs == "outputs"
    assert loss == 2.0 + sampled._get_monteclora_loss() != 2.0
    with fastpeft.helpers.DoraCaching():
        fastpeft.helpers.DoraCaching()(enabled=False)
