"""Small random encoders and encoder-decoders with a task's head each, and inputs of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, WIDTH = 97, 64
_TEXT = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 96, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
_IMAGE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
          "image_size": 16, "patch_size": 4}  # fmt: skip
_BERT = {**_TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LABELS = {"num_labels": 16}
_DECODER = {"is_decoder": True, "add_cross_attention": True}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "type_vocab_size": 0,
            "position_biased_input": False, "norm_rel_ebd": "layer_norm"}  # fmt: skip
_T5 = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
       "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "dropout_rate": 0.0,
       "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}  # fmt: skip
_FRAMES = 12
_WHISPER = {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
            "num_mel_bins": 8, "max_source_positions": _FRAMES, "max_target_positions": 64, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1, "dropout": 0.0,
            "begin_suppress_tokens": None}  # fmt: skip
# Case -> the family's description, the class with a head, the options of its configuration.
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "BertForSequenceClassification", {**_BERT, **_LABELS}),
    "bert decoder": ("bert", "BertLMHeadModel", {**_BERT, **_DECODER}),
    "roberta": ("roberta", "RobertaForTokenClassification", {**_BERT, **_LABELS}),
    "modernbert": ("modernbert", "ModernBertForMaskedLM", {
        **_TEXT, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2,
        "bos_token_id": 1, "eos_token_id": 2}),
    "deberta_v2": ("deberta_v2", "DebertaV2ForQuestionAnswering", {**_BERT, **_DEBERTA}),
    "deberta_v2 shared": ("deberta_v2", "DebertaV2ForQuestionAnswering", {**_BERT, **_DEBERTA, "share_att_key": True}),
    "t5": ("t5", "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "t5 plain": ("t5", "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "relu"}),
    "vit": ("vit", "ViTForImageClassification", {**_IMAGE, **_LABELS, "hidden_dropout_prob": 0.0}),
    "clip": ("clip", "CLIPModel", {
        "text_config": {**_TEXT, "eos_token_id": VOCABULARY - 1, "projection_dim": 32},
        "vision_config": {**_IMAGE, "projection_dim": 32}, "projection_dim": 32}),
    "whisper": ("whisper", "WhisperForConditionalGeneration", _WHISPER),
}  # fmt: skip


def encoder(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random model with weights larger than the usual start, so that mistakes are larger than rounding."""
    _, head, usual = ENCODERS[name]
    cls = getattr(transformers, head)
    model = cls(cls.config_class(**{**usual, **options}))
    for path, p in model.named_parameters():
        if p.dim() > 1:  # T5's scores have no scale: it is in what q starts with
            nn.init.normal_(p, std=0.05 if path.endswith("Attention.q.weight") else 0.2)
        elif p.dim() == 1:
            nn.init.normal_(p, 0.5, 0.2)
    return model.to(dtype).eval().requires_grad_(False)


def given(name: str, padded: bool, dtype: torch.dtype) -> dict[str, Any]:
    """The input of a training step of such a model, two rows; padded: the end of the first is padding."""
    draw = torch.Generator().manual_seed(1)

    def ids(tokens: int) -> Tensor:
        return torch.randint(3, VOCABULARY - 1, (2, tokens), generator=draw)

    def floats(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=draw).to(dtype)

    def mask(tokens: int) -> Tensor | None:
        found = torch.ones(2, tokens, dtype=torch.long)
        found[0, -3:] = 0
        return found if padded else None

    image = {"pixel_values": floats(3, 16, 16)}
    if name == "vit":
        return {**image, "labels": torch.tensor([1, 0])}
    if name == "clip":
        text = ids(9)
        text[:, -4] = VOCABULARY - 1
        return {**image, "input_ids": text, "attention_mask": mask(9), "return_loss": True}
    if name == "whisper":
        return {"input_features": floats(8, 2 * _FRAMES), "labels": ids(9), "decoder_attention_mask": mask(9)}
    found: dict[str, Any] = {"input_ids": ids(11), "attention_mask": mask(11)}
    if name.startswith("t5"):
        return {**found, "labels": ids(7), "decoder_attention_mask": mask(7)}
    if name == "bert decoder":
        found |= {"encoder_hidden_states": floats(7, WIDTH), "encoder_attention_mask": mask(7), "use_cache": False}
    if name.startswith("deberta"):
        return {**found, "start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([2, 6])}
    labels = {"bert": torch.tensor([1, 0]), "roberta": ids(11) % 16}
    return {**found, "labels": labels.get(name, found["input_ids"])}


def outputs_and_gradients(model: Any, step: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Outputs of the head (of CLIP before its sums), and gradients of its loss and of a random sum of that beside it.

    The sum is for rounding: few numbers decide a loss, and one's error would be that of all gradients.
    """
    model.zero_grad()
    if next(model.parameters()).dtype is torch.float64:
        step = {k: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for k, t in step.items()}
    out = model(**step)
    heads = torch.cat([t.flatten() for name, t in out.items() if name.endswith(("logits", "_embeds"))])
    factors = torch.randn(heads.shape, generator=torch.Generator().manual_seed(2))
    (out.loss + heads @ factors.to(heads.dtype)).backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return heads.detach(), torch.cat(grads)
