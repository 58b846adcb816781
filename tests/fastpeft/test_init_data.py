"""Initialisations that look at data, gradients or quantisation errors: EVA, CorDA, LoRA-GA and LoftQ."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
import runpy
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastpeft
import peft
import peft.utils.loftq_utils
import pytest
import torch
from fastpeft.methods.lora.start.loftq import quantised
from fastpeft.recipes.corda import components
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("init_tools.py")))
X, model, wrap, train, tensors = (tools[name] for name in ("X", "model", "wrap", "train", "tensors"))
assert_same, assert_matches, assert_near = (tools[name] for name in ("assert_same", "assert_matches", "assert_near"))
bnb, nf4 = tools["bnb"], tools["nf4"]
of_models = runpy.run_path(str(Path(__file__).with_name("model_tools.py")))
SMALL, llama = of_models["SMALL"], of_models["llama"]
LIBRARIES = (fastpeft, peft)


def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


# CorDA


def corda(library: Any, base: nn.Module, prepare: Any = None, dora: bool = False, **options: Any) -> Any:
    config = library.LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights="corda", use_dora=dora,
                                corda_config=CORDA[library](**options))  # fmt: skip

    def run() -> None:
        for part in X.split(3):
            base(part)

    (prepare or PREPARE[library])(base, config, run)
    return library.get_peft_model(base, config)


CORDA = {fastpeft: fastpeft.CordaConfig, peft: peft.tuners.lora.config.CordaConfig}


def peft_corda() -> Any:
    """PEFT's module, which wants the package attrs for no more than the standard library has."""
    stub = "attr" not in sys.modules and importlib.util.find_spec("attr") is None
    if stub:
        sys.modules["attr"] = dataclasses
    try:
        return importlib.import_module("peft.tuners.lora.corda")
    finally:
        if stub:
            del sys.modules["attr"]


PREPARE = {fastpeft: fastpeft.preprocess_corda, peft: peft_corda().preprocess_corda}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_starts_as_in_peft(method: str, transposed: bool, dora: bool) -> None:
    base = model(transposed)
    ours, theirs = (quietly(corda, lib, model(transposed), corda_method=method, dora=dora) for lib in LIBRARIES)
    got, expected = tensors(ours), tensors(theirs)
    assert got.keys() == expected.keys()
    for key in got:
        assert_near(got[key], expected[key])
    assert_matches(ours(X), base(X), copy.deepcopy(base).double()(X.double()))
    assert not hasattr(ours.base_model.model.first.base_layer, "eigens")
    assert_same(tensors(ours.unload()), tensors(base))


def test_corda_s_files_are_peft_s(tmp_path: Any) -> None:
    for writer in LIBRARIES:
        files = {name: str(tmp_path / writer.__name__ / name) for name in ("cache_file", "covariance_file")}
        made = quietly(corda, writer, model(), **files)
        for reader in LIBRARIES:
            for name, path in files.items():
                again = quietly(
                    corda, reader, model(), lambda base, config, run, r=reader: PREPARE[r](base, config), **{name: path}
                )
                got, expected = (tensors(m)["base_model.model.first.lora_A.default.weight"] for m in (again, made))
                assert_near(got, expected)


def test_corda_on_a_quantised_base() -> None:
    base = nf4()
    w = base.first.dequantize(torch.float32).clone()
    adapted = quietly(corda, fastpeft, base)
    layer = adapted.base_model.model.first
    delta = layer.get_delta_weight("default")
    assert_near(layer.base_edits["default"](w), w - delta)
    assert_matches(adapted.unload()(X), nf4()(X), nf4()(X))


def test_corda_needs_its_layers_to_run() -> None:
    config = quietly(fastpeft.LoraConfig, r=4, target_modules=["first"], init_lora_weights="corda")
    base = model()
    with pytest.raises(ValueError, match="run_model"):
        fastpeft.preprocess_corda(base, config)
    with pytest.raises(ValueError, match="did not run first"):
        fastpeft.preprocess_corda(base, config, lambda: None)
    assert not base.first._forward_hooks
    with pytest.raises(ValueError, match="zero or not finite"):
        components(torch.eye(3), torch.zeros(3, 3), 2, "ipm")
    fastpeft.preprocess_corda(base, config, lambda: base(X))
    config.r = 5
    with pytest.raises(ValueError, match="S_WC of 'first'"):
        fastpeft.get_peft_model(base, config)
    assert hasattr(base.first, "eigens")


