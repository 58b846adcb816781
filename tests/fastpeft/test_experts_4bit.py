"""Experts in 4 bits: read by transformers' own code and by `accelerate`, with LoRA, ours and bitsandbytes' form."""

from __future__ import annotations

import copy
import gc
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import fastpeft
from fastpeft.families.experts import EXPERTS, why_not
from fastpeft.layer.base import MergingLayer
from fastpeft.weights.load_nf4 import load_nf4_model
from fastpeft.weights.nf4_experts import NF4Experts, unpack
from fastpeft.weights.parameters_4bit import Decoded, packed_in
from fastpeft.weights.quantize import dequantize_model, nf4_config
from forms import matrix

from peft_kernels.testing import assert_no_worse, assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("families_tools.py")))
close = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))["close"]
tiny, exactly = tools["tiny"], tools["exactly"]
F32, BF16 = torch.float32, torch.bfloat16
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
PARAMETERS = ["gate_up_proj", "down_proj"]
LORA = {"r": 3, "target_modules": [], "target_parameters": PARAMETERS}
# On a CPU bitsandbytes decodes wrongly where the last dimension is no multiple of the block size.
tools["FAMILIES"]["whole"] = ("qwen3_moe", {**tools["FAMILIES"]["qwen3_moe"][1], "moe_intermediate_size": 64})
NAMES = ("mixtral", "qwen3_moe", "gpt_oss")  # the last by columns, with biases and another gate


def packed(name: str, dtype: torch.dtype = F32, **options: Any) -> Any:
    torch.manual_seed(0)
    return fastpeft.quantize_model(tiny(name, dtype), experts=True, **options)


def with_lora(model: Any) -> Any:
    return tools["drawn"](fastpeft.get_peft_model(model, fastpeft.LoraConfig(**LORA)))


def experts_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__.endswith("Experts")]


def unpacked(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The same model whose experts have the same values, dense."""
    other = copy.deepcopy(model)
    for module in experts_of(other):
        unpack(module, dtype)
    return other


def results(model: Any) -> list[Tensor]:
    """Logits, and gradients where something is trained."""
    model.zero_grad()
    logits = model(IDS, use_cache=False).logits
    if not logits.requires_grad:  # nothing is trained, or it is merged
        return [logits]
    logits.square().mean().backward()
    return [logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]


def no_worse(fast: list[Tensor], plain: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for ours, theirs, right in zip(fast, plain, exact, strict=True):
        worst = [(t.double() - right).abs().max().reshape(1).to(dtype) for t in (ours, theirs)]
        assert_no_worse(*worst, torch.zeros(1, dtype=torch.float64), right.abs().max().reshape(1))


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("a weight of all experts was made")


@pytest.mark.parametrize(("name", "dtype", "lora"), matrix(
    [(name, dtype, lora) for name in NAMES for dtype in (F32, BF16) for lora in (False, True)],
    short=[("mixtral", BF16, True)],
))  # fmt: skip
def test_forward_and_gradients(name: str, dtype: torch.dtype, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without `accelerate` as with dense weights of the same values, which are in no place then."""
    model = packed(name, dtype, double_quant=lora)
    model = with_lora(model) if lora else model
    with exactly(unpacked(model)) as twin:
        exact = results(twin)
    plain = results(model)
    no_worse(plain, results(unpacked(model, dtype)), exact, dtype)
    report = fastpeft.accelerate(model)
    assert report.served[("experts", "grouped_linear (native)")] == 2, str(report)
    with monkeypatch.context() as patched:
        patched.setattr(MergingLayer, "stored_weight", never)
        patched.setattr(Decoded, "dense", never)
        patched.setattr(Decoded, "_matrix", never)
        fast = results(model)
    no_worse(fast, plain, exact, dtype)
    report.remove()
    for one, other in zip(results(model), plain, strict=True):
        assert_same_bits(one, other)


@pytest.mark.full_form
def test_code_that_goes_from_expert_to_expert_decodes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed("mixtral")
    want = results(model)[0]
    model.config._experts_implementation = "eager"
    monkeypatch.setattr(Decoded, "dense", never)
    close(results(model)[0], want)
    weight = experts_of(model)[0].down_proj
    assert (weight.shape, weight.dtype) == ((4, 64, 96), F32)
    monkeypatch.undo()
    assert_same_bits(weight[-1], (weight + 0)[3])
    assert "Decoded(nf4" in repr(weight)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "state dict": lambda model: loaded(model),
}  # fmt: skip


def loaded(model: Any) -> Any:
    other = tiny("mixtral")
    for p in other.parameters():
        p.neg_()
    other = fastpeft.quantize_model(other, experts=True)
    before = other.state_dict()["model.layers.1.mlp.experts.down_proj"].clone()
    assert not other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}).missing_keys
    assert not torch.equal(other.state_dict()["model.layers.1.mlp.experts.down_proj"], before)
    return other


