"""`fastpeft.patch`: models that real PEFT adapted, beside themselves unpatched: every method of the golden files."""

from __future__ import annotations

import copy
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.compat.patch import hooks, patching
from fastpeft.compat.patch.classes import patched
from forms import matrix
from peft_versions import needs_case, needs_peft, peft_is
from torch import Tensor

from peft_kernels.testing import assert_no_worse

GOLDEN = Path(__file__).parents[1] / "golden"
zoo = runpy.run_path(str(GOLDEN / "zoo.py"))
unpatched = runpy.run_path(str(Path(__file__).with_name("patch_tools.py")))["unpatched"]  # of every test here
# One of each method, and of each kind of layer that LoRA goes on.
SHORT = [
    "linear", "rslora", "conv1d_gpt2", "convs", "embedding", "dora", "parameters", "attention", "ia3", "ia3_convs",
    "loha", "lokr", "vera", "oft", "oft_embedding", "boft", "hra", "road", "fourierft", "waveft", "vblora", "unilora",
    "tinylora", "randlora", "pvera", "shira", "miss", "adalora", "delora", "gralora", "glora", "hira", "psoft", "osf",
    "ln_tuning", "trainable_tokens", "trainable_tokens_with_lora", "lily", "peanut", "deft", "beft", "supertuning",
    "c3a", "frod", "loha_conv_effective", "alora_offsets", "bdlora", "velora", "kasa", "monteclora",
    "poly",
]  # fmt: skip
# Layers whose forward stays PEFT's, by case, and a part of the reason.
STAYS = {
    "dora_convs": "DoRA of", "dora_embedding": "DoRA of",
    "attention": "MultiheadAttention", "c3a": "C3A", "frod": "FRoD", "hra_gs": "Gram-Schmidt",
    "poly": "router",
    "loha_conv_effective": "Tucker",
    **dict.fromkeys(("osf", "pvera", "tinylora") if peft_is("<0.21") else (), "in another form"),
}  # fmt: skip


