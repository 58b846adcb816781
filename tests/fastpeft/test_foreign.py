"""Base layers of other quantisers: stand-ins with the packages' attributes. test_ecosystem_foreign.py has the real."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft import LoraConfig, PeftWarning, get_peft_model
from fastpeft.compat.quantization import QuantizationBackend, resolve_quantization_backend
from fastpeft.layer.layer import AdapterLayer
from fastpeft.testing import add_adapter, assert_forward_law, assert_merge_and_back
from fastpeft.weights.find import weight_of
from forms import matrix
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_kernels import QuantWeight
from peft_kernels.testing import assert_no_worse, assert_same_bits


def _tools(name: str) -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).with_name(name)))


foreign, kinds = _tools("foreign_tools.py"), _tools("kind_tools.py")
STAND_INS, gptq, hqq, awq, te, named = (foreign[n] for n in ("STAND_INS", "gptq", "hqq", "awq", "te", "named"))
LEFT_OUT = (
    "Kasa-10",  # it edits the base, which most of these cannot store
    "QaLora-14",  # groups of 12 do not divide 64 columns
    "BOFT-3",  # blocks of 3 do not divide 64 columns
    "Road-1",  # groups of 10 do not divide 32 rows
)
EXAMPLES = [kind for kind in kinds["examples"]([]) if kind.adapts("nf4") and str(kind) not in LEFT_OUT]
SHORT = ("Lora-0", "Dora-8", "QaLora-13", "AdaLora-0", "Vera-0", "OFT-0", "IA3-0", "LoHa-0", "Miss-0", "HRA-0",
         "TinyLora-0")  # fmt: skip
CODED = [name for name, (*_, coded) in STAND_INS.items() if coded]
MERGING = ("hqq", "hqq-8bit")


def made(name: str) -> nn.Module:
    return STAND_INS[name][0]()  # type: ignore[no-any-return]


def adapted(base: nn.Module, **options: Any) -> Any:
    config = LoraConfig(target_modules=["0"], **{"init_lora_weights": False, "r": 4, **options})
    return get_peft_model(nn.Sequential(base), config).eval()


def product(x: Tensor, exact: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return nn.functional.linear(x.to(dtype), exact.to(dtype), None if bias is None else bias.to(dtype))


@pytest.mark.parametrize("name", STAND_INS)
def test_the_base_is_what_its_owner_says_it_is(name: str) -> None:
    module = made(name)
    exact, bias = module.exact, module.bias  # type: ignore[union-attr]
    base = weight_of(module)
    assert base is not None
    x = torch.randn(5, 64)
    size = product(x.abs(), exact.abs(), None if bias is None else bias.abs(), torch.float64)  # type: ignore[operator]
    want = product(x, exact, bias, torch.float64)  # type: ignore[arg-type]
    assert_no_worse(base.call(x), product(x, exact, bias, torch.float32), want, size)  # type: ignore[arg-type]
    assert_no_worse(base.read()[0], exact.float(), exact, exact.abs().max().expand_as(exact))  # type: ignore[arg-type, operator]
    rows: Any = exact[3:9]  # type: ignore[index]
    assert_no_worse(base.rows(slice(3, 9)), rows.float(), rows, rows.abs().max().expand_as(rows))
    assert base.info().shape == (32, 64)


@pytest.mark.parametrize(
    ("base", "kind"),
    matrix([(b, k) for b in STAND_INS for k in EXAMPLES],
           lambda base, kind: base in ("gptq-act-order", "te") and str(kind) in SHORT),
    ids=str,
)
def test_every_method_keeps_the_law(base: str, kind: Any) -> None:
    layer = AdapterLayer(made(base), base)
    add_adapter(layer, "a", kind.method, kind.config())
    x = torch.randn(2, 5, 64)
    if layer.methods["a"].mergeable_in(layer.view("a"), layer.info):
        assert layer.double().eval()(x.double()).isfinite().all()
        return
    assert_forward_law(layer, ["a"], x)
    if base not in MERGING:
        with pytest.raises(ValueError, match="merged into"):
            layer.merge()


@pytest.mark.parametrize("name", MERGING)
def test_merging_requantises_by_the_owner_and_comes_back(name: str) -> None:
    model = adapted(made(name))
    layer = model.base_model.model[0]
    x = torch.randn(3, 64)
    y = model(x).detach()
    with pytest.warns(PeftWarning, match="requantising"):
        model.merge_adapter()
    assert 0 < model.base_model.merge_errors["0"] < 1
    assert_same_bits(layer.base.read()[0], weight_of(layer.base_layer).read()[0])
    model.unmerge_adapter()
    assert_same_bits(model(x).detach(), y)
    layer.set_adapter(["default"])
    assert_merge_and_back(layer, ["default"], x, y)


@pytest.mark.parametrize("name", STAND_INS)
def test_gradients_are_those_of_the_decoded_weight(name: str) -> None:
    model = adapted(made(name))
    layer = model.base_model.model[0]
    x = torch.randn(4, 64, requires_grad=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    seed = torch.randn(4, 32)
    found = torch.autograd.grad((model(x) * seed).sum(), (x, a, b))
    exact, bias, scale = layer.base_layer.exact, layer.base_layer.bias, layer.scaling["default"]

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        xs, aa, bb = (t.detach().to(dtype).requires_grad_() for t in (x, a, b))
        y = product(xs, exact, bias, dtype) + scale * (xs @ aa.t() @ bb.t())
        return torch.autograd.grad((y * seed.to(dtype)).sum(), (xs, aa, bb))

    for ours, eager, want in zip(found, gradients(torch.float32), gradients(torch.float64), strict=True):
        assert_no_worse(ours, eager, want, want.abs().max().expand_as(want))


@pytest.mark.parametrize("name", CODED)
def test_codes_are_read_by_one_kernel_call_and_the_view_is_made_once(name: str) -> None:
    layer = adapted(made(name)).base_model.model[0]
    layer(torch.randn(3, 64))
    assert layer._plan is not None
    get = layer.base.fast()
    view = get()
    assert isinstance(view, QuantWeight)
    assert get() is view
    assert layer.base.quant() is view


def test_a_view_sees_loads_replacements_and_writes() -> None:
    layer = adapted(gptq()).base_model.model[0]
    x, other = torch.randn(3, 64), gptq(seed=7)
    before = layer(x).detach()
    state = copy.deepcopy(layer.base_layer.state_dict())
    layer.base_layer.load_state_dict(other.state_dict())  # in place
    assert_same_bits(layer.base.read()[0].double(), other.exact)
    loaded = layer(x).detach()
    assert not torch.equal(loaded, before)
    layer.base_layer.load_state_dict(state, assign=True)
    assert_same_bits(layer(x).detach(), before)
    layer.base_layer.qweight = other.qweight
    assert not torch.equal(layer(x), before)
    layer.base_layer.qweight = state["qweight"]
    layer.base_layer.scales.mul_(2)
    assert not torch.equal(layer(x), before)
    layer.base_layer.scales.div_(2)
    assert_same_bits(layer(x).detach(), before)
    twin = copy.deepcopy(layer)
    layer.base_layer.scales.zero_()
    assert_same_bits(twin(x).detach(), before)


def test_hooks_on_the_base_are_called() -> None:
    base = te()
    layer, calls = adapted(base).base_model.model[0], []
    base.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(2, 64))
    assert calls == [1]


@pytest.mark.parametrize("name", STAND_INS)
def test_pefts_names_of_layers(name: str) -> None:
    lora = fastpeft.tuners.lora
    _, label, quantised, _ = STAND_INS[name]
    layer = adapted(made(name)).base_model.model[0]
    own = getattr(__import__(f"fastpeft.tuners.lora.{quantised}", fromlist=[label]), label)
    assert isinstance(layer, own)
    assert isinstance(layer, lora.LoraLayer)
    assert isinstance(layer, lora.Linear) is (quantised in ("torchao", "inc"))
    others = {n: shown for n, (_, shown, q, _) in STAND_INS.items() if q != quantised}
    assert not any(isinstance(layer, getattr(lora, other)) for other in others.values())
    assert repr(layer).startswith(f"lora.{label}(")
    assert layer.quantization_backend == quantised
    backend = resolve_quantization_backend(made(name))
    assert isinstance(backend, QuantizationBackend)
    assert backend.backend_name == quantised
    assert backend.supports_merge is (quantised == "hqq")
    exact: Any = made(name).exact
    assert_no_worse(backend.get_base_weight(made(name)), exact.float(), exact, exact.abs().max().expand_as(exact))
    if not backend.supports_merge:
        with pytest.raises(TypeError, match="not supported"):
            backend.set_base_weight(layer, torch.zeros(32, 64))
    else:
        wanted = torch.randn(32, 64)
        backend.set_base_weight(layer, wanted)
        assert not torch.equal(layer.base.read()[0].double(), made(name).exact)  # type: ignore[arg-type]


def test_adalora_on_gptq_is_pefts_svd_quant_linear() -> None:
    from fastpeft.tuners.adalora.gptq import SVDQuantLinear

    config = fastpeft.AdaLoraConfig(target_modules=["0"], total_step=10)
    layer = get_peft_model(nn.Sequential(gptq()), config).base_model.model[0]
    assert isinstance(layer, SVDQuantLinear)
    assert not isinstance(adapted(gptq()).base_model.model[0], SVDQuantLinear)


def test_qalora_acts_on_gptq() -> None:
    layer = adapted(gptq(), use_qalora=True, qalora_group_size=16).base_model.model[0]
    assert layer.lora_A["default"].weight.shape == (4, 4)
    x = torch.randn(3, 64)
    added = layer.get_delta_weight("default")
    exact = product(x, layer.base_layer.exact + added.double(), layer.base_layer.bias, torch.float64)
    eager = product(x, layer.base_layer.exact + added.double(), layer.base_layer.bias, torch.float32)
    assert_no_worse(layer(x).detach(), eager.detach(), exact.detach(), exact.detach().abs().max().expand_as(exact))


def test_tinylora_decomposes_a_weight_again_when_any_of_its_tensors_changed() -> None:
    model = get_peft_model(nn.Sequential(gptq()), fastpeft.TinyLoraConfig(target_modules=["0"], u=4))
    layer = model.base_model.model[0]

    def added(name: str) -> Tensor:
        model.add_adapter(name, fastpeft.TinyLoraConfig(target_modules=["0"], u=4))
        return layer.tinylora_A[name]  # type: ignore[no-any-return]

    first = layer.tinylora_A["default"]
    assert_same_bits(added("same"), first)
    base = layer.base_layer
    base.scales.mul_(2)
    written = added("written")
    assert not torch.equal(written, first)
    base.scales = base.scales / 2
    assert_same_bits(added("replaced"), first)
    base.qweight = gptq(seed=7).qweight
    assert not torch.equal(added("other"), first)


def test_saved_keys_are_those_of_a_dense_base(tmp_path: Path) -> None:
    dense = adapted(nn.Linear(64, 32))
    for name in STAND_INS:
        model = adapted(made(name))
        state = fastpeft.get_peft_model_state_dict(model)
        assert list(state) == list(fastpeft.get_peft_model_state_dict(dense))
        model.save_pretrained(tmp_path / name)
        again = fastpeft.PeftModel.from_pretrained(nn.Sequential(made(name)), tmp_path / name)
        x = torch.randn(2, 64)
        assert_same_bits(again.eval()(x).detach(), model(x).detach())


def test_a_layer_that_normalises_has_no_weight_for_methods_that_change_it() -> None:
    module: Any = named("transformer_engine.pytorch.module.layernorm_linear", "LayerNormLinear")()
    module.weight, module.in_features, module.out_features = nn.Parameter(torch.randn(32, 64)), 64, 32
    base = weight_of(module)
    assert base is not None
    with pytest.raises(ValueError, match="normalises its input"):
        base.read()


@pytest.mark.parametrize("awq_of", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_read_by_its_forward_is_not_rounded_by_its_bias(dtype: torch.dtype, awq_of: bool) -> None:
    """W and a bias a thousand times as large, in one sum of the layer's dtype."""
    base: Any = named("gptqmodel.nn_modules.qlinear", "AWQuantLinear" if awq_of else "BaseQuantLinear")
    module: Any = named("gptqmodel.nn_modules.qlinear.marlin", "MarlinLinear", foreign["_Own"], base)()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (32, 64), generator=generator) - 2  # of 2 bits
    module.exact, module.in_features, module.out_features, module.bits = codes.double() / 256, 64, 32, 2
    module.register_buffer("scales", torch.ones(1, dtype=dtype))
    module.register_buffer("bias", torch.randn(32, generator=generator).to(dtype))
    found = weight_of(module)
    assert type(found).__name__ == ("AwqOpaqueWeight" if awq_of else "GptqOpaqueWeight")
    assert found is not None
    assert found.dtype is dtype
    eye = torch.eye(64, dtype=dtype)
    unscaled = (module(eye).float() - module.bias.float()).t()
    exact = module.exact
    error = (found.read()[0].double() - exact).abs().max()
    assert error < (unscaled.double() - exact).abs().max() / 32
    # what a product of the layer itself is rounded to: its sum with the bias, in its dtype
    size = 1 + exact.abs() + module.bias.double().abs().unsqueeze(1) / 256
    assert_no_worse(found.read()[0].to(dtype), exact.to(dtype), exact, size)


