"""`accelerate(model, loss=True)` beside the same model unchanged: loss, gradients, logits, and what never stands."""

from __future__ import annotations

import copy
import io
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import fastpeft
import peft
import transformers
from fastpeft.recipes.lazy_logits import LazyLogits
from forms import matrix

_tools = runpy.run_path(str(Path(__file__).with_name("loss_tools.py")))
FAMILIES, H, V, small_chunks = (_tools[n] for n in ("FAMILIES", "H", "V", "small_chunks"))
agree, assert_as_good, batch, beside_unchanged, exactly, made, trained = (
    _tools[n] for n in ("agree", "assert_as_good", "batch", "beside_unchanged", "exactly", "made", "trained")
)
SHORT = ["LlamaForCausalLM", "Gemma2ForCausalLM", "CohereForCausalLM", "GraniteForCausalLM", "MixtralForCausalLM",
         "GPT2LMHeadModel", "PhiForCausalLM"]  # fmt: skip


@pytest.mark.parametrize("name", matrix(FAMILIES, SHORT))
def test_families(name: str) -> None:
    model = made(name)
    kind, keys = type(model), model.state_dict().keys()
    report = beside_unchanged(model)
    assert isinstance(model, kind)
    assert type(model).__name__ == kind.__name__
    report.remove()
    assert type(model) is kind
    assert model.state_dict().keys() == keys
    assert type(model(**batch()).logits) is Tensor


def test_a_model_that_adds_to_its_logits_keeps_its_own_way() -> None:
    config = transformers.BartConfig(vocab_size=V, d_model=H, encoder_layers=1, decoder_layers=1, dropout=0.0,
                                     encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
                                     decoder_ffn_dim=24)  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).train()
    before = trained(model)
    report = fastpeft.accelerate(model, layers=False, loss=True)
    assert all(torch.equal(t, before[name]) for name, t in trained(model).items())
    assert list(report.whole) == ["the model needs its logits for `add`"]
    assert report.chunked == 0
    assert "all logits at once, 1 times: the model needs its logits for `add`" in str(report)