def load(name: str, dtype: torch.dtype = torch.float32) -> Any:
    needs_case(name)
    if zoo["CASES"][name].get("peft_type") == "ADAMSS":
        pytest.importorskip("sklearn", reason="PEFT clusters with scikit-learn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = zoo["base_model"](dtype, case=name)
        return peft.PeftModel.from_pretrained(base, GOLDEN / "peft" / name, is_trainable=True).eval()


def run(model: Any, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and the gradients by name."""
    model.zero_grad()
    y = zoo["call"](model, name)
    zoo["loss_of"](y).backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def no_worse(actual: Tensor, expected: Tensor, exact: Tensor) -> None:
    """Each element is held to PEFT's largest error in the tensor, as in test_golden.py."""
    if exact.numel():
        worst, largest = (expected.double() - exact).abs().max(), exact.abs().max().clamp(min=1.0).expand(exact.shape)
        assert_no_worse(actual, (exact + worst).to(expected.dtype), exact, 16 * largest)


@pytest.mark.parametrize("name", matrix(zoo["CASES"], SHORT))
def test_outputs_and_gradients_are_those_of_peft(name: str) -> None:
    model = load(name)
    expected, grads = run(model, name)
    double = load(name).double()
    for module in double.modules():
        if vars(module).get("dtype") is torch.float32:  # AdaMSS casts to what it was made for
            module.dtype = torch.float64
    exact, exact_grads = run(double, name)
    keys = list(model.state_dict())
    report = fastpeft.patch(model)
    y, found = run(model, name)
    no_worse(y, expected, exact)
    assert found.keys() == grads.keys()
    for key in grads:
        no_worse(found[key], grads[key], exact_grads[key])
    assert list(model.state_dict()) == keys
    reasons = [part for case, part in STAYS.items() if name.startswith(case)]
    assert all(any(part in reason for part in reasons) for reason in report.calls), report.calls
    assert report.ours > 0 or reasons


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", matrix(zoo["CASES"], ["linear", "dora", "oft", "vera", "randlora", "shira"]))
def test_half_precision_is_as_good_as_pefts(name: str, mode: str) -> None:
    exact, exact_grads = run(load(name), name)
    model = load(name, dtype=torch.bfloat16 if mode == "bfloat16" else torch.float32)

    def mixed() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            return run(model, name)

    if name.startswith("osf") and mode == "autocast":
        pytest.skip("PEFT's hook gives gradients of another dtype")
    if name == "osf_clamped" and mode == "bfloat16":
        needs_peft(">=0.19", "it multiplies bfloat16 by float32 there: RuntimeError")
    y, grads = mixed()
    fastpeft.patch(model)
    found, own = mixed()
    assert found.dtype == y.dtype
    assert own.keys() == grads.keys()
    assert distance(found, exact) <= 2 * distance(y, exact) + 0.01
    for key in own.keys() & exact_grads.keys():
        if own[key].numel() > 1:  # one number is a matter of luck
            assert distance(own[key], exact_grads[key]) <= 2 * distance(grads[key], exact_grads[key]) + 0.03


def distance(a: Tensor, exact: Tensor) -> float:
    return float((a.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-6)) if exact.numel() else 0.0


def test_an_adapter_that_a_layer_lacks_though_its_bank_is_shared() -> None:
    model = load("vblora")
    names = [n for n, m in model.named_modules() if hasattr(m, "vblora_logits_A")]
    config = copy.copy(model.peft_config["default"])
    config.target_modules = {names[0].removeprefix("base_model.model.")}
    model.add_adapter("other", config)
    model.set_adapter("other")
    expected = run(model, "vblora")
    fastpeft.patch(model)
    for a, b in zip(run(model, "vblora")[1].values(), expected[1].values(), strict=True):
        no_worse(a, b, b.double())


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 3, "apply_GS": True, "init_weights": False}], ids=str)
def test_hra_on_an_8bit_base_turns_the_weight_that_is_meant(options: dict[str, Any]) -> None:
    """PEFT multiplies int8 codes, without their scales; the exact product is that of the decoded weight in float64."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
    dense, x = torch.nn.Linear(64, 96).double(), torch.randn(20, 64)
    layer.load_state_dict(dense.float().state_dict())
    layer = layer.to("cpu")
    scales = layer.weight.SCB.double()[:, None] / 127
    dense = dense.double()
    dense.weight.data = layer.weight.data.double() * scales
    models = []
    for base in (layer, dense):
        torch.manual_seed(1)
        config = peft.HRAConfig(target_modules=["0"], **options)
        models.append(peft.get_peft_model(torch.nn.Sequential(base), config).eval())
    u, twin = (m.base_model.model[0].hra_u["default"] for m in models)
    twin.data = (u.data + 0.1 * torch.randn_like(u)).double()
    u.data = twin.data.float()
    models[1].double()
    exact = models[1](x.double())
    exact.square().sum().backward()
    assert (models[0](x) - exact).norm() > 10 * exact.norm()
    report = fastpeft.patch(models[0])
    y = models[0](x)
    y.square().sum().backward()
    assert report.ours == 1
    assert not report.calls
    assert (y - exact).norm() < 0.01 * exact.norm()  # bitsandbytes rounds inputs to 8 bits
    assert (u.grad - twin.grad).norm() < 0.02 * twin.grad.norm()


@pytest.mark.parametrize("name", ["parameters", "parameters_and_modules"])
def test_parameters_that_the_installed_peft_adapts(name: str) -> None:
    """Versions keep the experts' tensors in two shapes, and each reads its own files alone."""
    options = {k: v for k, v in zoo["CASES"][name].items() if k not in ("base", "call")}
    model = peft.get_peft_model(zoo["base_model"](case=name), peft.LoraConfig(**options)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3) if parameter.requires_grad else None
    exact = run(copy.deepcopy(model).double(), name)
    expected, report = run(model, name), fastpeft.patch(model)
    y, found = run(model, name)
    no_worse(y, expected[0], exact[0])
    for key, grad in expected[1].items():
        no_worse(found[key], grad, exact[1][key])
    form = {("lora.ParamWrapper", "this version of PEFT keeps the method's tensors in another form"): 2}
    assert dict(report.stays) == (form if peft_is("<0.19") else {})


@pytest.mark.parametrize("version", ["0.17.1", "0.22.0"])
def test_versions_of_peft_that_are_not_known(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching.importlib.metadata, "version", lambda name: version)
    for model in (load("linear"), None):
        with pytest.raises(ImportError, match=rf"0.18 to 0.21, and {version} is installed"):
            fastpeft.patch(model)
    assert not patched
    assert not isinstance(sys.meta_path[0], hooks.Hooks)