# LoRA-GA


def lora_ga(
    library: Any, base: nn.Module, cache_file: str | None = None, step: Any = None, dora: bool = False, **options: Any
) -> Any:
    config = library.LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights="lora_ga", lora_alpha=6,
                                use_dora=dora, lora_ga_config=library.LoraGAConfig(**options))  # fmt: skip

    def run() -> None:
        for part in X.split(3):
            (base(part) - 1).square().sum().backward()

    library.preprocess_loraga(base, config, step or run, cache_file)
    torch.manual_seed(3)
    return library.get_peft_model(base, config)


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_lora_ga_starts_as_in_peft(direction: str, scale: str, dora: bool) -> None:
    base = model()
    before = tensors(base)
    ours, theirs = (
        lora_ga(lib, m, direction=direction, scale=scale, dora=dora)
        for lib, m in zip(LIBRARIES, (base, model()), strict=True)
    )
    got, expected = tensors(ours), tensors(theirs)
    assert got.keys() == expected.keys()
    for key in got:
        a, b = (got[key.replace("magnitude_vector", of)].abs() for of in "AB")  # norms of W - s B A + s B A
        growth = 1 + float((b @ a).max() / expected[key].max()) if "magnitude" in key else 1.0
        assert_near(got[key], expected[key], growth)
    layer = ours.base_model.model.first
    rest, w = layer.base_layer.weight.double(), before["first.weight"]
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double() * layer.scaling["default"]
    # Components of a vanishing gradient can be scaled up to sizes beside which W is rounded away.
    assert_no_worse((rest + b @ a).float(), w, w.double(), rest.abs() + b.abs() @ a.abs())
    assert "_peft_loraga_grad" not in vars(layer.base_layer)
    assert_same(tensors(ours.unload()), before)


def test_lora_ga_of_transposed_layers_and_its_cache(tmp_path: Any) -> None:
    """PEFT scales by the width of the input there, and its cache can be read."""
    base = model(transposed=True)
    ours = lora_ga(fastpeft, model(transposed=True), scale="unit")
    theirs = lora_ga(peft, model(transposed=True), str(tmp_path / "cache" / "peft"), scale="unit")
    cached = lora_ga(
        fastpeft, model(transposed=True), str(tmp_path / "cache" / "peft"), step=lambda: 1 / 0, scale="unit"
    )
    for key, value in tensors(theirs).items():
        assert_near(tensors(ours)[key], value)
        assert_near(tensors(cached)[key], value)
    assert_matches(ours(X), base(X), copy.deepcopy(base).double()(X.double()))


def test_lora_ga_measures_quantised_layers_too() -> None:
    """The gradient of a quantised weight is what its decoded weight would get; PEFT refuses."""
    dense = model()
    dense.first.weight.data = nf4().first.dequantize(torch.float32)
    (dense(X) - 1).square().sum().backward()
    base = nf4()
    config = fastpeft.LoraConfig(r=4, target_modules=["first"], init_lora_weights="lora_ga",
                                 lora_ga_config=fastpeft.LoraGAConfig())  # fmt: skip
    fastpeft.preprocess_loraga(base, config, lambda: (base(X) - 1).square().sum().backward())
    assert_near(base.first._peft_loraga_grad, dense.first.weight.grad)
    adapted = fastpeft.get_peft_model(base, config)
    assert "default" in adapted.base_model.model.first.base_edits


def test_lora_ga_without_a_gradient() -> None:
    base = model()
    config = fastpeft.LoraConfig(r=4, target_modules=["first"], init_lora_weights="lora_ga",
                                 lora_ga_config=fastpeft.LoraGAConfig())  # fmt: skip
    with pytest.raises(ValueError, match="preprocess_loraga"):
        fastpeft.get_peft_model(base, config)
    with pytest.raises(ZeroDivisionError):
        fastpeft.preprocess_loraga(base, config, lambda: 1 / 0)
    assert all(p.requires_grad for p in base.parameters())
    assert not base.first._forward_hooks


def test_a_loaded_lora_ga_says_that_the_base_is_missing(tmp_path: Any) -> None:
    adapted = lora_ga(fastpeft, model())
    adapted.save_pretrained(tmp_path)
    with pytest.warns(fastpeft.PeftWarning, match="residual base"):
        loaded = fastpeft.PeftModel.from_pretrained(residual(adapted), tmp_path)
    assert_matches(loaded(X), adapted(X), copy.deepcopy(adapted).double()(X.double()))