@pytest.mark.parametrize("package", [fastpeft, peft], ids=["ours", "peft"])
@pytest.mark.parametrize("where", ["all-linear", "head", "saved head"])
def test_adapters(package: Any, where: str) -> None:
    options: dict[str, Any] = {
        "all-linear": {"target_modules": "all-linear"}, "head": {"target_modules": ["q_proj", "lm_head"]},
        "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }[where]  # fmt: skip
    model = made(tie_word_embeddings=False)
    adapted = package.get_peft_model(model, package.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    beside_unchanged(adapted)
    plain = adapted.get_base_model() if package is peft else adapted
    assert (where == "all-linear") == (sum("lm_head" in n for n, p in plain.named_parameters() if p.requires_grad) == 0)


@pytest.mark.parametrize("quantise", ["ours", "bitsandbytes"])
def test_quantised_heads(quantise: str) -> None:
    model = made(tie_word_embeddings=False, hidden_size=64, num_hidden_layers=1, intermediate_size=64)
    dense = copy.deepcopy(model)
    if quantise == "ours":
        model.lm_head = fastpeft.quantize_model(nn.Sequential(model.lm_head), "nf4", skip=[])[0]
        dense.lm_head = fastpeft.dequantize_model(nn.Sequential(copy.deepcopy(model.lm_head)))[0].requires_grad_(False)
    else:
        bnb = pytest.importorskip("bitsandbytes")
        head = bnb.nn.Linear4bit(64, V, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        head.load_state_dict(model.lm_head.state_dict())
        model.lm_head = head.to("cpu")
        weight = bnb.functional.dequantize_4bit(head.weight.data, head.weight.quant_state)
        dense.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    beside_unchanged(model, dense)


OPTIONS: dict[str, Any] = {
    "num_items_in_batch": {"num_items_in_batch": torch.tensor(77)}, "an int": {"num_items_in_batch": 5},
    "shift_labels": {"shift_labels": batch()["labels"].roll(-1, 1)},
    "packed": {"position_ids": torch.arange(17).remainder(6).expand(3, 17), "attention_mask": None},
    "ignore_index": {"ignore_index": 7, "labels": batch()["input_ids"].remainder(9)},
    "no labels left": {"labels": torch.full((3, 17), -100), "num_items_in_batch": 3},
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_loss(option: str) -> None:
    if option == "no labels left":
        model = made()
        fastpeft.accelerate(model, layers=False, loss=True)
        found = trained(model, **OPTIONS[option])
        assert all(not t.any() for t in found.values())
        assert model(**(batch() | {"labels": torch.full((3, 17), -100)})).loss.isnan()  # torch's own mean of nothing
    else:
        beside_unchanged(made(), **OPTIONS[option])


def test_logits_to_keep_and_tuples() -> None:
    model = made()
    labels = batch()["labels"][:, -4:]
    plain = model(**(batch() | {"labels": labels}), logits_to_keep=4, return_dict=False)
    fastpeft.accelerate(model, layers=False, loss=True)
    ours = model(**(batch() | {"labels": labels}), logits_to_keep=4, return_dict=False)
    assert agree(ours[0].detach(), plain[0].detach())
    assert torch.equal(ours[1] + 0, plain[1])
    assert ours[1].shape == (3, 4, V)


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The error of all gradients together: in bfloat16 one alone is further off by chance."""
    return sum(float((found[name].double() - best).square().sum()) for name, best in exact.items()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = made().to(dtype)
    exact, before = exactly(model), trained(model)
    fastpeft.accelerate(model, layers=False, loss=True)
    after = trained(model)
    assert [t.dtype for t in after.values()] == [t.dtype for t in before.values()]
    assert error(after, exact) <= 2 * error(before, exact)


@pytest.mark.parametrize("head", ["its own", "an adapter"])
def test_autocast_and_checkpointing(head: str) -> None:
    model = made()
    if head == "an adapter":
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    exact = exactly(model)
    with torch.autocast("cpu", torch.bfloat16):
        before = trained(model)
    report = fastpeft.accelerate(model, layers=False, loss=True)
    with torch.autocast("cpu", torch.bfloat16):
        after, logits = trained(model), model(**batch()).logits
    assert logits.dtype is (logits + 0).dtype is torch.bfloat16
    assert error(after, exact) <= 2 * error(before, exact)
    assert report.chunked == 2


def test_what_cannot_be_served_runs_the_models_own_forward() -> None:
    hooked = made()
    hooked.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    rows = fastpeft.get_peft_model(made(tie_word_embeddings=False), fastpeft.LoraConfig(target_modules=["lm_head"]))
    rows.add_adapter("b", fastpeft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    rows.set_adapter("b")
    names = {"adapter_names": ["default", "b", "__base__"]}
    for model, more, why in (
        (hooked, {}, "there are hooks on its head, which would see other calls"),
        (rows, names, "the rows of its head have adapters or values of their own"),
    ):
        model.eval()
        before = model(**batch(), **more).loss
        report = fastpeft.accelerate(model, layers=False, loss=True)
        assert torch.equal(model(**batch(), **more).loss, before)
        assert report.chunked == 0
        assert dict(report.whole) == {why: 1}


def test_compile_generate_and_no_labels() -> None:
    model = made().eval()
    ids = batch()["input_ids"]
    tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    loss, logits = model(**batch()).loss, model(input_ids=ids).logits
    report = fastpeft.accelerate(model, layers=False, loss=True)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), tokens)
    found = model(input_ids=ids)
    assert type(found.logits) is Tensor
    assert torch.equal(found.logits, logits)
    compiled = torch.compile(model, backend="eager")(**batch())
    assert type(compiled.logits) is Tensor
    assert agree(compiled.loss.detach(), loss.detach())
    assert report.chunked == 0
    with torch.inference_mode():
        assert agree(model(**batch()).loss, loss.detach())
    assert report.chunked == 1


def test_copies_pickles_and_calls_again() -> None:
    adapted = peft.get_peft_model(made(), peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"))
    before, exact, kind = trained(adapted), exactly(adapted), type(adapted.get_base_model())
    fastpeft.accelerate(adapted, loss=True, huge_pages=False)
    assert fastpeft.accelerate(adapted, layers=False, loss=True).losses == 1
    stream = io.BytesIO()
    torch.save(adapted, stream)
    for other in (copy.deepcopy(adapted), torch.load(io.BytesIO(stream.getvalue()), weights_only=False)):
        assert type(other.get_base_model()) is type(adapted.get_base_model()) is not kind
        assert_as_good(trained(other), before, exact)
        assert type(other(**batch()).logits) is LazyLogits
        assert fastpeft.unaccelerate(other) == 11
        assert type(other.get_base_model()) is kind
        assert all(torch.equal(t, before[name]) for name, t in trained(other).items())
    assert type(adapted(**batch()).logits) is LazyLogits
    assert [fastpeft.unaccelerate(adapted), fastpeft.unaccelerate(adapted)] == [11, 0]


def test_layers_and_loss_together() -> None:
    model = fastpeft.get_peft_model(made(), fastpeft.LoraConfig(r=4, target_modules="all-linear"))
    before, exact = trained(model), exactly(model)
    kinds = [type(m) for m in model.modules()]
    report = fastpeft.accelerate(model, huge_pages=False)
    assert (report.modules, report.losses) == (10, 0)
    report = fastpeft.accelerate(model, loss=True, huge_pages=False)
    assert (report.modules, report.losses, report.reasons) == (10, 1, [])
    assert_as_good(trained(model), before, exact)
    assert report.chunked == 1
    assert "layers: 10 run the quicker way" in str(report)
    assert fastpeft.unaccelerate(model) == 11
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(t, before[name]) for name, t in trained(model).items())


def test_what_is_refused_is_said() -> None:
    gpt = made("GPTJForCausalLM")
    with pytest.raises(ValueError, match="nothing to accelerate: GPTJForCausalLM: no layer of a described family"):
        fastpeft.accelerate(gpt)
    report = fastpeft.accelerate(gpt, loss=True)
    assert report.losses == 1
    assert report.reasons == [
        "GPTJForCausalLM: no layer of a described family (docs/families.md)"
    ]
    with pytest.raises(ValueError, match="Linear: no model of transformers with a head for tokens that takes labels"):
        fastpeft.accelerate(nn.Linear(2, 2), layers=False, loss=True)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got str"):
        fastpeft.accelerate("model")
    replaced = made()
    replaced.forward = replaced.forward
    with pytest.raises(ValueError, match="its forward was replaced"):
        fastpeft.accelerate(replaced, layers=False, loss=True)
    meta = made().to("meta")
    with pytest.raises(ValueError, match=r"no layer is quicker on meta .*\(none is for meta tensors"):
        fastpeft.accelerate(meta)
