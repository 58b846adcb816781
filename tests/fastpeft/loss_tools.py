"""Tools of the tests of the loss by chunks: small models of many families, one step of them, and what is compared."""

from __future__ import annotations

import copy
from typing import Any

import fastpeft
import pytest
import torch
import transformers
from fastpeft.recipes import chunked_loss
from fastpeft.recipes.lazy_logits import LazyLogits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels.testing import assert_no_worse

V, H = 101, 16
SMALL = {"hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": V,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GQA = {**SMALL, "num_key_value_heads": 1}
GPT = {"n_embd": H, "n_layer": 2, "n_head": 2, "vocab_size": V, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 1, "output_router_logits": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**GQA, "tie_word_embeddings": True}, "MistralForCausalLM": GQA, "Qwen3ForCausalLM": GQA,
    "Gemma2ForCausalLM": {**GQA, "head_dim": 8, "final_logit_softcapping": 3.0}, "CohereForCausalLM": GQA,
    "GraniteForCausalLM": {**GQA, "logits_scaling": 3.0}, "Olmo2ForCausalLM": GQA, "StableLmForCausalLM": GQA,
    "MixtralForCausalLM": {**GQA, **EXPERTS, "num_local_experts": 2},
    "Qwen2MoeForCausalLM": {**GQA, **EXPERTS, "num_experts": 2, "moe_intermediate_size": 8,
                            "shared_expert_intermediate_size": 8, "decoder_sparse_step": 1},
    "PhiForCausalLM": GQA, "GPT2LMHeadModel": {**GPT, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "GPTJForCausalLM": {**GPT, "rotary_dim": 8}, "GPTNeoXForCausalLM": SMALL,
    "OPTForCausalLM": {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": H, "dropout": 0.0},
    "BloomForCausalLM": {**GPT, "hidden_size": H}, "FalconForCausalLM": SMALL,
    "MptForCausalLM": {"d_model": H, "n_layers": 2, "n_heads": 2, "vocab_size": V},
    "BertLMHeadModel": {**SMALL, "is_decoder": True, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
    "T5ForConditionalGeneration": {"d_model": H, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
                                   "vocab_size": V, "dropout_rate": 0.0, "decoder_start_token_id": 0},
}  # fmt: skip


def made(name: str = "LlamaForCausalLM", **options: Any) -> Any:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**FAMILIES[name], **options}))
    if "num_experts_per_tok" in FAMILIES[name]:
        model.set_experts_implementation("eager")  # the other one has no float64
    for p in model.parameters():  # larger than the usual start, so that mistakes are larger than rounding
        torch.nn.init.normal_(p, std=0.3)
    return model.train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, V, (3, 17), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :6] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK_VOCAB", 16)
    monkeypatch.setattr(chunked_loss, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(chunked_loss, "WHOLE_TOKENS", 2)


class Wide(TorchDispatchMode):
    """Notes functions that make a score of each token for each entry of the vocabulary, or half as many."""

    def __init__(self, vocabulary: int = V, tokens: int = 3 * 17) -> None:
        super().__init__()
        self.vocabulary, self.least = vocabulary, tokens * vocabulary // 2
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and self.vocabulary in t.shape[-1:] and t.numel() >= self.least:
                self.seen.add(str(func))
        return out


def trained(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """Loss and gradients of one step."""
    model.zero_grad()
    loss = model(**(batch() | inputs)).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def exactly(model: nn.Module, **inputs: Any) -> dict[str, Tensor]:
    """The step in float64, also where the model's code has float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        return trained(copy.deepcopy(model).double(), **inputs)


def assert_as_good(ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """No further from `exact` than they are, by the largest error of each loss and gradient."""
    assert ours.keys() == theirs.keys() == exact.keys()
    assert len(ours) > 1
    largest = max(float(t.abs().max()) for t in exact.values())
    for name, best in exact.items():
        worst = (theirs[name].double() - best).abs().max()
        assert ours[name].dtype is theirs[name].dtype
        assert_no_worse(ours[name], (best + worst).to(ours[name].dtype), best, torch.full_like(best, largest))


def agree(a: Any, b: Any) -> bool:
    """True if results are equal to float32's resolution of the largest element."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return bool(((a - b).abs() <= 16 * torch.finfo(torch.float32).eps * b.abs().max()).all())


def beside_unchanged(model: nn.Module, exact: nn.Module | None = None, **inputs: Any) -> Any:
    """The report of `accelerate(loss=True)` after a step was compared. exact: the model with dense weights."""
    right, before = exactly(model if exact is None else exact, **inputs), trained(model, **inputs)
    with torch.no_grad():
        logits = model(**(batch() | inputs)).logits
    report = fastpeft.accelerate(model, layers=False, loss=True)
    with Wide() as wide:
        after = trained(model, **inputs)
    assert wide.seen == set()
    assert_as_good(after, before, right)
    assert report.losses == report.chunked == 1
    assert not report.whole
    with torch.no_grad():
        lazy = model(**(batch() | inputs)).logits
    assert type(lazy) is LazyLogits
    assert torch.equal(lazy + 0, logits)
    assert lazy.dtype is logits.dtype
    return report
