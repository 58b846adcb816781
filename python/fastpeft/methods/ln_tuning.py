"""LN tuning: a trained copy of a normalisation layer takes its place (arXiv 2312.11420).

W, b -> the copy's. Any layer that stores its weight densely can be trained so, as in PEFT; adapters before it are
without effect there. Costs what the layer costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.base import TargetConfig
from ..config.targets import by_type
from ..files.whole import copied
from ..weights.find import weight_of
from .method import Inner, LayerInfo, Method, State


@dataclass
class LNTuningConfig(TargetConfig, own_type="LN_TUNING"):
    not_in_peft = ("layers_to_transform", "layers_pattern")


class LNTuning(Method, config=LNTuningConfig):
    tensors = ("ln_tuning_layers",)
    kinds = frozenset({"norm", "linear", "embedding", "conv1d", "conv2d", "conv3d"})
    autocast = False  # a copy computes as its original does, in the same dtype
    # PEFT copies Llava's multi_modal_projector, which is no layer but holds these two, as a whole.
    default_targets: ClassVar[dict[str, Any]] = by_type({
        "input_layernorm post_attention_layernorm norm": "llama mistral gemma",
        "input_layernorm post_attention_layernorm norm pre_feedforward_layernorm post_feedforward_layernorm":
            "gemma2 gemma3_text",
        "input_layernorm post_attention_layernorm ln_f": "bloom falcon", "post_attention_layernorm": "qwen2 qwen3",
        "layer_norm final_layer_norm": "t5 mt5", "ln_1 ln_2 ln_f": "gpt2", "ln_1 ln_f": "gptj",
        "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
        "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
        "input_layernorm post_attention_layernorm norm multi_modal_projector.linear_1 multi_modal_projector.linear_2 "
        "embed_tokens lm_head": "llava",
        "input_layernorm final_layernorm": "phi",
    })  # fmt: skip

    def check_layer(self, config: LNTuningConfig, info: LayerInfo) -> None:
        super().check_layer(config, info)
        if info.quantized:
            raise ValueError(f"LN tuning trains a copy of {info.name!r}, whose quantised weight cannot be trained.")

    def make_state(self, config: LNTuningConfig, info: LayerInfo, shared: Any) -> State:
        memo: dict[int, Any] = {}
        if torch.empty(0).is_meta:  # the copy's tensors will come from a file
            memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in info.module.parameters()}
        return {"ln_tuning_layers": copied(info.module, memo)}

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own: Any = weight_of(s.ln_tuning_layers)
        weight, bias = own.read()
        return weight.to(w.dtype), None if bias is None else bias.to(w.dtype)

    def forward(self, s: Any, shared: Any, x: Tensor, inner: Inner) -> Tensor:
        return s.ln_tuning_layers(x)  # type: ignore[no-any-return]
