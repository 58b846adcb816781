"""A token's attention is kept from one call to the next: whatever is changed under it, the layer looks again. A token's
experts are sorted without torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fastpeft
import pytest
import torch
import transformers
from fastpeft.families import experts
from fastpeft.families.token import Tokens
from torch import nn

from peft_kernels.testing import assert_same_bits

from . import token_tools
from .token_tools import fresh, seen, token


def model(family: str = "Llama") -> Any:
    """A model of two layers in 4 bits with two adapters, accelerated."""
    torch.manual_seed(0)
    options = {"head_dim": 16} if family == "Qwen3" else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **options,
    )  # fmt: skip
    base = getattr(transformers, f"{family}ForCausalLM")(config)
    base = fastpeft.quantize_model(base, "nf4", skip=["lm_head"])
    settings = {"target_modules": "all-linear", "init_lora_weights": False, "lora_dropout": 0.5}
    found = fastpeft.get_peft_model(base, fastpeft.LoraConfig(r=4, **settings)).eval()
    found.add_adapter("other", fastpeft.LoraConfig(r=2, **settings))
    fastpeft.accelerate(found)
    return found


def attention(found: Any) -> Any:
    return found.get_base_model().model.layers[0].self_attn


def tokens(found: Any) -> list[Tokens]:
    layers = found.get_base_model().model.layers
    return [layer.self_attn._fastpeft.tokens for layer in layers]


def begun(found: Any) -> Any:
    cache = token_tools.begun(found)
    assert all(one.kept is not None for one in tokens(found))
    return cache


def _data(found: Any) -> None:
    attention(found).q_proj.lora_A["default"].weight.data = torch.randn(4, 64)


def _replaced(found: Any) -> None:
    attention(found).o_proj.lora_B["default"].weight = nn.Parameter(torch.randn(64, 4))


def _entry(found: Any) -> None:
    attention(found).v_proj.scaling["default"] = 7.0


def _layer(found: Any) -> None:
    attention(found).k_proj = copy.deepcopy(attention(found).v_proj)


def _hook(found: Any) -> None:
    attention(found).q_proj.register_forward_hook(lambda _module, _args, y: 2 * y)


def _inner_hook(found: Any) -> None:
    attention(found).o_proj.lora_A["default"].register_forward_hook(lambda _module, _args, y: 2 * y)


def _eager(found: Any) -> None:
    attention(found).config._attn_implementation = "eager"


CHANGES: dict[str, Callable[[Any], Any]] = {
    "data": _data, "replaced": _replaced, "scaling": _entry, "layer": _layer, "hook": _hook, "inner hook": _inner_hook,
    "eager": _eager, "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "another adapter": lambda m: m.set_adapter("other"), "merged": lambda m: m.merge_adapter(),
    "nothing": lambda m: None,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: str) -> None:
    found = model()
    cache = begun(found)
    before = token(found, cache)
    CHANGES[change](found)
    after = token(found, cache)
    assert_same_bits(after, fresh(found, cache))
    if change not in ("eager", "merged"):  # the same but for rounding
        assert torch.equal(after, before) == (change == "nothing")


def _norm_data(found: Any) -> None:
    attention(found).q_norm.weight.data = torch.randn(16)


def _norm_weight(found: Any) -> None:
    attention(found).k_norm.weight = nn.Parameter(torch.randn(16))


def _norm_hook(found: Any) -> None:
    attention(found).q_norm.register_forward_hook(lambda _module, _args, y: 2 * y)


def _norm_forward(found: Any) -> None:
    norm = attention(found).k_norm
    norm.forward = lambda x: x


def _norm(found: Any) -> None:
    attention(found).q_norm = copy.deepcopy(attention(found).k_norm)
    attention(found).q_norm.weight.data *= 3


def _norm_eps(found: Any) -> None:
    attention(found).q_norm.variance_epsilon = 1.0


@pytest.mark.parametrize("change", [_norm_data, _norm_weight, _norm_hook, _norm_forward, _norm, _norm_eps])
def test_changes_of_norms_are_seen(change: Callable[[Any], None]) -> None:
    found = model("Qwen3")
    begun(found)
    assert all(one.kept is not None and one.kept.norms is not None for one in tokens(found))
    seen(found, change)


@pytest.mark.parametrize("options", [
    {"attention_mask": torch.ones(1, 10, dtype=torch.long)}, {"output_attentions": True},
    {"attention_mask": torch.tensor([[0] * 5 + [1] * 5])}, {"position_ids": torch.tensor([[3]])},
], ids=str)  # fmt: skip
def test_other_arguments_are_seen(options: dict[str, Any]) -> None:
    found = model()
    cache = begun(found)
    after = token(found, cache, **options)
    assert_same_bits(after, fresh(found, cache, **options))


def test_copies_and_pickles_keep_nothing() -> None:
    found = model()
    begun(found)
    assert all(one.kept is None for one in tokens(copy.deepcopy(found)))


@pytest.mark.parametrize("index", [[[5, 2]], [[1, 1], [0, 6], [6, 1]], [[7, 3, 0]], [[9, 4], [4, 8]]])
def test_few_tokens_are_sorted_as_many_are(index: list[list[int]]) -> None:
    """Numbers from 7 on are experts that are elsewhere."""
    given = torch.tensor(index)
    few, many = (sort(given, 7) for sort in (experts._sorted_few, experts._sorted))
    for mine, theirs in zip(few, many, strict=True):
        assert_same_bits(mine, theirs)
    rows, offsets, order = few
    assert torch.equal(given.flatten()[order], given.flatten().sort().values)
    assert torch.equal(rows[order.argsort()].view_as(given), torch.arange(len(given))[:, None].expand_as(given))
    assert offsets.tolist() == [int((given < e).sum()) for e in range(8)]


def test_few_tokens_have_the_bits_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=1,
                                        num_local_experts=5, num_experts_per_tok=3)  # fmt: skip
    found = transformers.MixtralForCausalLM(config)
    fastpeft.accelerate(found)
    module, x = found.model.layers[0].mlp.experts, torch.randn(experts.FEW, 64)
    index, weights = torch.stack([torch.randperm(5)[:3] for _ in x]), torch.rand(len(x), 3)
    sort, seen = experts._sorted_few, []
    monkeypatch.setattr(experts, "_sorted_few", lambda *given: seen.append(1) or sort(*given))
    few = module(x, index, weights)
    monkeypatch.setattr(experts, "FEW", 0)
    assert_same_bits(few, module(x, index, weights))
    assert len(seen) == 1
