"""Accelerated models in the uses that transformers allows: each computes what the model computes without."""

from __future__ import annotations

import copy
import pickle
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

pytest.importorskip("transformers")

import fastpeft
import transformers
from forms import matrix

from peft_kernels.testing import assert_no_worse, assert_same_bits

_tools = runpy.run_path(str(Path(__file__).with_name("families_tools.py")))
exactly, tiny = _tools["exactly"], _tools["tiny"]
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
HALF = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])


def pair(name: str) -> tuple[Any, Any]:
    """(as it is, accelerated)."""
    model = tiny(name)
    fast = copy.deepcopy(model)
    fastpeft.accelerate(fast)
    return model, fast


def no_worse(fast: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The largest errors are compared, as elements are sums of many."""
    worst = [(t.double() - exact).abs().max().reshape(1).to(t.dtype) for t in (fast, plain)]
    assert_no_worse(*worst, torch.zeros(1, dtype=torch.float64), exact.abs().max().reshape(1))


def agree(models: tuple[Any, Any], given: dict[str, Any], where: Tensor | None = None) -> None:
    """The second's logits are no worse than the first's."""
    with exactly(models[0]) as exact_model:
        exact = exact_model(**given).logits.detach()
    plain, fast = (model(**given).logits.detach() for model in models)
    rows = slice(None) if where is None else where.bool()
    no_worse(fast[rows], plain[rows], exact[rows])


def seen(kind: str) -> Tensor:
    """A mask [., 1, ., 9] that a user makes."""
    ahead = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    ahead[0, ..., :3] = False  # every query sees a range
    if kind == "range":
        return ahead
    ahead[1, ..., 4] = False
    return ahead if kind == "holes" else torch.zeros(ahead.shape).masked_fill(~ahead, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["range", "holes", "floats"])
def test_a_mask_for_all_queries(kind: str) -> None:
    agree(pair("llama"), {"input_ids": IDS, "attention_mask": seen(kind)})


@pytest.mark.parametrize("name", matrix(["gemma2", "gpt_oss", "deepseek_v4"], ["gemma2"]))
def test_a_mask_of_bools_that_eager_code_adds(name: str) -> None:
    """As numbers, so that it hides no key: the same with `accelerate`, whatever the user meant."""
    models = pair(name)
    ahead = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    given = {"input_ids": IDS, "attention_mask": ahead, "use_cache": False}
    assert not torch.equal(models[0](**given).logits, models[0](input_ids=IDS, use_cache=False).logits)
    agree(models, given)


@pytest.mark.parametrize("name", ["qwen3", "bloom"])
def test_attention_in_both_directions(name: str) -> None:
    """Said in the call, which BLOOM does not heed, and by the configuration, with padding and without."""
    agree(pair(name), {"input_ids": IDS, "is_causal": False})
    models = pair(name)
    ahead = models[0](input_ids=IDS).logits
    for model in models:
        model.config.is_causal = False
    assert not torch.equal(models[0](input_ids=IDS).logits, ahead)
    agree(models, {"input_ids": IDS})
    agree(models, {"input_ids": IDS, "attention_mask": HALF}, HALF)


def gradient(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Of a projection of keys, by a loss that leaves out what is padding."""
    weight: Tensor = model.model.layers[0].self_attn.k_proj.weight.requires_grad_()
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    model(**given, labels=labels).loss.backward()
    assert weight.grad is not None
    return weight.grad


def test_padding_that_counts() -> None:
    """A loss takes what stands before the first token, too: a query that sees no key. Eager code gives it the mean."""
    model, fast = pair("gemma2")
    given = {"input_ids": IDS, "attention_mask": HALF}
    with torch.no_grad():
        agree((model, fast), given)
    with exactly(model) as exact_model:
        exact = gradient(exact_model, given)
    no_worse(gradient(fast, given), gradient(model, given), exact)


def test_alibi_counts_the_keys_that_are_seen() -> None:
    mask = torch.ones_like(IDS)
    mask[0, 3:6] = 0  # padding on the right of a prompt that goes on
    agree(pair("bloom"), {"input_ids": IDS, "attention_mask": mask}, mask)


@pytest.mark.parametrize("name", ["qwen3", "hunyuan_v1_dense"])
def test_autocast(name: str) -> None:
    """Norms of q and k are float32 under it, v is bfloat16."""
    models = pair(name)
    with torch.autocast("cpu", torch.bfloat16):
        agree(models, {"input_ids": IDS, "use_cache": False})


def shapes_of_calls(model: Any) -> list[Any]:
    """(name, shapes of input and output) of calls of the modules that hold no others, in a list that fills."""
    found: list[Any] = []

    def hook(name: str) -> Any:
        return lambda module, args, y: found.append((name, args[0].shape, y.shape))

    for name, module in model.named_modules():
        if not any(True for _ in module.children()) and "rotary" not in name:
            module.register_forward_hook(hook(name))
    return found


# Norms of q and k get heads before tokens, all heads at once, a norm for each head, or tokens before heads.
HEADS = ("gemma3", "phi", "exaone4", "hunyuan_v1_dense", "hunyuan_v1_moe", "olmo2", "olmo3", "stablelm", "qwen3")


@pytest.mark.parametrize(
    "name", matrix(["llama", "gpt2", "bloom", "falcon", *HEADS], ["gpt2", "phi", "olmo2", "bloom"])
)
def test_hooks_see_what_the_model_gives(name: str) -> None:
    models = pair(name)
    calls = [shapes_of_calls(model) for model in models]
    tokens = [model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False) for model in models]
    assert torch.equal(*tokens)
    assert sorted(calls[0]) == sorted(calls[1]) != []  # q, k and v are projected before q is normed