def residual(adapted: Any) -> nn.Module:
    base = model()
    for name in ("first", "second"):
        getattr(base, name).weight.data = getattr(adapted.base_model.model, name).base_layer.weight.data.clone()
    return base


# LoftQ


def on_the_cpu() -> Any:
    """PEFT's LoftQ, which runs on CUDA only, made to run here."""
    source = inspect.getsource(peft.utils.loftq_utils).replace('else "cuda"', 'else "cpu"')
    module = types.ModuleType("loftq_on_the_cpu")
    exec(compile(source, "loftq_on_the_cpu", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_is_closer_than_quantising_and_as_in_peft(bits: int, iterations: int) -> None:
    base = model()
    w = base.first.weight.detach().clone()
    adapted = wrap(fastpeft, base, init_lora_weights="loftq", lora_alpha=4,
                   loftq_config=fastpeft.LoftQConfig(bits, iterations))  # fmt: skip
    layer = adapted.base_model.model.first
    q, a, b = layer.base_layer.weight.detach(), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    error = (q + b @ a - w).norm()
    assert error < (quantised(w, bits) - w).norm()
    if bits == 4:
        theirs, their_a, their_b = on_the_cpu().loftq_init(w, bits, 4, iterations)
        assert_near(q, theirs)
        assert_near(b @ a, their_b @ their_a)
    assert_same_bits(adapted.unload().first.weight.detach(), w)


def test_loftq_needs_a_dense_weight_but_loads_on_any() -> None:
    with pytest.raises(ValueError, match="replace_lora_weights_loftq"):
        wrap(fastpeft, nf4(), init_lora_weights="loftq", loftq_config={"loftq_bits": 4})


@pytest.mark.parametrize("make", [nf4, lambda: bnb("4bit")], ids=["nf4", "bnb"])
def test_replacing_weights_of_a_quantised_model(make: Any, tmp_path: Any) -> None:
    save_file(model().state_dict(), tmp_path / "model.safetensors")
    adapted = wrap(fastpeft, make(), lora_alpha=4)
    layer = adapted.base_model.model.first
    before = [layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()]
    seen = []
    fastpeft.replace_lora_weights_loftq(adapted, str(tmp_path), callback=lambda m, name: seen.append((m, name)))
    assert seen == [(adapted, "first")]
    assert_same_bits(layer.lora_A["default"].weight.detach(), before[0])
    assert_same_bits(layer.lora_B["default"].weight.detach(), before[1])
    fastpeft.replace_lora_weights_loftq(adapted, str(tmp_path / "model.safetensors"))
    w, q = model().first.weight.detach(), layer.base.read()[0]
    u, s, vh = torch.linalg.svd(w - q)
    assert_near(layer.get_delta_weight("default"), u[:, :4] * s[:4] @ vh[:4])


def test_replacing_reads_sharded_files_and_stays_in_their_folder(tmp_path: Any) -> None:
    adapted = wrap(fastpeft, nf4())
    with pytest.raises(FileNotFoundError):
        fastpeft.replace_lora_weights_loftq(adapted, str(tmp_path))
    with pytest.raises(ValueError, match="model_path"):
        fastpeft.replace_lora_weights_loftq(adapted)
    save_file({"first.weight": model().first.weight.detach()}, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"first.weight": "a.safetensors"}}')
    fastpeft.replace_lora_weights_loftq(adapted, str(tmp_path))
    assert adapted.base_model.model.first.lora_B["default"].weight.abs().sum() > 0
    index.write_text('{"weight_map": {"first.weight": "../a.safetensors"}}')
    with pytest.raises(ValueError, match="leaves its folder"):
        fastpeft.replace_lora_weights_loftq(adapted, str(tmp_path))
    with pytest.raises(ValueError, match="no quantised layer"):
        fastpeft.replace_lora_weights_loftq(wrap(fastpeft, model()), str(tmp_path))


# EVA


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        ids = torch.randint(0, SMALL["vocab_size"], (8, 9), generator=generator)
        labels = torch.where(torch.arange(9) < 2, -100, ids)
        made.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return made


def eva(library: Any, dora: bool = False, **options: Any) -> Any:
    torch.manual_seed(1)
    # PEFT whitens what layers with the same inputs share once for each of them.
    shared = [] if options.get("whiten") else ["k_proj"]
    config = library.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj", *shared],
                                init_lora_weights="eva", eva_config=library.EvaConfig(**options),
                                use_dora=dora)  # fmt: skip
    return library.get_peft_model(llama(), config)


