"""Small random models of the families that are described, and what is compared of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fastpeft
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from peft_kernels import use_backend
from peft_kernels.testing import assert_no_worse

VOCABULARY = 97
SHAPES: dict[str, dict[str, Any]] = {
    "groups": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
    "one": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1, "intermediate_size": 64},
}
WINDOW = 5  # shorter than the inputs
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DOWN = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
         "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
         "num_experts_per_tok": 2, "moe_intermediate_size": 32}  # fmt: skip
_LINEAR = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_num_key_heads": 2,
           "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
# Family, as its description is named -> its model_type where that is another name, and options.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("", {"attention_bias": True}),
    "mistral": ("", {"sliding_window": WINDOW}),
    "qwen2": ("", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("", {"head_dim": 24}),
    "gemma": ("", {"head_dim": 24}),
    "gemma2": ("", {"head_dim": 24, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}),
    "gemma3": ("gemma3_text", {"head_dim": 24, "sliding_window": WINDOW, "query_pre_attn_scalar": 20,
                               "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("", {"sliding_window": WINDOW}),
    "phi": ("", {"qk_layernorm": True}),
    "olmo2": ("", {}),
    "granite": ("", {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
                     "attention_multiplier": 0.3}),
    "smollm3": ("", {"no_rope_layers": [1, 0]}),
    "stablelm": ("", {"qk_layernorm": True}),
    "cohere": ("", {"use_qk_norm": True}),
    "cohere2": ("", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "glm": ("", {"head_dim": 16}),
    "glm4": ("", {"head_dim": 16}),
    "starcoder2": ("", {"sliding_window": WINDOW, "residual_dropout": 0.0}),
    "mixtral": ("", {**_EXPERTS, "sliding_window": WINDOW}),
    "qwen2_moe": ("", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("", {**_EXPERTS, "head_dim": 24}),
    "gpt_oss": ("", {**_EXPERTS, "head_dim": 16, "sliding_window": WINDOW}),
    "gpt2": ("", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt_neox": ("", {"rotary_pct": 0.5}),
    "opt": ("", {"ffn_dim": 96, "dropout": 0.0}),
    "falcon": ("", {"new_decoder_architecture": True}),
    "bloom": ("", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "deepseek_v2": ("", {**_DOWN, "topk_method": "greedy"}),
    "deepseek_v3": ("", _DOWN),
    "deepseek_v4": ("", {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "num_key_value_heads": 1,
                         "head_dim": 16, "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2,
                         "index_head_dim": 16, "index_topk": 4, "sliding_window": WINDOW, "hc_mult": 2,
                         "swiglu_limit": 1.0, "qk_rope_head_dim": 8, "partial_rotary_factor": 0.5,
                         "layer_types": ["sliding_attention", "heavily_compressed_attention"],
                         "mlp_layer_types": ["moe", "moe"],
                         "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}}),
    "nemotron": ("", {}),
    "ministral": ("", {"head_dim": 16, "sliding_window": WINDOW}),
    "ministral3": ("", {"head_dim": 16}),
    "llama4": ("llama4_text", {**_EXPERTS, "head_dim": 16, "intermediate_size_mlp": 96, "attention_chunk_size": 8}),
    "gemma4": ("gemma4_text", {"head_dim": 16, "global_head_dim": 32, "sliding_window": WINDOW,
                               "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
                               "num_kv_shared_layers": 0}),
    "olmo": ("", {}),
    "olmo3": ("", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "exaone4": ("", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "hunyuan_v1_dense": ("", {"head_dim": 16}),
    "hunyuan_v1_moe": ("", {**_EXPERTS, "head_dim": 16, "moe_topk": 2}),
    "qwen3_5": ("qwen3_5_text", _LINEAR),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**_EXPERTS, **_LINEAR}),
    "qwen3_next": ("", {**_EXPERTS, **_LINEAR}),
    "falcon_h1": ("", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}),
    "lfm2": ("", {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": ("", {**_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "granitemoe": ("", {**_EXPERTS, "residual_multiplier": 0.3, "attention_multiplier": 0.3}),
    "glm4_moe": ("", {**_DOWN, "head_dim": 16, "use_qk_norm": True}),
    "mamba": ("", {"state_size": 8, "intermediate_size": 128}),
    "nemotron_h": ("", {**_EXPERTS, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
                        "n_groups": 2, "layers_block_type": ["mamba", "attention"]}),
}  # fmt: skip


# Seeds at which rounding chooses no other experts, and is not amplified more in one computation than in another.
SEEDS = {"gpt_oss": 2, "deepseek_v3": 2, "deepseek_v4": 3, "llama4": 2, "qwen3_5_moe": 3, "granitemoe": 4,
         "glm4_moe": 1, "mamba": 2, "qwen3_vl_moe": 1, "glm4v_moe": 1, "paligemma": 1}  # fmt: skip
# Families of which no seed is so for all cases: the middle one of three models counts.
OF_THREE = ("gpt_oss", "llama4", "granitemoe", "glm4_moe", "mamba", "deepseek_v2", "deepseek_v3", "deepseek_v4",
            "qwen3_vl_moe", "glm4v_moe", "paligemma")  # fmt: skip


def draws(name: str) -> range:
    """Models of a family that are drawn for a comparison."""
    return range(3 if name in OF_THREE else 1)


def seed(name: str, draw: int) -> None:
    torch.manual_seed(SEEDS.get(name, 0) + draw)


def tiny(
    name: str, dtype: torch.dtype = torch.float32, shape: str = "groups", layers: int = 2, draw: int = 0
) -> Any:
    """A random causal model with weights larger than the usual start, so that mistakes are larger than rounding."""
    seed(name, draw)
    kind, options = FAMILIES[name]
    usual = {"vocab_size": VOCABULARY, "num_hidden_layers": layers, "max_position_embeddings": 128, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": None, **SHAPES[shape]}  # fmt: skip
    if name.startswith("deepseek"):
        usual["num_key_value_heads"] = usual["num_attention_heads"]
    if name == "falcon":
        usual["num_kv_heads"] = usual["num_key_value_heads"]
    if name == "opt":
        usual["word_embed_proj_dim"] = usual["hidden_size"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind or name, **{**usual, **options}))
    for path, p in model.named_parameters():
        nn.init.normal_(p, std=0.2) if p.dim() > 1 else nn.init.normal_(p, 0.5, 0.2)
        if path.endswith(("router.weight", "gate.weight", "gate.wg.weight")):  # scores of experts far apart:
            p.data.mul_(8)  # rounding does not choose others
    return model.to(dtype).eval().requires_grad_(False)


# Llama 4's router is a linear layer that returns two tensors, DeepSeek-V4's o_a_proj holds several matrices; kernels of
# state spaces read weights of these two.
NOT_ADAPTED = r".*\.(router|o_a_proj|(mamba|mixer)\.(out_proj|dt_proj))"


def drawn(model: Any) -> Any:
    """The model with a B of each LoRA that is not zero."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def adapted(model: Any, base: str, adapter: str) -> Any:
    """The model on a base ("dense", "nf4") with an adapter ("none", "lora", "dora") on its linear layers."""
    if base == "nf4":
        fastpeft.quantize_model(model, "nf4", skip=["lm_head", "embed_out", "dt_proj"])
    if adapter == "none":
        return model
    config = fastpeft.LoraConfig(r=4, target_modules="all-linear", use_dora=adapter == "dora",
                                 exclude_modules=NOT_ADAPTED)
    return drawn(fastpeft.get_peft_model(model, config))