@pytest.mark.full_form
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("fast", [False, True])
def test_copies(way: str, fast: bool) -> None:
    model = packed("mixtral")
    if fast:
        fastpeft.accelerate(model)
    want = results(model)[0]
    other = COPIES[way](model)
    if fast and way == "state dict":
        fastpeft.accelerate(other)
    assert_same_bits(results(other)[0], want)
    assert fastpeft.unaccelerate(other) > 0 if fast else True
    dequantize_model(other)
    assert [type(m).__name__ for m in experts_of(other)] == ["MixtralExperts"] * 2
    close(results(other)[0], want)
    assert_same_bits(results(model)[0], want)


@pytest.mark.full_form
def test_a_cast_changes_what_is_read_and_no_byte() -> None:
    model = packed("qwen3_moe")
    before = {k: v.clone() for k, v in model.state_dict().items() if "experts" in k and ".quant_state" not in k}
    results(model.to(BF16))
    experts = experts_of(model)[0]
    assert (experts.gate_up_proj.dtype, experts.gate_up_proj_4bit.absmax.dtype) == (BF16, F32)
    after = model.state_dict()
    for key, value in before.items():
        assert_same_bits(after[key], value)
    model.config._experts_implementation = "eager"  # torch's grouped product has no float64
    assert model.double()(IDS).logits.dtype is torch.float64
    assert after["model.layers.0.mlp.experts.down_proj"].dtype is torch.uint8
    packed("qwen3_moe").load_state_dict(model.state_dict())


@pytest.mark.full_form
def test_bytes_targets_and_counts() -> None:
    model, usual = packed("qwen3_moe", BF16), fastpeft.quantize_model(tiny("qwen3_moe", BF16))
    held = [sum(t.nbytes for e in experts_of(m) for t in (*e.parameters(), *e.buffers())) for m in (model, usual)]
    assert held[0] == held[1] * (4 + 32 / 64) / 16  # a float32 scale for 64 weights
    # "all-linear" means experts too
    names = [set(dict(fastpeft.get_peft_model(m, fastpeft.LoraConfig(r=2, target_modules="all-linear"))
                      .base_model.adapter_layers())) for m in (model, usual)]  # fmt: skip
    assert names[0] == names[1]
    counts = [fastpeft.get_peft_model(m, fastpeft.LoraConfig(**LORA)).get_nb_trainable_parameters()
              for m in (packed("qwen3_moe"), fastpeft.quantize_model(tiny("qwen3_moe")))]  # fmt: skip
    assert counts[0] == counts[1]


@pytest.mark.full_form
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_merging_requantises_and_goes_back(name: str, tmp_path: Path) -> None:
    model = with_lora(packed(name, blocksize=128 if name == "mixtral" else 64))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = results(model)[0]
    for layer in (m for m in model.modules() if isinstance(m, MergingLayer)):
        w, _ = layer.merged_weight(["default"])
        error = layer.merge()
        assert error is not None
        assert 0 < error < 0.2
        stored = layer.base.read()[0]
        bound = w.flatten(1).abs().max()
        assert (stored - w).abs().max() < 0.2 * bound
    merged = results(model)[0]
    dense = results(unpacked(model, F32))
    with exactly(unpacked(model)) as twin:
        exact = results(twin)
    no_worse([merged], dense, exact, F32)
    fastpeft.accelerate(model)
    close(results(model)[0], merged)
    assert not torch.equal(merged, plain)
    model.unmerge_adapter()
    fastpeft.unaccelerate(model)
    for key, value in model.state_dict().items():
        assert_same_bits(value, before[key])
    assert_same_bits(results(model)[0], plain)
    model.save_pretrained(tmp_path)
    again = fastpeft.PeftModel.from_pretrained(packed(name, blocksize=128 if name == "mixtral" else 64), tmp_path)
    assert_same_bits(again(IDS, use_cache=False).logits, plain)


@pytest.mark.full_form
@pytest.mark.parametrize("change", ["two", "disabled"])
def test_what_is_more_than_one_plain_adapter(change: str) -> None:
    model = with_lora(packed("mixtral"))
    if change == "two":
        model.add_adapter("other", fastpeft.LoraConfig(**{**LORA, "r": 2}))
        model.base_model.set_adapter(["default", "other"])
    else:
        model.base_model.disable_adapter_layers()
    plain = model(IDS).logits
    fastpeft.accelerate(model)
    close(model(IDS).logits, plain)


@pytest.mark.full_form
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_folders(name: str, tmp_path: Path) -> None:
    """transformers saves all experts of a parameter together then, and our loader reads them."""
    dense = tiny(name)
    dense.save_pretrained(tmp_path / "dense")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=nf4_config(experts=True))
    want = results(fastpeft.quantize_model(dense, experts=True))[0]
    assert_same_bits(results(model)[0], want)
    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    found = load_nf4_model(tmp_path / "packed")
    assert [type(m).__name__ for m in experts_of(found)] == [type(m).__name__ for m in experts_of(model)]
    assert_same_bits(results(found)[0], want)
    dequantize_model(found).save_pretrained(tmp_path / "again")
    close(results(type(dense).from_pretrained(tmp_path / "again"))[0], want)


