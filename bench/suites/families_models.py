"""Random models of the families that transformers has: one size for all, and where a family's options differ from it.

4 layers, hidden size 1024, 16 heads of 64 features over 4 of keys and values, vocabulary 32,000; mixtures have 8
experts of a quarter of the dense width, 2 a token. What is not named here is the family's default, dropouts included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDTH, PLAIN_WIDTH, EXPERT_WIDTH = 2816, 4096, 704  # of MLPs with a gate, of those without, of an expert
USUAL = {"num_hidden_layers": 4, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4,
         "vocab_size": 32_000, "intermediate_size": WIDTH, "max_position_embeddings": 2048,
         "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
# The causal families that are used most, in our judgement: those for which the issue asks something.
MARKED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "phi", "phi3",
          "gpt2", "gpt_neox", "gpt_oss", "opt", "falcon", "deepseek_v3", "olmo2", "granite", "smollm3")  # fmt: skip

_HEAD = {"head_dim": 64}
_PLAIN = {"intermediate_size": PLAIN_WIDTH}
_CHOICE = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
_EXPERTS = {**_CHOICE, "moe_intermediate_size": EXPERT_WIDTH}
_NARROW = {**_CHOICE, "intermediate_size": EXPERT_WIDTH}  # families that name the experts' width so
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": EXPERT_WIDTH}
_LATENT = {"q_lora_rank": 384, "kv_lora_rank": 256, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64,
           "num_key_value_heads": 16, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
           "first_k_dense_replace": 1, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_WIDTH}  # fmt: skip
_LINEAR = {**_HEAD, "linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 64,
           "linear_value_head_dim": 64}  # fmt: skip
_FEW = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_WIDTH}
# Family -> its options.
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3": _HEAD, "gemma": _HEAD, "gemma2": _HEAD, "gemma3": _HEAD, "cohere2": _HEAD, "glm": _HEAD, "glm4": _HEAD,
    "ministral": _HEAD, "ministral3": _HEAD, "hunyuan_v1_dense": _HEAD, "qwen3_5": _LINEAR,
    "gpt_neox": _PLAIN, "phi": _PLAIN, "starcoder2": _PLAIN, "nemotron": _PLAIN,
    "mixtral": _NARROW, "qwen2_moe": _SHARED, "qwen3_moe": {**_EXPERTS, **_HEAD}, "gpt_oss": {**_NARROW, **_HEAD},
    "hunyuan_v1_moe": {**_NARROW, **_HEAD, "moe_topk": 2}, "qwen3_5_moe": {**_SHARED, **_LINEAR},
    "qwen3_next": {**_SHARED, **_LINEAR}, "llama4": {**_NARROW, **_HEAD, "intermediate_size_mlp": WIDTH},
    "deepseek_v2": {**_LATENT, "topk_method": "greedy"}, "deepseek_v3": _LATENT,
    "deepseek_v4": {**_FEW, **_HEAD, "intermediate_size": EXPERT_WIDTH, "q_lora_rank": 384, "o_groups": 4,
                    "o_lora_rank": 256},
    "glm4_moe": {**_FEW, **_HEAD, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}, "granitemoe": _NARROW,
    "lfm2_moe": {**_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "mamba": {"intermediate_size": 2048},
    "opt": {"ffn_dim": PLAIN_WIDTH, "word_embed_proj_dim": 1024},
    "falcon": {"num_kv_heads": 4, "new_decoder_architecture": True, "ffn_hidden_size": PLAIN_WIDTH},
    "gemma4": {**_HEAD, "global_head_dim": 64, "vocab_size_per_layer_input": 32_000, "hidden_size_per_layer_input": 64},
    "falcon_h1": {"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "nemotron_h": {**_HEAD, **_FEW, "moe_shared_expert_intermediate_size": EXPERT_WIDTH, "mamba_num_heads": 16,
                   "ssm_state_size": 64, "layers_block_type": ["mamba", "moe", "attention", "moe"]},
}  # fmt: skip
_ENCODER = {"num_hidden_layers": 4, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": PLAIN_WIDTH}
_HALF = {**_ENCODER, "vocab_size": 32_000}


@dataclass(frozen=True)
class Other:
    """A family whose step alone is timed. auto: the class of transformers that loads it; target: times PEFT's speed."""

    auto: str
    options: dict[str, Any]
    target: float


OTHERS = {
    "bert": Other("AutoModelForSequenceClassification", _HALF, 1.2),
    "roberta": Other("AutoModelForSequenceClassification", _HALF, 1.2),
    "t5": Other("AutoModelForSeq2SeqLM", {"vocab_size": 32_000, "d_model": 1024, "d_ff": PLAIN_WIDTH, "d_kv": 64,
                                          "num_layers": 4, "num_heads": 16, "decoder_start_token_id": 0}, 1.2),
    "vit": Other("AutoModelForImageClassification", _ENCODER, 1.0),
    "clip": Other("AutoModel", {"text_config": _HALF, "vision_config": _ENCODER, "projection_dim": 512}, 1.0),
    "whisper": Other("AutoModelForSpeechSeq2Seq", {
        "vocab_size": 32_000, "d_model": 1024, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": PLAIN_WIDTH,
        "decoder_ffn_dim": PLAIN_WIDTH, "encoder_attention_heads": 16, "decoder_attention_heads": 16,
        "max_source_positions": 256, "max_target_positions": 128, "decoder_start_token_id": 1, "pad_token_id": 0,
        "suppress_tokens": None, "begin_suppress_tokens": None}, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A random model in a folder. skip: linear layers that stay dense; targets: those with an adapter."""

    family: str
    folder: str
    auto: str
    skip: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)


def causal() -> list[str]:
    """The described families that have a causal language model, those that are used most first."""
    from fastpeft.families.registry import families
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    found = [name for name in families() if name in CAUSAL and name not in OTHERS]
    return [*(name for name in MARKED if name in found), *(name for name in found if name not in MARKED)]


def configuration(family: str) -> Any:
    """The family's configuration of a causal model's language part, or of one of `OTHERS`."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as KNOWN

    if family in OTHERS:
        return AutoConfig.for_model(family, **OTHERS[family].options)
    kind = next(kind for kind in (f"{family}_text", f"{family}_text_model", family) if kind in KNOWN)
    return AutoConfig.for_model(kind, **{**USUAL, **OPTIONS.get(family, {})})


def save(config: Any, auto: str, folder: Path) -> Any:
    """A random bfloat16 model of a class of transformers, which it saves in a folder. Errors are transformers'."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model


def build(family: str, folder: Path) -> Model:
    """Make a random bfloat16 model and save it in a folder. Errors are transformers'."""
    import torch

    auto = OTHERS[family].auto if family in OTHERS else "AutoModelForCausalLM"
    model = save(configuration(family), auto, folder)
    heads = {id(m) for m in (model.get_output_embeddings(), getattr(model, "classifier", None))}
    keeps = set(model._keep_in_fp32_modules or ())  # T5's code reads the dtype of a weight; transformers keeps it dense
    skip, targets = [], []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            # Llama 4's router is a linear layer that returns two tensors, DeepSeek-V4's o_a_proj several matrices
            # kernels of state spaces read the weight of out_proj
            apart = id(module) in heads or name.startswith("classifier.") or name.endswith(
                ("router", "o_a_proj", "mamba.out_proj", "mixer.out_proj", "mixer.dt_proj"))
            skip += [name] * (apart or name.rpartition(".")[2] in keeps)
            targets += [name] * (not apart)
    return Model(family, str(folder), auto, skip, targets)