def test_settings_of_quantised_models() -> None:
    model = nn.Module()
    assert fastpeft.utils.get_quantization_config(model, "gptq") is None
    assert fastpeft.utils.get_quantization_kwargs(model) == {}
    model.config, model.quantization_method = nn.Module(), "gptq"
    model.config.quantization_config = "settings"
    assert fastpeft.utils.get_quantization_config(model, "gptq") == "settings"
    assert fastpeft.utils.get_quantization_config(model, "awq") is None
    assert fastpeft.utils.get_gptqmodel_quant_linear(None) is None
    assert resolve_quantization_backend(nn.Linear(2, 2)) is None


def test_adapters_on_awq_are_not_rounded_to_the_dtype_of_its_weight() -> None:
    """gptqmodel's layers have a `compute_dtype`, float16, which is W's: x and the adapter are float32, as in PEFT."""
    module: Any = awq()
    module.compute_dtype = torch.float16
    model = adapted(module)
    layer, x = model.base_model.model[0], torch.randn(5, 64, requires_grad=True)
    a, b, seed = layer.lora_A["default"].weight, layer.lora_B["default"].weight, torch.randn(5, 32)
    found = [y := model(x), *torch.autograd.grad((y * seed).sum(), (x, a, b))]

    def results(dtype: torch.dtype) -> list[Tensor]:
        xs, aa, bb = (t.detach().to(dtype).requires_grad_() for t in (x, a, b))
        y = product(xs, module.exact, None, dtype) + layer.scaling["default"] * (xs @ aa.t() @ bb.t())
        return [y, *torch.autograd.grad((y * seed.to(dtype)).sum(), (xs, aa, bb))]

    for ours, eager, want in zip(found, results(torch.float32), results(torch.float64), strict=True):
        assert_no_worse(ours, eager, want, want.detach().abs().max().expand_as(want))