@pytest.mark.full_form
def test_errors_change_nothing() -> None:
    odd = tiny("mixtral")
    experts = experts_of(odd)[1]
    for name in PARAMETERS:
        experts._parameters[name] = nn.Parameter(torch.randn(4, 7, 9), requires_grad=False)
    fast, bad = tiny("mixtral"), tiny("mixtral")
    fastpeft.accelerate(fast)
    experts_of(bad)[1].down_proj[0, 0, 0] = torch.nan
    for model, options, match in (
        (odd, {}, r"layers.1.mlp.experts.gate_up_proj has \[7, 9\] = 63 elements of an expert, which are no multiple"),
        (fast, {}, r"layers.0.mlp.experts is accelerated: call `unaccelerate"),
        (bad, {}, r"NaN, infinite or not float32/16 weights in model.layers.1.mlp.experts.down_proj"),
        (tiny("llama"), {}, "LlamaForCausalLM has no dense experts to keep in 4 bits"),
        (tiny("mixtral"), {"skip": ["lm_head", "experts"]}, "leave `experts` off"),
    ):
        classes = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=match):
            fastpeft.quantize_model(model, experts=True, **options)
        assert [type(m) for m in model.modules()] == classes
    assert isinstance(experts_of(packed("mixtral", skip=["lm_head", "layers.0.mlp.experts"]))[1], NF4Experts)
    model = packed("mixtral")
    fastpeft.accelerate(model)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts is accelerated"):
        dequantize_model(model)
    state = model.state_dict()
    key = "model.layers.0.mlp.experts.down_proj"
    for change, match in (
        ({key: torch.randn(4, 64, 96)}, "a dense torch.float32 weight: load it before quantising"),
        ({f"{key}.absmax": state[f"{key}.absmax"][:-1]}, "absmax: 383 elements"),
    ):
        kept = {k: v for k, v in state.items() if k not in change and not (k.startswith(key) and key in change)}
        with pytest.raises(RuntimeError, match=match):
            model.load_state_dict(kept | change)
    del state[key]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def by_bitsandbytes(model: Any, **options: Any) -> Any:
    replace = pytest.importorskip("bitsandbytes.nn.parametrize").replace_parameter_4bit
    for module in experts_of(model):
        for name in PARAMETERS:
            replace(module, name, **options)
    return model


@pytest.mark.parametrize(("name", "nested"), matrix(
    [(name, nested) for name in ("whole", "gpt_oss") for nested in (False, True)], short=[("gpt_oss", True)],
))  # fmt: skip
def test_what_bitsandbytes_packed(name: str, nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as it is: by `accelerate` without decoding, by LoRA with and without it, by merging."""
    torch.manual_seed(0)
    model = by_bitsandbytes(tiny(name), compress_statistics=nested)
    state = model.state_dict()
    plain = results(model)[0]
    report = fastpeft.accelerate(model)
    assert report.served[("experts", "grouped_linear (native)")] == 2, str(report)
    with monkeypatch.context() as patched:
        patched.setattr("bitsandbytes.functional.dequantize_4bit", never)
        close(results(model)[0], plain)
        close(results(copy.deepcopy(model))[0], plain)
    fastpeft.unaccelerate(model)
    assert_same_bits(results(model)[0], plain)
    # its state dict, which bitsandbytes itself does not load, loads here, and its bytes are ours
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    torch.manual_seed(0)
    ours = fastpeft.quantize_model(tiny(name), experts=True, skip=["self_attn", "router", "gate", "lm_head"])
    assert [len(packed_in(m)) for m in experts_of(ours)] == [2, 2]
    if not nested:
        for key, value in ours.state_dict().items():
            assert_same_bits(value, state[key])
    ours.load_state_dict(state)
    assert_same_bits(results(ours)[0], plain)
    model = with_lora(model)
    assert model.get_nb_trainable_parameters() == with_lora(tiny(name)).get_nb_trainable_parameters()
    plain = results(model)
    fastpeft.accelerate(model)
    monkeypatch.setattr(MergingLayer, "stored_weight", never)
    for fast, slow in zip(results(model), plain, strict=True):
        close(fast, slow)
    monkeypatch.undo()
    model.merge_adapter()
    merged = results(model)[0]
    assert not torch.equal(merged, plain[0])
    fastpeft.unaccelerate(model)
    close(results(model)[0], merged)
    model.unmerge_adapter()
    assert_same_bits(results(model)[0], plain[0])


def test_classes_of_parametrized_modules_go_with_them() -> None:
    """A parametrization makes a class for each module."""
    model = by_bitsandbytes(tiny("gpt_oss"))
    fastpeft.accelerate(model)
    classes = [ref(type(module)) for module in experts_of(model)]
    assert len({one() for one in classes}) == 2
    del model
    gc.collect()
    assert [one() for one in classes] == [None, None]


@pytest.mark.full_form
def test_matrices_that_share_a_block_of_scales_stay_bitsandbytes_own() -> None:
    model = tiny("whole")
    experts = experts_of(model)[0]
    experts.down_proj = nn.Parameter(torch.randn(4, 7, 9), requires_grad=False)
    by_bitsandbytes(model)
    assert why_not(experts, EXPERTS) == "down_proj: the 4-bit blocks of an expert are not whole"
    assert why_not(experts_of(model)[1], EXPERTS) is None