@pytest.mark.parametrize("options", [
    {}, {"rho": 1.0}, {"whiten": True, "tau": 0.9}, {"use_label_mask": False}, {"rho": 4.0, "dora": True},
    {"rho": 4.0, "adjust_scaling_factors": False},
], ids=str)  # fmt: skip
def test_eva_s_components_ranks_and_scalings_are_peft_s(options: dict[str, Any]) -> None:
    ours, theirs = eva(fastpeft, **options), eva(peft, **options)
    found = fastpeft.get_eva_state_dict(ours, batches(), show_progress_bar=False)
    expected = peft.get_eva_state_dict(theirs, batches(), show_progress_bar=False)
    assert found.keys() == expected.keys()
    for key in found:
        assert found[key].shape == expected[key].shape
        assert_near(found[key], expected[key])
    fastpeft.initialize_lora_eva_weights(ours, eva_state_dict=dict(expected))
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=dict(expected))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert_near(ours.state_dict()[key], value)
    a, b = ours.peft_config["default"], theirs.peft_config["default"]
    for name, layer in theirs.named_modules():
        if hasattr(layer, "lora_A"):
            mine = ours.get_submodule(name)
            assert mine.scaling == layer.scaling
            assert mine.r == layer.r
    assert a.rank_pattern == b.rank_pattern
    assert a.alpha_pattern == b.alpha_pattern
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trained[0] == trained[1]
    assert not any(m._forward_hooks for m in ours.modules())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_eva_saves_and_loads_with_its_ranks(dora: bool, tmp_path: Any) -> None:
    adapted = eva(fastpeft, rho=4.0, dora=dora)
    before = adapted(input_ids=batches()[0]["input_ids"]).logits
    fastpeft.initialize_lora_eva_weights(adapted, batches(), show_progress_bar=False)
    ids = batches()[0]["input_ids"]
    assert_same_bits(adapted(input_ids=ids).logits.detach(), before.detach())  # B is zero
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    adapted.save_pretrained(tmp_path)
    for library in LIBRARIES:
        loaded = library.PeftModel.from_pretrained(llama(), tmp_path)
        assert_near(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)


def test_eva_on_a_model_without_adapters_and_on_meta() -> None:
    config = fastpeft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights="eva",
                                 eva_config=fastpeft.EvaConfig())  # fmt: skip
    found = fastpeft.get_eva_state_dict(llama(), batches(), config, show_progress_bar=False)
    assert all(key.endswith(("q_proj", "down_proj")) for key in found)
    adapted = fastpeft.get_peft_model(llama(), config, low_cpu_mem_usage=True)
    fastpeft.initialize_lora_eva_weights(adapted, eva_state_dict=found)
    assert not any(p.is_meta for p in adapted.parameters())
    key = next(k for k in found if len(found[k]))
    assert_near(adapted.base_model.model.get_submodule(key).lora_A["default"].weight, found[key].float())


def test_eva_s_errors_change_nothing() -> None:
    adapted = eva(fastpeft)
    before = tensors(adapted)
    with pytest.raises(ValueError, match="dataloader is empty"):
        fastpeft.initialize_lora_eva_weights(adapted, [])
    with pytest.raises(ValueError, match="dataloader is required"):
        fastpeft.initialize_lora_eva_weights(adapted)
    with pytest.raises(ValueError, match="expected"):
        fastpeft.initialize_lora_eva_weights(
            adapted, eva_state_dict={"base_model.model.model.layers.0.self_attn.q_proj": torch.ones(2, 5)}
        )
    with pytest.raises(ValueError, match="not adapted"):
        fastpeft.get_eva_state_dict(adapted, batches(), prepare_layer_inputs_fn={"other": lambda *a: a[0]})
    few = [{key: value[:1, :3] for key, value in batch.items()} for batch in batches()]
    with pytest.raises(ValueError, match="lower r or rho"):
        quietly(fastpeft.get_eva_state_dict, adapted, few, show_progress_bar=False)
    assert_same(tensors(adapted), before)
    assert not any(m._forward_hooks for m in adapted.modules())
    with pytest.raises(ValueError, match="init_lora_weights='eva'"):
        fastpeft.initialize_lora_eva_weights(wrap(fastpeft, model()), [1])
