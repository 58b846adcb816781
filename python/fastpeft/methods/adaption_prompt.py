"""Llama-Adapter: attention to learned tokens is added to an attention's output, times a gate (arXiv 2303.16199).

y = attention(x) + gate * softmax(q K^T / sqrt(d)) V W_o, where K and V are those of `adapter_len` learned tokens in the
last `adapter_layers` layers and q are the queries of x, which are computed a second time. The gate starts at zero.
FLOPs beside the layer's, for n inputs of width h: 2 n h^2 for q, as many for W_o, and 4 n adapter_len h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import TargetConfig
from ..config.types import PeftError
from ..weights.base import innermost
from ..weights.whole_module import WholeModule
from .math.draws import drawn_normal
from .method import LayerInfo, State
from .whole import Rows, WholeMethod, added_to_rows, rows_of

_FOUR = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = {"llama": _FOUR, "mistral": _FOUR, "gpt2": ("c_attn",)}


@dataclass
class AdaptionPromptConfig(TargetConfig, own_type="ADAPTION_PROMPT"):
    """adapter_len: learned tokens in each layer. adapter_layers: so many layers, from the last one down, have them.
    target_modules: the name of the attentions in their layers, "self_attn"; by default the architecture's."""

    not_in_peft = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    whole_modules = text_is_end = True
    is_adaption_prompt: ClassVar[bool] = True

    adapter_len: int | None = None
    adapter_layers: int | None = None

    def narrowed(self, names: list[str]) -> list[str]:
        if self.adapter_layers is None:
            return names
        if len(names) < self.adapter_layers:
            raise ValueError(
                f"Config specifies more adapter layers '{self.adapter_layers}' than the model has '{len(names)}'."
            )
        return names[-self.adapter_layers :]


class AdaptionPrompt(WholeMethod, config=AdaptionPromptConfig):
    tensors = ("adaption_prompt", "adaption_gate")
    counts = ("adapter_len", "adapter_layers")
    autocast = False  # as in PEFT: they have the attention's dtype
    default_targets: ClassVar[dict[str, Any]] = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}

    def check_config(self, config: AdaptionPromptConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        if config.target_modules is not None and not isinstance(config.target_modules, str):
            raise ValueError(
                "`target_modules` should be the name of the attentions, such as 'self_attn', "
                f"got {config.target_modules!r}"
            )

    def open_fields(self, config: AdaptionPromptConfig, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        if model_type not in PROJECTIONS:
            raise PeftError(
                f"Unsupported model type for adaption prompt: {model_type!r}. Supported are {', '.join(PROJECTIONS)}."
            )
        return {}

    def base_of(self, module: nn.Module, model: nn.Module) -> WholeModule:
        config: Any = model.config
        if lost := [name for name in PROJECTIONS[config.model_type] if not hasattr(module, name)]:
            raise ValueError(f"an adaption prompt needs an attention, {type(module).__name__} has no {lost[0]}")
        if getattr(module, "is_cross_attention", False):
            raise ValueError(
                f"an adaption prompt stands beside a decoder's own tokens, and this {type(module).__name__} attends to "
                "an encoder's: name other attentions in `target_modules`"
            )
        label = "AdaptedAttentionGPT" if hasattr(module, "c_attn") else "AdaptedAttention"
        return WholeModule(module, config.hidden_size, model, label)

    def make_state(self, config: AdaptionPromptConfig, info: LayerInfo, shared: Any) -> State:
        assert config.adapter_len is not None
        prompt = drawn_normal(1, config.adapter_len, info.in_features)
        return {"adaption_prompt": nn.Parameter(prompt), "adaption_gate": nn.Parameter(torch.zeros(1))}

    def around(
        self, layer: Any, name: str, inner: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], rows: Rows
    ) -> Any:
        s, module = layer.view(name), layer.base_layer
        output = inner(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        angles = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
        here, angles = rows_of(x, rows, len(x)), rows_of(angles, rows, len(x))
        prompt = s.adaption_prompt.to(x.dtype)
        kind, attend = ("gpt2", _gpt2) if hasattr(module, "c_attn") else ("llama", _llama)
        y, *others = output if isinstance(output, tuple) else (output,)
        # a row with a prompt of its own has none of the adapters on the attention's layers
        linear = {n: getattr(module, n) if rows is None else innermost(getattr(module, n)) for n in PROJECTIONS[kind]}
        y = added_to_rows(y, rows, attend(module, linear, here, prompt, s.adaption_gate, angles).to(y.dtype))
        return (y, *others) if isinstance(output, tuple) else y


def _attended(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """gate * softmax(q k^T / sqrt(d)) v, [batch, tokens, heads * d], for q [batch, heads, tokens, d] and for k and v
    [1, adapter_len, heads of these, d]."""
    batch = q.shape[0]
    k, v = (t.to(q.dtype).transpose(1, 2).expand(batch, -1, -1, -1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(q.shape[-1]), enable_gqa=q.shape[1] != k.shape[1])
    return (y * gate).transpose(1, 2).flatten(2)


def _llama(
    module: Any, linear: dict[str, Any], x: Tensor, prompt: Tensor, gate: Tensor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    found = (linear["q_proj"](x), linear["k_proj"](prompt), linear["v_proj"](prompt))
    q, k, v = (t.unflatten(-1, (-1, module.head_dim)) for t in found)
    q = q.transpose(1, 2)
    cos, sin = (t.unsqueeze(1) for t in angles)
    first, second = q.chunk(2, dim=-1)
    q = q * cos + torch.cat((-second, first), dim=-1) * sin
    return linear["o_proj"](_attended(q, k, v, gate).to(x.dtype))  # type: ignore[no-any-return]


def _gpt2(module: Any, linear: dict[str, Any], x: Tensor, prompt: Tensor, gate: Tensor, angles: None) -> Tensor:
    """As PEFT's, whose tokens' share does not go through `c_proj`."""
    found = (linear["c_attn"](x).chunk(3, dim=-1)[0], *linear["c_attn"](prompt).chunk(3, dim=-1)[1:])
    q, k, v = (t.unflatten(-1, (-1, module.head_dim)) for t in found)
    return _attended(q.transpose(1, 2), k, v, gate)
