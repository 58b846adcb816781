"""NF4Linear and quantize_model, against bitsandbytes and against files that it made."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from fastpeft.files.checks import AdapterFileError
from fastpeft.weights.bnb_keys import bnb_state, parse_bnb_state
from fastpeft.weights.nf4_linear import NF4Linear
from fastpeft.weights.quantize import dequantize_model, from_bitsandbytes, quantize_model
from safetensors.torch import load_file
from torch import nn

import peft_kernels
from peft_kernels.testing import assert_no_worse, assert_same_bits

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = [(kind, nested, block) for kind in ("nf4", "fp4") for nested in (False, True) for block in (64, 128)]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "bnb.safetensors")


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def make_layer(nested: bool = True, bias: bool = True, kind: str = "nf4", **kwargs: object) -> NF4Linear:
    weight = peft_kernels.quantize_4bit(torch.randn(24, 70), kind, 64, nested)
    return NF4Linear(weight, torch.randn(24) if bias else None, **kwargs)


def linear_bound(layer: NF4Linear, x: torch.Tensor) -> torch.Tensor:
    """The sum of the absolute terms behind each output."""
    bound = x.double().abs() @ layer.dequantize(torch.float32).double().abs().t()
    return bound if layer.bias is None else bound + layer.bias.double().abs()


@pytest.mark.parametrize(("kind", "nested", "block"), KINDS)
def test_bytes_equal_those_of_bitsandbytes(golden, kind, nested, block):
    expected = part(golden, f"{kind}.{'nested' if nested else 'plain'}.{block}.")
    weight = peft_kernels.quantize_4bit(golden["weight"], kind, block, nested)
    layer = NF4Linear(weight)
    state = layer.state_dict()
    assert set(state) == set(expected) - {"dequantized"}
    for key, value in state.items():
        assert_same_bits(value, expected[key])
    # By value: for FP4's code 8 bitsandbytes gives -0.0 in rows that its vectors do not divide, 0.0 in others.
    assert torch.equal(layer.dequantize(), expected["dequantized"])


@pytest.mark.parametrize(("kind", "nested", "block"), KINDS)
def test_loads_what_bitsandbytes_saved(golden, kind, nested, block):
    expected = part(golden, f"{kind}.{'nested' if nested else 'plain'}.{block}.")
    exact = expected.pop("dequantized")
    layer = NF4Linear.empty(70, 24, quant_type="nf4", nested=not nested, device="cpu")  # replaced by what is loaded
    layer.load_state_dict(expected)
    assert (layer.quant_type, layer.blocksize, layer.nested) == (kind, block, nested)
    assert torch.equal(layer.dequantize(), exact)
    for key, value in layer.state_dict().items():
        assert_same_bits(value, expected[key])


def test_layer_matches_bitsandbytes(golden):
    layer = NF4Linear.empty(70, 24, bias=True)
    layer.load_state_dict(part(golden, "layer."), assign=True)
    x = golden["x"]
    w = layer.dequantize(torch.float32).double()
    exact = x.double() @ w.t() + layer.bias.double()
    assert_no_worse(layer(x), golden["layer_output"], exact, linear_bound(layer, x))


def test_input_gradient():
    layer = make_layer()
    x = torch.randn(5, 70, requires_grad=True)
    dy = torch.randn(5, 24)
    layer(x).backward(dy)
    w = layer.dequantize(torch.float32)
    assert_no_worse(x.grad, dy @ w, dy.double() @ w.double(), dy.double().abs() @ w.double().abs())
    assert layer.bias.grad is None
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16])
def test_output_has_the_dtype_of_the_input(dtype, compute):
    layer = make_layer(compute_dtype=compute)
    x = torch.randn(2, 3, 70, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 24)
    w = layer.dequantize(torch.float32)
    inner = x.to(compute or dtype)
    eager = torch.nn.functional.linear(inner, w.to(inner.dtype), layer.bias.to(inner.dtype)).to(dtype)
    exact = inner.double() @ w.double().t() + layer.bias.double()
    # the sum is rounded to the compute dtype before it is rounded to x's
    coarse = max(torch.finfo(t).eps for t in (dtype, inner.dtype)) / torch.finfo(dtype).eps
    assert_no_worse(y, eager, exact, linear_bound(layer, x) * coarse)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "device_and_dtype": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_the_weight_alone(cast, nested):
    layer = make_layer(nested)
    before = {key: value.clone() for key, value in bnb_state(layer.quant_weight()).items()}
    packed = layer.weight.clone()
    model = CASTS[cast](nn.Sequential(layer))
    after = bnb_state(model[0].quant_weight())
    assert_same_bits(model[0].weight, packed)
    for key, value in before.items():
        assert_same_bits(after[key], value)
    if cast != "float":
        assert model[0].bias.dtype != torch.float32


def test_meta_and_to_empty():
    layer = make_layer().to("meta")
    assert layer.weight.is_meta
    assert layer.absmax.is_meta
    assert layer.state_dict().keys() == make_layer().state_dict().keys()
    source = make_layer()
    target = layer.to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    assert_same_bits(target.dequantize(), source.dequantize())


def by_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("nested", [False, True])
def test_copies_are_equal_and_independent(clone, nested):
    layer = make_layer(nested)
    x = torch.randn(3, 70)
    y = layer(x)  # so that the cached weight exists
    other = clone(layer)
    assert_same_bits(other(x), y)
    assert other.quant_weight().packed is other.weight
    other.weight.zero_()
    assert_same_bits(layer(x), y)
    assert not torch.equal(other(x), y)


def test_set_quant_weight_restores_exact_bytes():
    layer = make_layer()
    old = layer.quant_weight()
    exact = layer.dequantize()
    assert layer.quant_weight() is old  # cached
    layer.set_quant_weight(peft_kernels.quantize_4bit(torch.randn(24, 70), "nf4", 64, True))
    assert not torch.equal(layer.dequantize(), exact)
    layer.set_quant_weight(old)
    assert_same_bits(layer.dequantize(), exact)


def test_load_state_dict_copies():
    source, target = make_layer(), make_layer()
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 70)
    y = target(x)
    source.weight.zero_()
    assert_same_bits(target(x), y)


BAD = {
    "no_state": (lambda s: s.pop("weight.quant_state.bitsandbytes__nf4"), "one weight.quant_state"),
    "dense": (lambda s: [s.clear(), s.update(weight=torch.randn(24, 70))], "dense"),
    "other_shape": (lambda s: s.update(weight=s["weight"][:-1]), "bytes"),
    "short_absmax": (lambda s: s.update({"weight.absmax": s["weight.absmax"][:-1]}), "absmax"),
    "float_absmax": (lambda s: s.update({"weight.absmax": s["weight.absmax"].float()}), "absmax"),
    "other_table": (lambda s: s.update({"weight.quant_map": torch.arange(16.0)}), "table"),
    "json": (lambda s: s.update({"weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}), "json"),
    "small_shape": (lambda s: s.update(state_text(shape=[9, 9])), "bytes"),
    "huge_shape": (lambda s: s.update(state_text(shape=[1 << 40, 1 << 40])), "bytes"),
    "dtype": (lambda s: s.update(state_text(dtype="load")), "unknown"),
}


def state_text(**changes: object) -> dict[str, torch.Tensor]:
    facts = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [24, 70], **changes}
    text = json.dumps(facts)
    return {"weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text.encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_state_is_refused_and_changes_nothing(name):
    layer = make_layer(bias=False)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    state = dict(before)
    spoil, message = BAD[name]
    spoil(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    for key, value in layer.state_dict().items():
        assert_same_bits(value, before[key])


def test_storage_under_another_dtype_is_read_in_place():
    state = dict(make_layer(bias=False).state_dict())
    exact = parse_bnb_state(state)
    state["weight"] = state["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    assert_same_bits(parse_bnb_state(state).packed, exact.packed)


# --- whole models ---------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.ModuleDict({"a": nn.Sequential(nn.Linear(64, 33), nn.Linear(33, 64)), "lm_head": nn.Linear(64, 10)})


def test_quantize_model_replaces_all_but_what_is_skipped():
    model = small()
    head = model["lm_head"]
    calls = []
    assert quantize_model(model, progress=lambda *c: calls.append(c)) is model
    assert isinstance(model["a"][0], NF4Linear)
    assert isinstance(model["a"][1], NF4Linear)
    assert model["lm_head"] is head
    assert calls == [(1, 2, "a.0"), (2, 2, "a.1")]
    quantize_model(model, skip=[])
    assert isinstance(model["lm_head"], NF4Linear)


def test_quantize_model_names_are_whole_parts():
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "up2": nn.Linear(8, 8)})
    quantize_model(model, skip=["up"])
    assert type(model["up"]) is nn.Linear
    assert isinstance(model["up2"], NF4Linear)


def test_shared_weights_stay_dense():
    model = nn.ModuleDict({"emb": nn.Embedding(10, 64), "mid": nn.Linear(64, 64), "out": nn.Linear(64, 10, bias=False)})
    model["out"].weight = model["emb"].weight
    quantize_model(model, skip=[])
    assert model["out"].weight is model["emb"].weight
    assert isinstance(model["mid"], NF4Linear)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_weight_leaves_the_model_whole(value):
    model = small()
    with torch.no_grad():
        model["a"][1].weight[3, 4] = value
    layers = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"NaN.*a\.1"):
        quantize_model(model)
    assert dict(model.named_modules()) == layers


@pytest.mark.parametrize("arguments", [{"quant_type": "int4"}, {"blocksize": 63}, {"skip": ["a", "lm_head"]}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="quantize_model"):
        quantize_model(small(), **arguments)


def test_dense_weights_are_released_one_by_one():
    import weakref

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    dense = [weakref.ref(layer.weight) for layer in model]
    alive = []
    quantize_model(model, progress=lambda *_: alive.append(sum(r() is not None for r in dense)))
    assert alive == [3, 2, 1, 0]


def test_dequantize_model():
    model = quantize_model(small(), skip=[])
    weight = model["a"][0].dequantize()
    dequantize_model(model)
    assert type(model["a"][0]) is nn.Linear
    assert_same_bits(model["a"][0].weight.data, weight)
    assert not any(isinstance(m, NF4Linear) for m in model.modules())


def test_compiles_without_graph_breaks():
    layer = make_layer()
    x = torch.randn(3, 70)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert_same_bits(y, layer(x))


# --- bitsandbytes itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_live_bitsandbytes_layers(kind, nested):
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear4bit(70, 24, quant_type=kind, compress_statistics=nested, compute_dtype=torch.float32)
    theirs.to("cpu")
    ours = NF4Linear.from_bnb(theirs)
    assert ours.weight.data_ptr() == theirs.weight.data_ptr()  # nothing is copied
    x = torch.randn(4, 70)
    exact = x.double() @ ours.dequantize(torch.float32).double().t() + ours.bias.double()
    assert_no_worse(ours(x), theirs(x), exact, linear_bound(ours, x))
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for key, value in ours.state_dict().items():
        assert_same_bits(value, expected[key])


def test_from_bitsandbytes_replaces_their_layers():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 32, quant_type="nf4"), nn.ReLU(), bnb.nn.LinearNF4(32, 8)).to("cpu")
    x = torch.randn(2, 64)
    expected = model(x)
    from_bitsandbytes(model)
    assert [type(m) for m in model] == [NF4Linear, nn.ReLU, NF4Linear]
    exact = copy.deepcopy(model)
    dequantize_model(exact, torch.float32).double()
    bound = (x.abs() @ exact[0].weight.abs().t().float()) @ exact[2].weight.abs().t().float()
    assert_no_worse(model(x), expected, exact(x.double()), bound)


def test_a_layer_repacked_by_bitsandbytes_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=False).to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True  # what its eval forward sets on CPUs with AVX512-BF16
    with pytest.raises(ValueError, match="repacks"):
        NF4Linear.from_bnb(layer)


def test_error_types_are_one_family():
    with pytest.raises(AdapterFileError):
        parse_bnb_state({"weight": torch.zeros(3, dtype=torch.uint8)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_layer()(torch.randn(1, 70))