@pytest.mark.parametrize("part", ["q_proj", "o_proj", "gate_proj", "down_proj", "act_fn"])
def test_a_forward_in_the_place_of_a_layers_own(part: str) -> None:
    """As accelerate's hooks put it there."""
    model = _tools["adapted"](tiny("llama"), "nf4", "lora" if part == "q_proj" else "none")
    fast = copy.deepcopy(model)
    fastpeft.accelerate(fast)
    for one in (model, fast):
        for name, module in one.named_modules():
            if name.endswith(part):
                module.forward = lambda x, own=module.forward: own(x) + 1
    with torch.no_grad():
        caches = [one(input_ids=IDS).past_key_values for one in (model, fast)]
        first, second = (one(input_ids=IDS[:, :1], past_key_values=c).logits
                         for one, c in zip((model, fast), caches, strict=True))  # fmt: skip
    agree((model, fast), {"input_ids": IDS})
    assert torch.equal(first.argmax(-1), second.argmax(-1))


def test_an_activation_of_a_users_own() -> None:
    class SiLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    models = pair("llama")
    for layer in (layer for model in models for layer in model.model.layers):
        layer.mlp.act_fn = SiLU()
    agree(models, {"input_ids": IDS})


@pytest.mark.parametrize("in_4_bits", [False, True])
def test_a_decoder_of_two_caches(in_4_bits: bool) -> None:
    """GPT-2 beside an encoder: the cache of its self-attention is one of a pair."""
    options = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    encoder = transformers.BertModel(transformers.BertConfig(**options, intermediate_size=32))
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, add_cross_attention=True,
                                     bos_token_id=1, eos_token_id=None)  # fmt: skip
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=transformers.GPT2LMHeadModel(config)).eval()
    if in_4_bits:
        fastpeft.quantize_model(model, "nf4", skip=["lm_head"])
    given = {"input_ids": IDS, "decoder_start_token_id": 1, "pad_token_id": 0, "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(**given)
    fastpeft.accelerate(model)
    assert torch.equal(model.generate(**given), plain)


def test_one_graph() -> None:
    model, fast = pair("llama")
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    by_head = torch.ones(2, 4, 9, 9, dtype=torch.bool).tril()
    by_head[:, 1, :, 1] = False  # which the op does not take
    with torch.no_grad():
        agree((model, compiled), {"input_ids": IDS, "attention_mask": HALF, "use_cache": False}, HALF)
        agree((model, compiled), {"input_ids": IDS, "attention_mask": by_head, "use_cache": False})


def test_layers_of_a_copy_share_what_a_forward_made() -> None:
    fast = pair("llama")[1]
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        shared = {id(m._fastpeft.shared) for m in other.modules() if "_fastpeft" in m.__dict__}
        assert len(shared) == 1
        assert id(fast.model.norm._fastpeft.shared) not in shared


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_undone_below_a_class_that_others_made() -> None:
    """Parametrizations and FSDP2 give a module a subclass of its class."""
    model, fast = pair("llama")
    for one in (model, fast):
        for path in ("model.norm", "model.layers.0.mlp", "model.layers.0.mlp.down_proj"):
            part = one.get_submodule(path)
            if not hasattr(part, "weight"):
                part.register_parameter("weight", nn.Parameter(torch.ones(1)))
            parametrize.register_parametrization(part, "weight", _Twice())
    agree((model, fast), {"input_ids": IDS})
    assert fastpeft.unaccelerate(fast) == len(_accelerated(pair("llama")[1]))
    assert _accelerated(fast) == []
    agree((model, fast), {"input_ids": IDS})
    for path in ("model.norm", "model.layers.0.mlp"):
        parametrize.remove_parametrizations(fast.get_submodule(path), "weight")
        assert type(fast.get_submodule(path)) is type(tiny("llama").get_submodule(path))


def _accelerated(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if any(c.__name__.startswith("Fast") for c in type(m).__mro__)]


def test_the_head_of_a_model_whose_layers_came_first() -> None:
    model = tiny("llama")
    fastpeft.accelerate(model.model)
    assert type(model.lm_head) is nn.Linear
    report = fastpeft.accelerate(model)
    assert type(model.lm_head) is not nn.Linear
    report.remove()
    assert type(model.lm_head) is nn.Linear


def test_the_head_is_quantised_under_it() -> None:
    plain, fast = (fastpeft.quantize_model(model, skip=[]) for model in pair("llama"))
    assert type(fast.lm_head) is type(plain.lm_head) is not nn.Linear
    assert fastpeft.unaccelerate(fast)
    with torch.no_grad():
        assert_same_bits(fast(IDS).logits, plain(IDS).logits)
