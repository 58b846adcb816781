"""BEFT: a learned addition to the bias, b -> b + d, of value projections by default (arXiv 2509.15974).

No FLOPs of the order of the layer's, nothing saved for backward.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..config.base import HasInitWeights, TargetConfig
from ..config.targets import by_type
from ..config.types import PeftWarning
from .math.draws import drawn_normal
from .method import Inner, LayerInfo, Method, State


@dataclass
class BeftConfig(HasInitWeights, TargetConfig, own_type="BEFT"):
    not_in_peft = ("exclude_modules", "layers_to_transform", "layers_pattern")


class Beft(Method, config=BeftConfig):
    tensors = ("beft_bias",)
    kinds = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
    default_targets: ClassVar[dict[str, Any]] = by_type({
        "v_proj": "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3",
        "value": "bert roberta", "value_proj": "deberta-v2", "v": "t5 mt5",
    })  # fmt: skip

    def check_layer(self, config: BeftConfig, info: LayerInfo) -> None:
        super().check_layer(config, info)
        if not info.has_bias:
            text = f"{info.name!r} has no bias term. Note you cannot merge the BEFT adapter into the base layer."
            warnings.warn(text, PeftWarning, stacklevel=2)

    def make_state(self, config: BeftConfig, info: LayerInfo, shared: Any) -> State:
        bias = drawn_normal(1, info.out_features)
        if config.init_weights:
            bias.zero_()
        return {"beft_bias": nn.Parameter(bias)}

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        added = s.beft_bias.flatten().to(w.dtype)
        return w, added if b is None else b + added

    def mergeable_in(self, s: Any, info: LayerInfo) -> str | None:
        return None if info.has_bias else "Base layer has no bias, cannot merge bias adapter"

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        return y + s.beft_bias.view(-1, *[1] * (len(inner.info.shape) - 2))  # type: ignore[no-any-return]
