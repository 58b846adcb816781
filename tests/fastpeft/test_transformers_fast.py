"""Faster Llama models: the same numbers as transformers' own code, the same keys, and undone without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import fastpeft
from fastpeft import accelerate
from fastpeft.apps.short_attention import short_attention
from fastpeft.layer.by_row import mixed as routing
from transformers import LlamaConfig, LlamaForCausalLM

from peft_kernels import PreparedCall, use_backend
from peft_kernels.testing import assert_no_worse, assert_same_bits

DTYPES = [torch.float32, torch.bfloat16]


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for p in model.parameters():  # larger than the usual start, so that mistakes are larger than rounding
        torch.nn.init.normal_(p, std=0.2)
    return model.to(dtype).eval()


def adapted(dtype: torch.dtype = torch.float32) -> fastpeft.PeftModel:
    model = fastpeft.get_peft_model(llama(dtype), fastpeft.LoraConfig(r=4, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def next_logits(model: torch.nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the last token, decoded with the cache of those before it."""
    with torch.no_grad():
        first = None if mask is None else mask[:, :-1]
        cache = model(input_ids=ids[:, :-1], attention_mask=first, use_cache=True).past_key_values
        return model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]


def compare(fast: Tensor, plain: Tensor, exact: Tensor) -> None:
    """assert_no_worse over a whole model: an element is one of many sums, so the largest error of each is compared."""
    worst = [(t.double() - exact).abs().max().reshape(1) for t in (fast, plain)]
    zero = torch.zeros(1, dtype=torch.float64)
    assert_no_worse(worst[0].to(fast.dtype), worst[1].to(fast.dtype), zero, exact.abs().max().reshape(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_gives_the_same_logits(dtype: torch.dtype, batch: int) -> None:
    model = adapted(dtype)
    ids = torch.randint(1, 101, (batch, 9))
    plain = next_logits(model, ids)
    exact = next_logits(copy.deepcopy(model).double(), ids)
    handle = accelerate(model)
    assert handle.modules == 2 * 4 + 1 + 1  # attentions, MLPs, 2 x 2 + 1 norms, head
    compare(next_logits(model, ids), plain, exact)


def test_decoding_with_a_padded_batch() -> None:
    model = adapted()
    ids = torch.randint(1, 101, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    plain, exact = next_logits(model, ids, mask), next_logits(copy.deepcopy(model).double(), ids, mask)
    accelerate(model)
    compare(next_logits(model, ids, mask), plain, exact)


def test_generate_gives_the_same_tokens() -> None:
    model = adapted()
    ids = torch.randint(1, 101, (1, 5))
    want = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    accelerate(model)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=12, do_sample=False), want)


def mixed(dtype: torch.dtype) -> fastpeft.PeftModel:
    """A model on NF4 with adapters `default`, `a` and, of other layers, `b`."""
    model = quantised("all-linear").to(dtype)
    model.add_adapter("a", fastpeft.LoraConfig(r=3, target_modules=["q_proj", "up_proj", "down_proj"]))
    model.add_adapter("b", fastpeft.LoraConfig(r=2, target_modules=["o_proj", "gate_proj"], use_rslora=True))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval().requires_grad_(False)


def quick_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """True if each call of `Routed.quick` served."""
    found, quick = [], routing.Routed.quick

    def counted(self: routing.Routed, x: Tensor) -> Tensor | None:
        y = quick(self, x)
        found.append(y is not None)
        return y

    monkeypatch.setattr(routing.Routed, "quick", counted)
    return found


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_rows_of_several_adapters(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are those of the layers' own way; writes between two forwards are seen, and so is another backend."""
    model, names, served = mixed(dtype), ["a", "b", "__base__", "default", "a"], quick_calls(monkeypatch)
    ids = torch.randint(1, 101, (len(names), 1))
    past = torch.randint(1, 101, (len(names), 5))

    def logits(m: torch.nn.Module) -> Tensor:
        with torch.no_grad():
            cache = m(input_ids=past, adapter_names=names, use_cache=True).past_key_values
            out = m(input_ids=ids, past_key_values=cache, adapter_names=names, use_cache=True)
        return out.logits[:, -1]

    def exact() -> Tensor:
        with use_backend("reference"):
            return logits(copy.deepcopy(model).double())

    with use_backend(backend):
        plain = logits(model)
        assert not served
        accelerate(model)
        compare(logits(model), plain, exact())
        layers = [m for m in model.modules() if type(m) is fastpeft.layer.layer.AdapterLayer]
        assert sum(served) >= len(layers) / 2  # a layer of one group of rows is an ordinary call
        with torch.no_grad():
            for p in (p for name, p in model.named_parameters() if "lora_B.a." in name):
                p.mul_(-3)
        changed = logits(model)
        compare(changed, logits(copy.deepcopy(model)), exact())
        assert not torch.equal(changed[0], plain[0])


def test_generating_rows_of_several_adapters() -> None:
    model, names = mixed(torch.float32), ["a", "b", "__base__", "default"]
    inputs = {"input_ids": torch.randint(1, 101, (4, 5)), "max_new_tokens": 8, "do_sample": False}
    want = model.generate(**inputs, adapter_names=names)
    accelerate(model)
    assert torch.equal(model.generate(**inputs, adapter_names=names), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_gives_the_same_gradients(dtype: torch.dtype) -> None:
    model = adapted(dtype).train()
    ids = torch.randint(1, 101, (2, 11))

    def gradients(m: torch.nn.Module) -> Tensor:
        m.zero_grad()
        m(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])

    plain, exact = gradients(model), gradients(copy.deepcopy(model).double())
    accelerate(model)
    compare(gradients(model), plain, exact)


def quantised(targets: object, dropout: float = 0.0) -> fastpeft.PeftModel:
    model = llama(torch.bfloat16)
    fastpeft.quantize_model(model, "nf4", double_quant=True, skip=["lm_head"])
    config = fastpeft.LoraConfig(r=4, target_modules=targets, lora_dropout=dropout)
    model = fastpeft.get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.train()


def losses_and_gradients(model: torch.nn.Module, ids: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [loss.detach().reshape(1), torch.cat(grads)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the model called the functions that fuse several layers."""
    seen = {"lora_linear_stacked": 0, "gated_mlp": 0}
    prepared = PreparedCall.__call__

    def counted(self: Any, *args: Any) -> Any:
        name = self._function.__name__
        if name in seen:
            seen[name] += 1
        return prepared(self, *args)

    monkeypatch.setattr(PreparedCall, "__call__", counted)
    return seen


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]], ids=str)
def test_training_through_stacks(targets: object, dropout: float, fused: dict[str, int]) -> None:
    """Layers with adapters and without, and the same dropout masks as one layer after the other draws."""
    model, ids = quantised(targets, dropout), torch.randint(1, 101, (2, 11))
    plain = losses_and_gradients(model, ids)
    assert fused == {"lora_linear_stacked": 0, "gated_mlp": 0}
    with use_backend("reference"):
        exact = losses_and_gradients(copy.deepcopy(model).double(), ids)
    accelerate(model)
    ours = losses_and_gradients(model, ids)
    assert fused == {"lora_linear_stacked": 2, "gated_mlp": 2}
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        compare(mine.bfloat16(), theirs.bfloat16(), right)  # adapters are float32, what is rounded is bfloat16


def test_the_first_step_is_as_every_other(fused: dict[str, int]) -> None:
    """A layer makes its plan when it is asked for it: after loading, `train()` or a change no step goes another way."""
    model, ids = quantised("all-linear", 0.3), torch.randint(1, 101, (2, 11))
    accelerate(model)
    first = losses_and_gradients(model, ids)
    assert fused == {"lora_linear_stacked": 2, "gated_mlp": 2}
    for change in (model.eval, model.train):
        change()
    for _ in range(2):
        for again, then in zip(losses_and_gradients(model, ids), first, strict=True):
            assert_same_bits(again, then)
    assert fused == {"lora_linear_stacked": 6, "gated_mlp": 6}


def test_training_of_layers_that_are_not_plain_calls_them(fused: dict[str, int]) -> None:
    model, ids = quantised("all-linear"), torch.randint(1, 101, (2, 11))
    accelerate(model)
    first, second = model.get_base_model().model.layers
    seen = []
    handles = [
        first.self_attn.k_proj.register_forward_hook(lambda *_: seen.append("k")),
        first.mlp.up_proj.register_full_backward_hook(lambda *_: seen.append("up")),
        second.mlp.down_proj.lora_A["default"].register_forward_hook(lambda *_: seen.append("down")),
    ]
    losses_and_gradients(model, ids)
    assert seen == ["k", "down", "up"]
    assert fused == {"lora_linear_stacked": 1, "gated_mlp": 0}
    for handle in handles:
        handle.remove()
    model.disable_adapter_layers()
    model(input_ids=ids)
    assert fused["gated_mlp"] == 0, "disabled adapters leave no plan"


def test_undone_without_a_trace() -> None:
    model = adapted()
    classes = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    logits = model(input_ids=torch.arange(1, 6)[None]).logits
    handle = accelerate(model)
    assert list(model.state_dict()) == keys
    handle.remove()
    assert [type(m) for m in model.modules()] == classes
    assert not any("_fastpeft" in name for m in model.modules() for name in m.__dict__)
    assert_same_bits(model(input_ids=torch.arange(1, 6)[None]).logits, logits)


def test_accelerating_twice_changes_nothing_more() -> None:
    model = adapted()
    first = [type(m) for m in model.modules()] if accelerate(model) else []
    assert accelerate(model).modules == 2 * 4 + 1 + 1
    assert [type(m) for m in model.modules()] == first


def test_hooks_on_inner_modules_still_run() -> None:
    model = adapted()
    accelerate(model)
    seen = []
    hook = model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    next_logits(model, torch.randint(1, 101, (1, 4)))
    hook.remove()
    assert len(seen) == 2, "prefill and one token"


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer of a described family"):
        accelerate(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_short_attention(dtype: torch.dtype, masked: bool) -> None:
    q, k, v = (torch.randn(2, h, 7, 16).to(dtype) for h in (4, 2, 2))
    keep = torch.ones(7, 7, dtype=torch.bool).tril_()
    if masked:  # packed rows: attention stays inside an example
        keep = keep & (torch.arange(7)[:, None] // 4 == torch.arange(7)[None] // 4)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.transpose(2, 3) * 0.25).masked_fill(~keep, -torch.inf)
        return torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v

    exact = eager(q.double(), k.double(), v.double())
    largest = exact.abs().amax().expand(exact.shape)
    assert_no_worse(short_attention(q, k, v, keep, 0.25), eager(q, k, v), exact, largest)
