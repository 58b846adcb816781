"""Tiny random models of other architectures as GGUF files: keys, names and values as llama.cpp's converter has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf_tools import Types, add_tensors, add_tokenizer, llama_rows

Arrays = dict[str, np.ndarray[Any, Any]]
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def same(name: str, w: np.ndarray[Any, Any], config: Any) -> Arrays:
    return {name: w}


def rows_of_llama(name: str, w: np.ndarray[Any, Any], config: Any) -> Arrays:
    heads = {"attn_q.": config.num_attention_heads, "attn_k.": config.num_key_value_heads}
    return {name: next((llama_rows(w, n) for part, n in heads.items() if part in name), w)}


def norms_plus_one(name: str, w: np.ndarray[Any, Any], config: Any) -> Arrays:
    return {name: w + 1 if name.endswith("norm.weight") else w}


def transposed(name: str, w: np.ndarray[Any, Any], config: Any) -> Arrays:
    """Of GPT-2's Conv1D."""
    ends = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return {name: w.T if name.endswith(ends) else w}


def squeezed(name: str, w: np.ndarray[Any, Any], config: Any) -> Arrays:
    """Vectors that transformers has as matrices of a row, or kernels of a channel."""
    return {name: w.squeeze() if 1 in w.shape else w}


@dataclass(frozen=True)
class Family:
    """One architecture. arch: llama.cpp's name. values: of keys beside the usual ones, by the configuration."""

    arch: str
    model_type: str
    settings: Mapping[str, Any]
    convert: Callable[[str, np.ndarray[Any, Any], Any], Arrays] = same
    values: Callable[[Any], dict[str, Any]] = field(default=lambda config: {})


def _head_dim(config: Any) -> dict[str, Any]:
    return {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}


def _experts(config: Any) -> dict[str, Any]:
    count = getattr(config, "num_experts", None) or config.num_local_experts
    found = {"expert_count": count, "expert_used_count": config.num_experts_per_tok}
    if hasattr(config, "moe_intermediate_size"):
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    if hasattr(config, "shared_expert_intermediate_size"):
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return found


def _gemma(config: Any) -> dict[str, Any]:
    return {**_head_dim(config), "attention.sliding_window": config.sliding_window}


_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 6}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "llama", SIZES, rows_of_llama),
    "mistral": Family("llama", "mistral", {**SIZES, "sliding_window": None}, rows_of_llama),
    "qwen2": Family("qwen2", "qwen2", SIZES),
    "qwen3": Family("qwen3", "qwen3", {**SIZES, "head_dim": 32}, values=_head_dim),
    "gemma2": Family("gemma2", "gemma2", {**SIZES, **_GEMMA}, norms_plus_one, _gemma),
    "gemma3": Family("gemma3", "gemma3_text", {**SIZES, **_GEMMA, "num_hidden_layers": 7}, norms_plus_one, _gemma),
    "phi3": Family("phi3", "phi3", SIZES),
    "gpt2": Family("gpt2", "gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, transposed),
    "falcon": Family("falcon", "falcon", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "stablelm": Family("stablelm", "stablelm", SIZES),
    "starcoder2": Family("starcoder2", "starcoder2", SIZES),
    "nemotron": Family("nemotron", "nemotron", SIZES, norms_plus_one),
    "qwen2moe": Family("qwen2moe", "qwen2_moe", {**SIZES, **_EXPERTS, "shared_expert_intermediate_size": 64}, squeezed,
                       _experts),
    "qwen3moe": Family("qwen3moe", "qwen3_moe", {**SIZES, **_EXPERTS, "head_dim": 32, "norm_topk_prob": True}, squeezed,
                       lambda config: {**_head_dim(config), **_experts(config)}),
    "mixtral": Family("llama", "mixtral", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}, rows_of_llama,
                      _experts),
}  # fmt: skip


def tiny_model(name: str, seed: int = 0, tie: bool | None = None, **options: Any) -> Any:
    """A random model of a family in float32, norms and biases too, its tokens those of a byte-level tokenizer."""
    from fastpeft.apps.training.testing import make_byte_tokenizer

    family, tokenizer = FAMILIES[name], make_byte_tokenizer()
    extra = {} if tie is None else {"tie_word_embeddings": tie}
    config = transformers.AutoConfig.for_model(
        family.model_type, **{**family.settings, **extra, **options}, vocab_size=len(tokenizer) + 1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.add_(torch.randn_like(value) * 0.1)
    return model.eval()


def write_family(
    name: str, model: Any, path: Path, types: Types = "Q8_0", embedding: str = "Q8_0",
    change: Callable[[dict[str, Any]], object] | None = None, values: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A model of a family as a GGUF file; values: of more keys, without the architecture's name before them."""
    from fastpeft.apps.training.testing import make_byte_tokenizer

    family, config = FAMILIES[name], model.config
    writer = gguf.GGUFWriter(path, family.arch)
    writer.add_name("tiny")
    add_keys(writer, config)
    for key, value in {**family.values(config), **(values or {})}.items():
        add = {float: writer.add_float32, str: writer.add_string}.get(type(value), writer.add_uint32)
        add(f"{family.arch}.{key}", value)
    add_tokenizer(writer, make_byte_tokenizer(), config.vocab_size)
    arch = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == family.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = model.all_tied_weights_keys
    arrays: Arrays = {}
    for key, value in model.state_dict().items():
        if key in tied:
            continue
        w = value.float().numpy()
        if key.endswith("experts.gate_up_proj"):
            layer = key.split(".")[2]
            for part, half in zip(("gate", "up"), np.split(w, 2, axis=1), strict=True):
                arrays[f"blk.{layer}.ffn_{part}_exps.weight"] = half
            continue
        own = names.get_name(key, try_suffixes=(".weight", ".bias"))
        arrays |= family.convert(own if own.endswith((".weight", ".bias")) else f"{own}.weight", w, config)
    add_tensors(writer, arrays, types, embedding, change)
    return path


def add_keys(writer: Any, config: Any) -> None:
    """Keys that every architecture has."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(getattr(config, "max_position_embeddings", 256))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    multi_query = getattr(config, "multi_query", False)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    writer.add_head_count_kv(1 if multi_query else heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"):
        if hasattr(config, key):
            writer.add_layer_norm_eps(getattr(config, key))
    theta = getattr(config, "rope_parameters", None) or {}
    theta = theta.get("full_attention", theta)
    if "rope_theta" in theta:
        writer.add_rope_freq_base(theta["rope_theta"])
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(head * theta.get("partial_rotary_factor", 1.0)))
    writer.add_vocab_size(config.vocab_size)
