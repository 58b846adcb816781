"""Methods on bases of other quantisers beside PEFT's own layers on the same base.

The adapter is PEFT's: ours takes its file. Exact is PEFT in float64 on the weight that the base stands for; our output
and gradients are no further from it than PEFT's on the quantised layer.
"""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastpeft
import peft
import pytest
import torch
from peft.tuners.adalora.gptq import SVDQuantLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn

from peft_kernels.testing import assert_no_worse, assert_same_bits

pytestmark = pytest.mark.ecosystem
_HERE = Path(__file__).parent
owners, tools, kinds = (runpy.run_path(str(_HERE / f"{n}_tools.py")) for n in ("owners", "peft", "kind"))
LAYERS, K, N = owners["LAYERS"], owners["K"], owners["N"]
assert_as_good, randomise = tools["assert_as_good"], tools["randomise"]
EXAMPLES = {str(kind): kind for kind in kinds["examples"]()}

# Examples of `fastpeft.methods` that PEFT has a layer for, by the owner of the base. BD-LoRA, QA-LoRA (but on GPTQ) and
# KaSA on these it takes for a plain LoRA; C3A's gradient to x is wrong in PEFT, UniLoRA's scales on int8 become int8.
SHARED = "BOFT-0 BOFT-1 BOFT-2 OFT-0 OFT-1 OFT-2 OFT-3 Vera-0 Miss-0 Miss-1 Miss-3"
LORA = "Lora-0 Lora-1 Lora-3"
DENSE = ("Beft-0 C3A-1 C3A-2 FourierFT-0 FourierFT-1 Gralora-0 Gralora-1 IA3-0 IA3-1 Lily-0 Lily-1 LoHa-0 LoHa-1 "
         "LoHa-2 LoKr-0 LoKr-1 LoKr-2 LoKr-3 Pvera-0 Pvera-1 RandLora-0 RandLora-1 RandLora-2 Road-0 Road-2 Shira-0 "
         "Shira-1 VBLoRA-0 VBLoRA-1 WaveFT-0 WaveFT-1 WaveFT-2 WaveFT-3 WaveFT-4 AdaLora-0 AdaLora-1 Dora-8 Dora-9 "
         "_Bat-2 Vera-1 Deft-2 Deft-3")  # fmt: skip
HAS = {
    "gptq": f"{LORA} Lora-2 {SHARED} Shira-0 Shira-1", "awq": f"{LORA} Lora-2 {SHARED}",
    "hqq": f"{LORA} Dora-8 Dora-9 {SHARED} _Bat-2 Vera-1", "aqlm": f"{LORA} Lora-2 {SHARED} Vera-1",
    "torchao": f"{LORA} {SHARED} {DENSE} Velora-15 BdLora-5 BdLora-6 UniLora-0 UniLora-1",
    "bnb": f"{LORA} Lora-2 {SHARED} {DENSE} Deft-0 Deft-1 Hira-0 Hira-1 HRA-0 HRA-1 HRA-2 HRA-3 Peanut-0 Peanut-1",
}  # fmt: skip
CASES = [(base, name) for base in LAYERS for name in HAS[base.split("-")[0]].split()]


@pytest.fixture(autouse=True)
def _needs(request: pytest.FixtureRequest) -> None:
    base = getattr(request.node, "callspec", None) and request.node.callspec.params.get("base", "")
    if base in ("gptq", "awq") or str(base).startswith("gptq-"):
        pytest.importorskip("optimum", reason="PEFT asks for optimum where gptqmodel is")
    if base == "aqlm":
        pytest.importorskip("numba", reason="aqlm's own product needs numba")