def test_gptqs_own_decoding_is_read_where_the_kernel_leaves_the_codes_as_they_were() -> None:
    base: Any = named("gptqmodel.nn_modules.qlinear", "BaseQuantLinear")
    module: Any = named("gptqmodel.nn_modules.qlinear.torch", "TorchLinear", foreign["_Own"], base)()
    codes = torch.randint(-2, 2, (32, 64), generator=torch.Generator().manual_seed(0))
    module.exact, module.in_features, module.out_features, module.bits = codes.double() / 256, 64, 32, 2
    module.register_buffer("scales", torch.ones(1, dtype=torch.float16))
    module.register_buffer("bias", torch.full((32,), 1000.0).half())
    module.dequantize_weight = lambda: module.exact.half().t()
    found = weight_of(module)
    assert found is not None
    assert_same_bits(found.read()[0], module.exact.float())


@pytest.mark.parametrize("name", ["gptq", "hqq", "eetq"])
def test_loftq_starts_from_what_any_quantiser_lost(name: str, tmp_path: Path) -> None:
    module: Any = made(name)
    generator = torch.Generator().manual_seed(0)
    lost = 0.01 * torch.randn(32, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    w = (module.exact + lost).float()
    save_file({"0.weight": w.contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="replace_lora_weights_loftq"):
        adapted(made(name), init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    model = adapted(module, lora_alpha=4)  # as in PEFT, B A is that start whatever it is scaled by
    fastpeft.replace_lora_weights_loftq(model, str(tmp_path))
    delta = model.base_model.model[0].get_delta_weight("default")
    size = w.abs().max().expand_as(w) * len(w)  # of the terms of a singular value decomposition
    assert_no_worse(delta.detach(), w - module.exact.float(), lost.double(), size)
