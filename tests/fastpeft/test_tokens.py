"""Trainable tokens, alone and beside an adapter, and layers with tied weights, beside live PEFT."""

from __future__ import annotations

import copy
import runpy
import warnings
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("simple_tools.py")))
check, llama, make, shake, trained = (
    tools[name] for name in ("check", "llama", "make", "shake", "trained")
)


def test_trained_rows_of_a_linear_layer_keep_its_bias() -> None:
    """PEFT drops the bias."""
    options = {"target_modules": ["up"], "token_indices": [3, 1], "init_weights": False}
    model = make(fastpeft, "TrainableTokens", options)
    layer = model.base_model.model.layers[0].up
    x = torch.randn(4, 12)
    w, b = layer.weight.detach().clone(), layer.bias.detach()
    w[[3, 1]] = layer.trainable_tokens_delta["default"].detach()
    check(layer(x).detach(), F.linear(x, w, b), F.linear(x.double(), w.double(), b.double()))


def test_token_indices_are_checked() -> None:
    for tokens, error in (([], "non-negative"), ([-1], "non-negative"), ([1, 1], "once"), ([9], "has 9 rows")):
        with pytest.raises(ValueError, match=error):
            make(fastpeft, "TrainableTokens", {"target_modules": ["emb"], "token_indices": tokens})


TOKEN_CASES: list[tuple[str, dict[str, Any]]] = [
    ("TrainableTokens", {"token_indices": [7, 1, 5]}),
    ("Lora", {"trainable_token_indices": [7, 1, 5], "target_modules": ["q_proj"]}),
    ("Lora", {"trainable_token_indices": {"embed_tokens": [7, 1], "lm_head": [7, 1]}, "target_modules": ["q_proj"]}),
    ("Lora", {"trainable_token_indices": {"embed_tokens": [7, 1], "lm_head": [2]}, "target_modules": ["q_proj"]}),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("name", "options"), TOKEN_CASES, ids=str)
