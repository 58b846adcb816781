"""Small random models that take images, and inputs of them: texts of two rows with an image in each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

VOCABULARY, IMAGE = 97, 90  # IMAGE: the token in whose place a piece of an image stands
_SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
          "num_hidden_layers": 2, "max_position_embeddings": 128, "vocab_size": VOCABULARY, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
_HEADS = {**_SIZES, "head_dim": 16}
_VISION = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2,
           "image_size": 28, "patch_size": 14}  # fmt: skip
_DEPTH = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
          "intermediate_size": 48, "hidden_size": 32, "out_hidden_size": 64}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_DOWN = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
         "num_experts_per_tok": 2, "moe_intermediate_size": 32}  # fmt: skip


def _rope(*section: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}}


# Family -> its model_type where that is another name, text_config, vision_config, options, kind of image (none: text).
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "llava": ("", {"model_type": "llama", **_SIZES}, {"model_type": "clip_vision_model", **_VISION},
              {"image_token_index": IMAGE, "image_token_id": IMAGE}, "plain"),
    "pixtral": ("llava", {"model_type": "mistral", **_HEADS}, {"model_type": "pixtral", **_VISION, "head_dim": 16},
                {"image_token_index": IMAGE, "image_token_id": IMAGE, "vision_feature_layer": -1,
                 "vision_feature_select_strategy": "full"}, "sizes"),
    "paligemma": ("", {"model_type": "gemma", **_HEADS}, {"model_type": "siglip_vision_model", **_VISION},
                  {"image_token_index": IMAGE, "image_token_id": IMAGE, "projection_dim": 64}, "types"),
    "gemma3": ("", {"model_type": "gemma3_text", **_HEADS, "sliding_window": 5, "query_pre_attn_scalar": 16,
                    "layer_types": ["sliding_attention", "full_attention"]},
               {"model_type": "siglip_vision_model", **_VISION},
               {"image_token_index": IMAGE, "image_token_id": IMAGE, "mm_tokens_per_image": 4}, "types"),
    "internvl": ("", {"model_type": "qwen2", **_SIZES},
                 {"model_type": "internvl_vision", **_VISION, "image_size": [56, 56], "patch_size": [14, 14]},
                 {"image_token_id": IMAGE, "downsample_ratio": 0.5}, "large"),
    "smolvlm": ("", {"model_type": "llama", **_SIZES}, {"model_type": "smolvlm_vision", **_VISION},
                {"image_token_id": IMAGE, "scale_factor": 1, "pad_token_id": 0}, "list"),
    "mllama": ("", {"model_type": "mllama_text_model", **_SIZES, "num_hidden_layers": 3, "cross_attention_layers": [1]},
               {"model_type": "mllama_vision_model", **_VISION, "attention_heads": 2, "num_global_layers": 1,
                "vision_output_dim": 64, "max_num_tiles": 2, "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
               {"image_token_index": IMAGE}, "tiles"),
    "qwen2_vl": ("", {**_SIZES, **_rope(2, 3, 3)}, {**_DEPTH, "embed_dim": 32, "hidden_size": 64},
                 {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92}, "grid"),
    "qwen2_5_vl": ("", {**_SIZES, **_rope(2, 3, 3)}, {**_DEPTH, "fullatt_block_indexes": [1], "window_size": 56},
                   {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92}, "grid"),
    "qwen3_vl": ("", {**_HEADS, **_rope(4, 2, 2)}, {**_DEPTH, "deepstack_visual_indexes": [0],
                                                    "num_position_embeddings": 16},
                 {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92}, "grid"),
    "qwen3_vl_moe": ("", {**_HEADS, **_EXPERTS, **_rope(4, 2, 2)},
                     {**_DEPTH, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
                     {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92}, "grid"),
    "muse_glimmer": ("", {**_HEADS, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
                          "layer_rope_theta": [10000.0, 0]}, _VISION, {"image_token_id": IMAGE}, "none"),
    "glm4v": ("", {**_SIZES, **_rope(2, 3, 3)}, {**_DEPTH, "image_size": 56},
              {"image_token_id": IMAGE, "image_start_token_id": 92, "image_end_token_id": 93}, "grid"),
    "glm4v_moe": ("", {**_HEADS, **_DOWN, **_rope(1, 1, 2)}, {**_DEPTH, "image_size": 56},
                  {"image_token_id": IMAGE, "image_start_token_id": 92, "image_end_token_id": 93}, "grid"),
}  # fmt: skip


def tiny(name: str, dtype: torch.dtype) -> Any:
    """A random model with weights larger than the usual start, so that mistakes are larger than rounding."""
    kind, text, vision, options, _ = FAMILIES[name]
    config = AutoConfig.for_model(kind or name, text_config=text, vision_config=vision, **options)
    model = AutoModelForImageTextToText.from_config(config)
    for path, p in model.named_parameters():
        vision_part = "vision" in path or "visual" in path
        nn.init.normal_(p, std=0.1 if vision_part else 0.2) if p.dim() > 1 else nn.init.normal_(p, 0.5, 0.2)
        if path.endswith(("router.weight", "gate.weight")):  # scores of experts far apart
            p.data.mul_(8)
    return model.to(dtype).eval().requires_grad_(False)


def inputs(name: str, dtype: torch.dtype, image: bool, padded: bool) -> dict[str, Any]:
    """Two rows of 12 tokens, four of them an image's where there is one; the first three of a row are padding."""
    kind = FAMILIES[name][-1]
    made = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 88, (2, 12), generator=made)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if not image or kind == "none":
        return given
    if kind != "tiles":
        ids[:, 4:8] = IMAGE
    if kind == "grid":
        ids[:, 3] = 92
        given["mm_token_type_ids"] = (ids == IMAGE).int()

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).to(dtype)

    if kind == "grid":
        return given | {"pixel_values": drawn(2 * 16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    if kind == "types":
        return given | {"pixel_values": drawn(2, 3, 28, 28), "token_type_ids": _types(name, ids)}
    if kind == "sizes":
        return given | {"pixel_values": drawn(2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]] * 2)}
    if kind == "large":
        return given | {"pixel_values": drawn(2, 3, 56, 56)}
    if kind == "list":
        return given | {"pixel_values": drawn(2, 1, 3, 28, 28)}
    if kind == "tiles":
        seen = torch.ones(2, 12, 1, 2, dtype=torch.long)
        seen[:, :4], seen[1, :, :, 1] = 0, 0  # before the image; a tile that is none
        given |= {"aspect_ratio_ids": torch.tensor([[2], [1]]), "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]])}
        return given | {"pixel_values": drawn(2, 1, 2, 3, 28, 28), "cross_attention_mask": seen}
    return given | {"pixel_values": drawn(2, 3, 28, 28)}


def _types(name: str, ids: Tensor) -> Tensor:
    """Of Gemma 3 the image's tokens; of PaliGemma, whose prefix sees all of itself, what is to be answered."""
    return (ids == IMAGE).long() if name == "gemma3" else (torch.arange(ids.shape[1]) >= 9).long().expand_as(ids)