class _Exact(TorchFunctionMode):
    """Casts of models' code to float32 are casts to float64 here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()})


@contextmanager
def exactly(model: Any) -> Iterator[Any]:
    """The model in float64, by torch's own operators and our reference."""
    exact = copy.deepcopy(model).double()
    if getattr(exact, "is_gradient_checkpointing", False):  # the mode below is this thread's, autograd's is another
        exact.gradient_checkpointing_disable()
    for module in exact.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None):
            config._experts_implementation = "eager"
    with use_backend("reference"), _Exact():
        yield exact


def worst(found: Tensor, exact: Tensor) -> Tensor:
    return (found.double() - exact).abs().max()


def logits_and_gradients(model: Any, given: dict[str, Tensor], trained: bool) -> tuple[Tensor, Tensor]:
    """Logits where no padding is, and gradients of what trains, or of the embedded input."""
    model.zero_grad()
    seen = given["attention_mask"].bool()
    embedded = []

    def keep(module: Any, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = None if trained else model.get_input_embeddings().register_forward_hook(keep)
    logits = model(**given, use_cache=False).logits[seen]
    if handle is not None:
        handle.remove()
    logits.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None] if trained else [embedded[0].grad[seen]]
    return logits.detach(), torch.cat([g.flatten() for g in grads])


def errors_of(
    model: Any, given: dict[str, Tensor], trained: bool, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The largest errors with `accelerate`, and without, and the largest number: of logits, and of gradients."""
    plain = logits_and_gradients(model, given, trained)
    with exactly(model) as exact_model:
        exactly_given = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
        exact = logits_and_gradients(exact_model, exactly_given, trained)
    report = fastpeft.accelerate(model)
    assert report.modules
    fast = logits_and_gradients(model, given, trained)
    report.remove()
    again = logits_and_gradients(model, given, trained)
    assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))
    # adapters are float32, what is rounded is the model's dtype
    return [(worst(a.to(dtype), right), worst(b.to(dtype), right), right.abs().max())
            for a, b, right in zip(fast, plain, exact, strict=True)]  # fmt: skip


def no_worse(fast: Tensor, plain: Tensor, exact: Tensor) -> None:
    """assert_no_worse over a whole model: an element is one of many sums, so the largest error of each is compared."""
    compare([[(worst(fast, exact), worst(plain, exact), exact.abs().max())]], fast.dtype)


def compare(found: list[list[tuple[Tensor, Tensor, Tensor]]], dtype: torch.dtype) -> None:
    """`no_worse` of a model that is drawn several times, or once.

    found: of each draw, `errors_of` it; the middle one counts.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    for drawn in zip(*found, strict=True):  # of logits; of gradients
        fast, plain, scale = sorted(drawn, key=lambda one: one[0] / one[1])[len(drawn) // 2]
        assert_no_worse(fast.reshape(1).to(dtype), plain.reshape(1).to(dtype), zero, scale.reshape(1))