def test_trained_tokens_of_language_models(name: str, options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 5, 7, 9, 1], [0, 7, 7, 3, 1, 4]])
    ours, theirs = (
        lib.get_peft_model(llama(tied), getattr(lib, f"{name}Config")(**options)) for lib in (fastpeft, peft)
    )
    assert sorted(trained(ours)) == sorted(trained(theirs))
    found = {n: m for n, m in theirs.named_modules() if hasattr(m, "trainable_tokens_original")}
    for place, layer in found.items():
        rows = ours.get_submodule(place).trainable_tokens_original
        assert_same_bits(rows["default"], layer.trainable_tokens_original["default"])
    assert found
    shake(theirs)
    state = peft.get_peft_model_state_dict(theirs)
    assert fastpeft.get_peft_model_state_dict(ours).keys() == state.keys()
    fastpeft.set_peft_model_state_dict(ours, state)
    exact = copy.deepcopy(theirs).double()
    outputs = [m(ids).logits for m in (ours, theirs, exact)]
    check(*(o.detach() for o in outputs))
    for output in outputs:
        output.square().sum().backward()
    reference, precise = trained(theirs), trained(exact)
    for key, p in trained(ours).items():
        check(p.grad, reference[key].grad, precise[key].grad)  # type: ignore[arg-type]
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        for library in (fastpeft, peft):
            loaded = library.PeftModel.from_pretrained(llama(tied), tmp_path).eval()
            check(loaded(ids).logits, outputs[1].detach(), outputs[2].detach())
            assert len({id(p) for n, p in loaded.named_parameters() if "tokens_delta" in n}) == len(
                [n for n in trained(theirs) if "tokens_delta" in n]
            )
        with ours.disable_adapter():
            base = llama(tied)(ids).logits
            check(ours(ids).logits, base, llama(tied).double()(ids).logits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours.merge_adapter()
            check(ours(ids).logits, outputs[1].detach(), outputs[2].detach())
            ours.unmerge_adapter()
            merged = fastpeft.PeftModel.from_pretrained(llama(tied), tmp_path).merge_and_unload()
            check(merged(ids).logits, outputs[1].detach(), outputs[2].detach())
            assert type(merged.get_input_embeddings()) is nn.Embedding


def test_trained_tokens_beside_an_adapter_come_and_go() -> None:
    ids = torch.arange(8)[None]
    model = llama()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    options: dict[str, Any] = {"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}
    ours = fastpeft.get_peft_model(model, fastpeft.LoraConfig(**options))
    shake(ours)
    first = ours(ids).logits
    ours.add_adapter("b", fastpeft.LoraConfig(**{**options, "trainable_token_indices": [2, 5]}))
    ours.set_adapter("b")
    assert not torch.equal(ours(ids).logits, first)
    ours.set_adapter("default")
    assert_same_bits(ours(ids).logits, first)
    mixed = ours(ids.repeat(3, 1), adapter_names=["__base__", "default", "b"]).logits
    check(mixed[1:2].detach(), first.detach(), first.detach().double())
    ours.delete_adapter("b")
    assert not any(n.endswith(".b") or ".b." in n for n, _ in ours.named_parameters())
    tied = fastpeft.get_peft_model(llama(True), fastpeft.LoraConfig(**options))
    tied.add_adapter("b", fastpeft.LoraConfig(target_modules="all-linear"))  # which leaves out the head, wrapped or not
    assert not any("lm_head" in n and ".b." in n for n, _ in tied.named_parameters())
    assert ours.unload().state_dict().keys() == before.keys()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_trained_tokens_that_make_no_sense_are_refused() -> None:
    for options, error, message in (
        ({"trainable_token_indices": [1], "modules_to_save": ["model.embed_tokens"]}, ValueError, "not in both"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, TypeError, "cannot be applied"),
        ({"trainable_token_indices": {"nothing": [1]}}, ValueError, "not found"),
        ({"trainable_token_indices": [31]}, ValueError, "has 30 rows"),
        (
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
            ValueError, "Cannot ensure weight tying",
        ),
    ):  # fmt: skip
        model = llama()
        names = [n for n, _ in model.named_modules()]
        with pytest.raises(error, match=message):
            fastpeft.get_peft_model(model, fastpeft.LoraConfig(**{"target_modules": ["q_proj"], **options}))
        assert [n for n, _ in model.named_modules()] == names


TIED: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": r".*(q_proj|embed_tokens)"},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("options", TIED, ids=str)
def test_tied_layers_share_their_adapters(options: dict[str, Any], tmp_path: Path) -> None:
    ids = torch.arange(8)[None]
    options = {"r": 3, "ensure_weight_tying": True, "init_lora_weights": False, **options}
    models = []
    for library in (fastpeft, peft):
        torch.manual_seed(1)
        models.append(library.get_peft_model(llama(), library.LoraConfig(**options)).eval())
    ours, theirs = models
    state = {k: v + 0.1 for k, v in peft.get_peft_model_state_dict(theirs, save_embedding_layers=False).items()}
    mine = fastpeft.get_peft_model_state_dict(ours, save_embedding_layers=False)
    assert mine.keys() == state.keys()
    fastpeft.set_peft_model_state_dict(ours, state)
    wide = peft.get_peft_model(llama(), peft.LoraConfig(**options)).eval().double()  # PEFT's cannot be copied
    for model in (theirs, wide):
        peft.set_peft_model_state_dict(model, state)
    with torch.no_grad():
        exact = wide(ids).logits
        check(ours(ids).logits, theirs(ids).logits, exact)
    ours(ids).logits.square().sum().backward()
    saves = "modules_to_save" in options
    for model in (ours, fastpeft.get_peft_model(llama(), fastpeft.LoraConfig(**options)).double()):
        body = model.base_model.model
        if saves:
            head = body.lm_head.modules_to_save["default"].weight
            assert head is body.model.embed_tokens.modules_to_save["default"].weight
        else:
            up = body.lm_head.lora_B["default"].weight
            assert up.data_ptr() == body.model.embed_tokens.lora_embedding_A["default"].data_ptr()
    ours.load_state_dict(ours.state_dict())
    copied = copy.deepcopy(ours)
    shake(copied)  # a copy is tied to itself
    with torch.no_grad():
        check(ours(ids).logits, theirs(ids).logits, exact)
        assert not torch.equal(copied(ids).logits, ours(ids).logits)
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert all(g is not None for g in grads.values())
    ours.save_pretrained(tmp_path, save_embedding_layers=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in (fastpeft, peft):
            loaded = library.PeftModel.from_pretrained(llama(), tmp_path).eval()
            check(loaded(ids).logits, theirs(ids).logits, exact)
        merged = fastpeft.PeftModel.from_pretrained(llama(), tmp_path).merge_and_unload()
        check(merged(ids).logits, theirs(ids).logits, exact)


def test_asking_for_tying_where_there_is_none_warns() -> None:
    for model, options, message in (
        (llama(False), {"target_modules": ["embed_tokens"]}, "were found in the model"),
        (llama(), {"target_modules": ["q_proj"]}, "are added in either"),
    ):
        with pytest.warns(fastpeft.PeftWarning, match=message):
            fastpeft.get_peft_model(model, fastpeft.LoraConfig(ensure_weight_tying=True, **options))