def adapted(library: Any, base: nn.Module, kind: Any) -> Any:
    torch.manual_seed(1)
    model: Any = nn.Sequential()
    model.add_module("layer", base)
    model.add_module("out", nn.Identity())
    model.out.register_parameter("w", nn.Parameter(torch.zeros(1), requires_grad=False))  # PEFT asks for its device
    model.is_loaded_in_8bit = type(base).__name__ == "Linear8bitLt"
    # of transformers' torchao quantizer; called in a merge
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(get_apply_tensor_subclass=dict))
    config = getattr(library, type(kind.config()).__name__)(**{**kind.values, "target_modules": ["layer"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(model, config).eval()


def dense_of(module: Any, wanted: Tensor) -> nn.Linear:
    """The base in float64: what PEFT adapts to be exact."""
    bias = getattr(module, "bias", None)
    dense = nn.Linear(K, N, bias=bias is not None, dtype=torch.float64)
    dense.weight.data = wanted.double()
    if bias is not None:
        dense.bias.data = bias.detach().double()
    return dense


def results(
    call: Callable[[Tensor], Tensor], x: Tensor, named: dict[str, Tensor], grads: bool = True
) -> dict[str, Tensor]:
    """The output, and gradients to x and to what trains, by name."""
    if not grads:
        with torch.no_grad():
            return {"y": call(x)}
    x = x.clone().requires_grad_()
    torch.manual_seed(4)
    y = call(x)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{n: t.grad for n, t in named.items() if t.grad is not None}}  # type: ignore[dict-item]


def check(ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    shared = [name for name in exact if name in theirs]
    assert "y" in shared
    assert set(shared) <= set(ours)
    assert_as_good(*([found[name] for name in shared] for found in (ours, theirs, exact)))


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad and "default" in name}


@pytest.mark.parametrize(("base", "name"), CASES)
def test_outputs_and_gradients_are_no_worse_than_pefts(base: str, name: str) -> None:
    kind = EXAMPLES[name]
    module, wanted = LAYERS[base]()
    theirs, ours = adapted(peft, module, kind), adapted(fastpeft, LAYERS[base]()[0], kind)
    assert type(theirs.base_model.model.layer).__module__.startswith("peft.tuners.")
    randomise(theirs)
    state = peft.get_peft_model_state_dict(theirs)
    fastpeft.set_peft_model_state_dict(ours, state)
    exact = adapted(peft, dense_of(module, wanted), kind).double()
    buffers = dict(exact.named_buffers())
    for key, value in theirs.named_buffers():  # drawn from seeds, in float32
        if key in buffers:
            buffers[key].data = value.double() if value.is_floating_point() else value
    peft.set_peft_model_state_dict(exact, state)
    x = torch.randn(3, K)
    grads = base != "aqlm"  # PEFT adds to the product of aqlm's 8-bit kernel in place, which autograd refuses
    check(results(ours, x, trained(ours), grads), results(theirs, x, trained(theirs), grads),
          results(exact, x.double(), trained(exact), grads))  # fmt: skip


@pytest.mark.parametrize(("base", "name"), [(base, name) for base, name in CASES if name in LORA.split()])
def test_the_same_seed_starts_the_same_adapter(base: str, name: str) -> None:
    """On GPTQ's and AWQ's layers PEFT rounds it to float16, the dtype that gptqmodel gives for a `weight` or for W."""
    models = (adapted(library, LAYERS[base]()[0], EXAMPLES[name]) for library in (fastpeft, peft))
    ours, theirs = (fastpeft.get_peft_model_state_dict(model) if i == 0 else peft.get_peft_model_state_dict(model)
                    for i, model in enumerate(models))  # fmt: skip
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert_same_bits(ours[key].half().float() if base.startswith("gptq") else ours[key], value)


@pytest.mark.parametrize("base", [name for name in LAYERS if name.startswith("gptq")])
def test_adalora_on_gptq_is_no_worse_than_pefts_svd_quant_linear(base: str) -> None:
    kind = EXAMPLES["AdaLora-0"]
    module, wanted = LAYERS[base]()
    ours, exact = adapted(fastpeft, LAYERS[base]()[0], kind), adapted(peft, dense_of(module, wanted), kind).double()
    config = peft.AdaLoraConfig(**kind.values)
    theirs = SVDQuantLinear(module, "default", config, r=config.init_r, lora_alpha=config.lora_alpha)
    assert ours.base_model.model.layer.lora_E["default"].shape == theirs.lora_E["default"].shape
    randomise(theirs)
    ours_layer, exact_layer = ours.base_model.model.layer, exact.base_model.model.layer
    for layer in (ours_layer, exact_layer):
        for key in ("lora_A", "lora_B", "lora_E", "ranknum"):
            getattr(layer, key)["default"].data.copy_(getattr(theirs, key)["default"].data)
    x = torch.randn(3, K)
    found = [results(call, x.to(dtype), {key: getattr(layer, key)["default"] for key in ("lora_A", "lora_B", "lora_E")})
             for call, layer, dtype in ((ours, ours_layer, x.dtype), (theirs, theirs, x.dtype),
                                        (exact, exact_layer, torch.float64))]  # fmt: skip
    check(*found)


@pytest.mark.parametrize("base", [name for name in LAYERS if name.startswith("gptq")])
def test_qalora_on_gptq_is_no_worse_than_pefts(base: str) -> None:
    kind = EXAMPLES["QaLora-13"]
    module, wanted = LAYERS[base]()
    ours = adapted(fastpeft, LAYERS[base]()[0], kind)
    theirs, exact = (GPTQLoraLinear(inner, "default", peft.LoraConfig(**kind.values), r=kind.values["r"])
                     for inner in (module, dense_of(module, wanted)))  # fmt: skip
    exact = exact.double()
    randomise(theirs)
    ours_layer = ours.base_model.model.layer
    ours_layer.scaling["default"] = theirs.scaling["default"]
    for layer in (ours_layer, exact):
        for key in ("lora_A", "lora_B"):
            getattr(layer, key)["default"].weight.data.copy_(getattr(theirs, key)["default"].weight.data)
    x = torch.randn(3, K)
    found = [results(call, x.to(dtype), {key: getattr(layer, key)["default"].weight for key in ("lora_A", "lora_B")})
             for call, layer, dtype in ((ours, ours_layer, x.dtype), (theirs, theirs, x.dtype),
                                        (exact, exact, torch.float64))]  # fmt: skip
    check(*found)


@pytest.mark.parametrize("base", LAYERS)
def test_backends_of_quantisers_are_named_as_pefts_and_read_what_theirs_do(base: str) -> None:
    module, wanted = LAYERS[base]()
    theirs = peft.utils.resolve_quantization_backend(module, get_apply_tensor_subclass=dict)
    ours = fastpeft.utils.resolve_quantization_backend(module)
    # AWQ's class is one of GPTQ's base class, which PEFT asks for first
    assert ours.backend_name == ("awq" if base == "awq" else theirs.backend_name)  # type: ignore[union-attr]
    if theirs.supports_merge:
        read = theirs.get_base_weight(module).float()
        found = ours.get_base_weight(module)  # type: ignore[union-attr]
        assert_no_worse(found, read, wanted.double(), wanted.double().abs().max().expand_as(wanted))


@pytest.mark.parametrize("base", LAYERS)
def test_pefts_loftq_is_refused_in_words(base: str) -> None:
    """PEFT's fails for want of a `weight`, a CUDA device or a dtype."""
    options: dict[str, Any] = {"init_lora_weights": "loftq", "target_modules": ["0"]}
    ours = fastpeft.LoraConfig(**options, loftq_config={"loftq_bits": 4})
    theirs = peft.LoraConfig(**options, loftq_config=peft.LoftQConfig(loftq_bits=4))
    with pytest.raises(ValueError, match="replace_lora_weights_loftq"):
        fastpeft.get_peft_model(nn.Sequential(LAYERS[base]()[0]), ours)
    with pytest.raises((AttributeError, AssertionError, ValueError, TypeError)):
        peft.get_peft_model(nn.Sequential(LAYERS[base]()[0], nn.LayerNorm(N)), theirs)
