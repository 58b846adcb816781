"""An MLP, a layer that holds one, heads of one projection and the output head are kept between tokens: whatever is
changed under them is seen in the next."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fastpeft
import pytest
import torch
import transformers
from fastpeft.families.head import CALL
from torch import nn

from peft_kernels.testing import assert_same_bits

from .token_tools import IDS, begun, fresh, seen, states, token

OPTIONS: dict[str, dict[str, Any]] = {
    "Llama": {"intermediate_size": 96, "num_key_value_heads": 2},
    "Phi3": {"intermediate_size": 96, "num_key_value_heads": 2, "pad_token_id": 0},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "GPT2": {},
}
MLPS = ("Llama", "Phi3", "GPT2")


def model(family: str) -> Any:
    """A model of two layers in 4 bits with an adapter, accelerated."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=False,
        **OPTIONS[family],
    )  # fmt: skip
    cls = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    base = fastpeft.quantize_model(getattr(transformers, cls)(config), "nf4", skip=["lm_head"])
    settings = {"target_modules": "all-linear", "init_lora_weights": False, "lora_dropout": 0.5}
    found = fastpeft.get_peft_model(base, fastpeft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).eval()
    fastpeft.accelerate(found)
    return found


def parts(found: Any) -> tuple[Any, str, str, str, str]:
    """Of the first layer: the module that has the MLP's layers, names of the first, the activation, the last; and of
    the attention's first layer."""
    base = found.get_base_model()
    if hasattr(base, "transformer"):
        return base.transformer.h[0].mlp, "c_fc", "act", "c_proj", "c_attn"
    layers = getattr(base.model, "decoder", base.model).layers
    if hasattr(layers[0], "fc1"):
        return layers[0], "fc1", "activation_fn", "fc2", "q_proj"
    if hasattr(layers[0].mlp, "gate_up_proj"):
        return layers[0].mlp, "gate_up_proj", "activation_fn", "down_proj", "qkv_proj"
    return layers[0].mlp, "gate_proj", "act_fn", "down_proj", "q_proj"


def _act(found: Any) -> None:
    of, _, act, *_ = parts(found)
    setattr(of, act, nn.Sigmoid())


def _act_served(found: Any) -> None:
    of, _, act, *_ = parts(found)
    setattr(of, act, nn.GELU())


def _act_hook(found: Any) -> None:
    of, _, act, *_ = parts(found)
    getattr(of, act).register_forward_hook(lambda _module, _args, y: 2 * y)


def _first(found: Any) -> None:
    of, up, *_ = parts(found)
    layer = copy.deepcopy(getattr(of, up))
    layer.lora_A["default"].weight.data.mul_(3)
    setattr(of, up, layer)


def _last_hook(found: Any) -> None:
    of, _, _, down, _ = parts(found)
    getattr(of, down).register_forward_pre_hook(lambda _module, args: (2 * args[0],))


def _last_forward(found: Any) -> None:
    of, _, _, down, _ = parts(found)
    own = getattr(of, down).forward
    getattr(of, down).forward = lambda x: 2 * own(x)


def _data(found: Any) -> None:
    of, up, *_ = parts(found)
    getattr(of, up).lora_A["default"].weight.data = torch.randn(4, 64)


def _in_place(found: Any) -> None:
    of, up, *_ = parts(found)
    with torch.no_grad():
        getattr(of, up).lora_B["default"].weight.mul_(2)


def _scaling(found: Any) -> None:
    of, _, _, down, _ = parts(found)
    getattr(of, down).scaling["default"] = 7.0


def _head_weight(found: Any) -> None:
    found.get_base_model().lm_head.weight = nn.Parameter(torch.randn(64, 64))


def _head_data(found: Any) -> None:
    found.get_base_model().lm_head.weight.data = torch.randn(64, 64)


def _head_in_place(found: Any) -> None:
    with torch.no_grad():
        found.get_base_model().lm_head.weight.mul_(2)


def _head_bias(found: Any) -> None:
    found.get_base_model().lm_head.bias = nn.Parameter(torch.randn(64))


CHANGES: list[Callable[[Any], Any]] = [
    _act, _act_served, _act_hook, _first, _last_hook, _last_forward, _data, _in_place, _scaling, _head_weight,
    _head_data, _head_in_place, _head_bias, lambda m: m.base_model.disable_adapter_layers(),
]  # fmt: skip


@pytest.mark.parametrize("family", OPTIONS)
def test_changes_are_seen(family: str) -> None:
    found = model(family)
    for change in CHANGES:
        seen(copy.deepcopy(found), change)


@pytest.mark.parametrize("family", OPTIONS)
def test_what_is_kept(family: str) -> None:
    found = model(family)
    begun(found)
    kept = states(found)
    assert any(state.tokens.kept is not None and state.tokens.kept.heads is not None for state in kept)
    assert any(state.mlp_token.kept is not None for state in kept) == (family in MLPS)
    assert any(state.given.now() is not None for state in kept) == (family == "OPT")
    assert CALL in found.get_base_model().lm_head.__dict__
    other = copy.deepcopy(found)
    assert all(s.mlp_token.kept is None and s.given.now() is None and s.tokens.kept is None for s in states(other))
    assert CALL not in other.get_base_model().lm_head.__dict__
    fastpeft.unaccelerate(found)
    assert CALL not in found.get_base_model().lm_head.__dict__


def test_attributes_of_a_layer_that_holds_its_mlp() -> None:
    def last(found: Any) -> Any:
        return found.get_base_model().model.decoder.layers[0]

    def norms(found: Any) -> None:
        last(found).do_layer_norm_before = False

    def norm(found: Any) -> None:
        last(found).final_layer_norm = nn.Identity()

    def norm_hook(found: Any) -> None:
        last(found).final_layer_norm.register_forward_hook(lambda _module, _args, y: 2 * y)

    for change in (norms, norm, norm_hook):
        seen(model("OPT"), change)


def test_a_batch_of_tokens() -> None:
    for family in ("Phi3", "GPT2"):
        found = model(family)
        with torch.no_grad():
            ids = torch.cat((IDS, IDS.flip(1)))
            cache = found(input_ids=ids, use_cache=True).past_key_values
            rows = [found(input_ids=ids[:, :1], past_key_values=copy.deepcopy(cache)).logits for _ in range(3)]
        assert_same_bits(rows[2], rows[0])


@pytest.mark.parametrize("family", OPTIONS)
def test_training_and_autocast_after_tokens(family: str) -> None:
    found = model(family)
    cache = begun(found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = token(found, cache)
        assert_same_bits(after, fresh(found, cache))
    begun(found)
    found.train()
    torch.manual_seed(1)
    one = token(found, cache)
    torch.manual_seed(1)
    assert_same_bits(one, fresh(found, cache))
