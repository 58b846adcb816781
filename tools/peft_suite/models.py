"""Repositories of the Hub that PEFT's tests load, as tiny random models of the same classes.

A row names a class and a configuration of transformers and the repositories that stand for it. Sizes are those on which
the tests count layers and parameters. `times` multiplies the matrices of models whose outputs would else be so small
that a test of "the output changed" fails by its tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 1024
MODELS: dict[str, Callable[[Path], None]] = {}  # by `repository` or `repository@revision`


def register(*names: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def keep(make: Callable[[Path], None]) -> Callable[[Path], None]:
        MODELS.update(dict.fromkeys(names, make))
        return make

    return keep


def revisions(repo: str) -> list[str]:
    """The revisions of a repository; none for one that does not exist."""
    import adapters  # noqa: F401 (registers its own)

    return [name.partition("@")[2] or "main" for name in MODELS if name.partition("@")[0] == repo]


def make(repo: str, revision: str, folder: Path) -> None:
    """Write a repository's files, leaving torch's state as it was."""
    import torch

    key = f"{repo}@{revision}"
    seed, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(revision != "main")
        with torch.device("cpu"):
            MODELS[key if key in MODELS else repo](folder)
    finally:
        torch.random.set_rng_state(seed)
        torch.set_default_dtype(dtype)


def tokenizer(pad_id: int = 1, extra: tuple[str, ...] = ()) -> Any:
    """A tokenizer of a thousand tokens that can spell everything; `<pad>` has the id 1 or 3."""
    import hashlib

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = (
        "the quick brown fox jumps over the lazy dog . Hello world , this is a tiny corpus for a tiny tokenizer . "
        "Preheat the oven to 350 degrees and place the cookie dough . What are these ? USER ASSISTANT label positive "
        "negative Tweet text : input output classify if the tweet is a complaint or not . paris berlin music film "
    )
    words = [f"w{i} {i} {hashlib.md5(str(i).encode()).hexdigest()}" for i in range(3000)]
    found = Tokenizer(models.BPE(unk_token="<unk>"))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>"] if pad_id == 1 else ["<s>", "<unk>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[*specials, *extra], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator([text] * 20 + words, trainer)
    named = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=512, **named)


def save(model: Any, folder: Path, times: float = 1.0) -> None:
    import torch

    with torch.no_grad():
        for matrix in (p for p in model.parameters() if p.dim() > 1 and times != 1):
            matrix.mul_(times)
    model.eval().save_pretrained(folder)


def _row(model: str, config: str, names: str, times: float = 1.0, **fields: Any) -> None:
    def build(folder: Path) -> None:
        import transformers

        settings = getattr(transformers, config)(**fields)
        save(getattr(transformers, model)(settings), folder, times)
        if "vocab_size" in fields or "text_config" in fields:
            tokenizer(getattr(settings, "pad_token_id", 1) or 1).save_pretrained(folder)

    register(*names.split())(build)


_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
_LAST = {"bos_token_id": 2, "eos_token_id": 2}
_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048, **_IDS,
}  # fmt: skip
_FEW = {**_TEXT, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **_IDS}
_BERT = {
    **_TEXT, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 37,
    "pad_token_id": 1,
}  # fmt: skip
_OPT = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 5, "ffn_dim": 4, "num_attention_heads": 4,
    "max_position_embeddings": 100, "word_embed_proj_dim": 16, "pad_token_id": 1, **_LAST,
}  # fmt: skip
_OPT_125M = {
    "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12,
    "max_position_embeddings": 2048, "word_embed_proj_dim": 768,
}  # fmt: skip
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512, **_LAST}
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 5, "num_heads": 4, "pad_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_BART = {
    **_TEXT, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_VISION = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
           "image_size": 30, "patch_size": 6, "projection_dim": 32}  # fmt: skip
_PEFT, _HF, _TRL = "peft-internal-testing", "hf-internal-testing", "trl-internal-testing"
TINY_OPT = f"{_PEFT}/tiny-random-OPTForCausalLM"

_row("OPTForCausalLM", "OPTConfig", TINY_OPT, **_OPT)
_row("OPTForCausalLM", "OPTConfig", f"{_PEFT}/opt-125m facebook/opt-125m facebook/opt-350m", **_OPT | _OPT_125M)
_row("GPT2LMHeadModel", "GPT2Config", f"{_PEFT}/tiny-random-gpt2 {_HF}/tiny-random-gpt2 openai-community/gpt2-tiny "
     f"{_PEFT}/tiny-random-GPT2LMHeadModel", pad_token_id=3, **_GPT)  # fmt: skip
_row("GPT2LMHeadModel", "GPT2Config", "gpt2 openai-community/gpt2", vocab_size=50257)
_row("GPTJForCausalLM", "GPTJConfig", f"{_PEFT}/tiny-random-GPTJForCausalLM", rotary_dim=4, **_GPT)
_row("LlamaForCausalLM", "LlamaConfig", f"{_TRL}/tiny-random-LlamaForCausalLM {_PEFT}/tiny-random-LlamaForCausalLM "
     f"{_HF}/tiny-random-LlamaForCausalLM {_PEFT}/zephyr-smol_llama-100m-sft-full TinyLlama/TinyLlama-1.1B-Chat-v1.0",
     times=10, **LLAMA)  # fmt: skip
_row("LlamaForSequenceClassification", "LlamaConfig", f"{_TRL}/tiny-LlamaForSequenceClassification-3.2", num_labels=2,
     **LLAMA)  # fmt: skip
_row("MistralForCausalLM", "MistralConfig", f"{_HF}/tiny-random-MistralForCausalLM", hidden_size=32,
     intermediate_size=37, sliding_window=None, **_FEW)  # fmt: skip
_row("Qwen2ForCausalLM", "Qwen2Config", f"{_PEFT}/tiny-dummy-qwen2 {_TRL}/tiny-Qwen2ForCausalLM-2.5", times=10,
     hidden_size=8, intermediate_size=32, **_FEW)  # fmt: skip
# More embeddings than the tokenizer has tokens.
_row("Qwen2ForCausalLM", "Qwen2Config", "Qwen/Qwen2-0.5B", hidden_size=32, intermediate_size=64,
     tie_word_embeddings=True, **_FEW | {"vocab_size": VOCABULARY + 200})  # fmt: skip
_row("Qwen3ForCausalLM", "Qwen3Config", f"{_TRL}/tiny-Qwen3ForCausalLM", hidden_size=8, intermediate_size=32,
     head_dim=16, **_FEW)  # fmt: skip
_row("Gemma3ForCausalLM", "Gemma3TextConfig", f"{_HF}/tiny-random-Gemma3ForCausalLM", times=10, hidden_size=32,
     intermediate_size=37, head_dim=8, sliding_window=512, query_pre_attn_scalar=8, **_FEW)  # fmt: skip
_row("Gemma4ForCausalLM", "Gemma4TextConfig", f"{_PEFT}/tiny-random-gemma4-E2B", hidden_size=32, intermediate_size=64,
     head_dim=8, global_head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
     layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2, sliding_window=512,
     **_FEW | {"num_hidden_layers": 4, "num_key_value_heads": 1})  # fmt: skip
_row("Llama4ForCausalLM", "Llama4TextConfig", f"{_TRL}/tiny-Llama4ForCausalLM", hidden_size=16, intermediate_size=32,
     intermediate_size_mlp=32, head_dim=4, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1,
     attention_chunk_size=512, **_FEW)  # fmt: skip
_row("GptOssForCausalLM", "GptOssConfig", f"{_TRL}/tiny-GptOssForCausalLM", hidden_size=16, intermediate_size=32,
     head_dim=4, num_local_experts=4, num_experts_per_tok=2, sliding_window=128, rope_parameters=_ROPE,
     **_FEW)  # fmt: skip
_row("Qwen3MoeForCausalLM", "Qwen3MoeConfig", f"{_TRL}/tiny-Qwen3MoeForCausalLM {_HF}/tiny-qwen3-moe", hidden_size=16,
     intermediate_size=32, moe_intermediate_size=32, head_dim=8, num_experts=4, num_experts_per_tok=2,
     decoder_sparse_step=1, **_FEW)  # fmt: skip
_row("MixtralForCausalLM", "MixtralConfig", f"{_HF}/Mixtral-tiny", hidden_size=64, intermediate_size=96,
     num_local_experts=8, num_experts_per_tok=2, **_FEW)  # fmt: skip
_row("BloomForCausalLM", "BloomConfig", f"{_PEFT}/tiny-random-BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=64,
     n_layer=5, n_head=4, **_IDS)  # fmt: skip
_row("GPTNeoXForCausalLM", "GPTNeoXConfig", f"{_PEFT}/tiny-random-GPTNeoXForCausalLM", hidden_size=32,
     intermediate_size=37, num_hidden_layers=5, num_attention_heads=4, bos_token_id=0, eos_token_id=2,
     **_TEXT)  # fmt: skip
_row("FalconMambaForCausalLM", "FalconMambaConfig", "tiiuae/falcon-mamba-tiny-dev", vocab_size=VOCABULARY,
     hidden_size=32, num_hidden_layers=2, state_size=4, **_IDS)  # fmt: skip
_row("NemotronHForCausalLM", "NemotronHConfig", f"{_TRL}/tiny-NemotronHForCausalLM-nano", hidden_size=32,
     layers_block_type=["mamba", "attention", "moe"], intermediate_size=64, head_dim=8, mamba_num_heads=4,
     mamba_head_dim=16, n_groups=2, ssm_state_size=8, n_routed_experts=4, num_experts_per_tok=2,
     moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, num_attention_heads=4, num_key_value_heads=2,
     **_TEXT, **_IDS)  # fmt: skip
_row("T5ForConditionalGeneration", "T5Config", f"{_PEFT}/tiny-random-t5 "
     f"{_PEFT}/tiny-random-T5ForConditionalGeneration {_PEFT}/tiny-random-T5ForConditionalGeneration-calibrated",
     feed_forward_proj="relu", **_T5)  # fmt: skip
_row("T5ForConditionalGeneration", "T5Config", "google/flan-t5-small", feed_forward_proj="gated-gelu", **_T5)
_row("BartForConditionalGeneration", "BartConfig", f"{_PEFT}/tiny-random-BartForConditionalGeneration",
     encoder_ffn_dim=4, decoder_ffn_dim=4, decoder_start_token_id=2, forced_eos_token_id=None, **_BART)  # fmt: skip
_row("WhisperForConditionalGeneration", "WhisperConfig", f"{_PEFT}/_tiny-whisper", encoder_ffn_dim=32,
     decoder_ffn_dim=32, decoder_start_token_id=3, max_source_positions=30, max_target_positions=40, num_mel_bins=80,
     suppress_tokens=None, begin_suppress_tokens=None, **_BART)  # fmt: skip
# With a pooler and with a head: the tests load it as AutoModel and as AutoModelForCausalLM.
_row("BertForPreTraining", "BertConfig", f"{_PEFT}/tiny-random-BertModel {_HF}/tiny-random-BertModel "
     f"{_PEFT}/tiny-random-BertModel@v2.0.0", **_BERT)  # fmt: skip
_row("BertForSequenceClassification", "BertConfig", f"{_PEFT}/tiny-random-BertForSequenceClassification "
     "bert-base-uncased google-bert/bert-base-uncased", **_BERT)  # fmt: skip
_row("RobertaModel", "RobertaConfig", f"{_PEFT}/tiny-random-RobertaModel", **_BERT)
_row("RobertaForSequenceClassification", "RobertaConfig", f"{_PEFT}/tiny-random-RobertaForSequenceClassification",
     **_BERT)  # fmt: skip
_DEBERTA = {**_BERT, "type_vocab_size": 16, "relative_attention": False, "position_biased_input": True}
_row("DebertaModel", "DebertaConfig", f"{_PEFT}/tiny-random-DebertaModel", **_DEBERTA)
_row("DebertaV2Model", "DebertaV2Config", f"{_PEFT}/tiny-random-DebertaV2Model", **_DEBERTA)
_row("CLIPTextModelWithProjection", "CLIPTextConfig", f"{_PEFT}/tiny-clip-text-2", hidden_size=32,
     intermediate_size=37, num_hidden_layers=5, num_attention_heads=4, projection_dim=32, bos_token_id=0,
     eos_token_id=2, pad_token_id=1, **_TEXT | {"max_position_embeddings": 77})  # fmt: skip
_row("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
     f"{_TRL}/tiny-Qwen2_5_VLForConditionalGeneration", image_token_id=5, video_token_id=6, vision_start_token_id=7,
     vision_end_token_id=8,
     text_config={"hidden_size": 16, "intermediate_size": 32, "rope_parameters": {**_ROPE, "mrope_section": [1, 1]},
                  **_FEW, "pad_token_id": 1},
     vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16,
                    "fullatt_block_indexes": [1]})  # fmt: skip


@register(f"{_PEFT}/tiny-random-ResNetForImageClassification", "microsoft/resnet-18")
def _(folder: Path) -> None:
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    save(ResNetForImageClassification(ResNetConfig(
        embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], num_labels=3, layer_type="basic"
    )), folder)  # fmt: skip
    ConvNextImageProcessor(size={"shortest_edge": 224}).save_pretrained(folder)


@register(f"{_PEFT}/tiny-LlavaForConditionalGeneration", f"{_HF}/tiny-random-LlavaForConditionalGeneration")
def _(folder: Path) -> None:
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    words = tokenizer(extra=("<image>",))
    vision = {"model_type": "clip_vision_model", **_VISION}
    save(LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config={"model_type": "llama", **LLAMA}, vision_feature_layer=-1,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )), folder)  # fmt: skip
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}),
        tokenizer=words, patch_size=6, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip


@register(f"{_HF}/tiny-sd-pipe")
def _(folder: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=2, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[32, 64], in_channels=3, out_channels=3, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=5,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    ))  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        unet=unet, scheduler=scheduler, vae=vae, text_encoder=text, tokenizer=_clip_tokenizer(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def _clip_tokenizer() -> Any:
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|pad|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters), "th", "the</w>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[("t", "h"), ("th", "e</w>")], model_max_length=77)


@register(f"{_HF}/tiny-flux2")
def _(folder: Path) -> None:
    import torch
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(1)  # with which PEFT's own conversions are as near as its test asks
    Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4],
    ).save_pretrained(folder / "transformer")  # fmt: skip
    (folder / "model_index.json").write_text("{}")
