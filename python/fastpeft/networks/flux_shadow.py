"""Shadows of diffusers' Flux2: the same architecture with fewer blocks, narrower perhaps, cut out of the base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

STEMS = ("x_embedder", "context_embedder", "time_guidance_embed", "pos_embed")
# Parts of a layer's outputs and of its inputs, h of the width and m of the inner width, by the layer's name.
PARTS = (
    (r"to_qkv_mlp_proj", "hhhmm", "h"), (r"(^|single_transformer_blocks\..*\.)attn\.to_out", "h", "hm"),
    (r"double_stream_modulation_\w+\.linear", "hhhhhh", "h"), (r"single_stream_modulation\.linear", "hhh", "h"),
    (r"norm_out\.linear", "hh", "h"), (r"\.ff(_context)?\.linear_in", "mm", "h"),
)  # fmt: skip
SAME = (
    "in_channels", "out_channels", "joint_attention_dim", "timestep_guidance_channels", "attention_head_dim",
    "axes_dims_rope", "guidance_embeds",
)  # fmt: skip


def is_flux(model: nn.Module) -> bool:
    return type(model).__name__ == "Flux2Transformer2DModel"


class _SharedModuleProxy(nn.Module):
    """A module of the base model, called here and held there."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._held = [module]  # in a list, so that it is no submodule

    @property
    def shared_module(self) -> nn.Module:
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.shared_module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_held" not in self.__dict__:
                raise
        return getattr(self.shared_module, name)


class DetachedFluxShadowModel(nn.Module):
    """A small Flux2 whose single-stream blocks make the first shadow state."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, inputs_embeds: Tensor, block_kwargs: dict[str, Any] | None = None) -> Any:
        """inputs_embeds: the states [batch, tokens, width] before the base's first single-stream block, of which the
        first features are taken. block_kwargs: the other arguments of that block."""
        given = block_kwargs or {}
        _, width, _ = _sizes(self.config)
        text, shift = given.get("encoder_hidden_states"), given.get("temb_mod")
        if shift is not None and shift.shape[-1] != 3 * width:
            shift = torch.cat([part[..., :width] for part in shift.chunk(3, dim=-1)], dim=-1)
        text = None if text is None else text[..., :width]
        others = {name: given.get(name) for name in ("image_rotary_emb", "joint_attention_kwargs")}
        hidden = inputs_embeds[..., :width]
        for block in self.model.single_transformer_blocks:
            hidden = block(hidden_states=hidden, encoder_hidden_states=text, temb_mod=shift, **others)
        return SimpleNamespace(last_hidden_state=hidden, past_key_values=None)


def block_kwargs(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a single-stream block but its states; gradient checkpointing gives them by place."""
    names = ("encoder_hidden_states", "temb_mod", "image_rotary_emb", "joint_attention_kwargs")
    return {**dict(zip(names, args[1:], strict=False)), **kwargs}


def freeze_stems(backbone: Any) -> None:
    """Stop gradients of what embeds the inputs."""
    for name in STEMS:
        if isinstance(stem := getattr(backbone.model, name, None), nn.Module):
            stem.requires_grad_(False)


def _sizes(config: Any) -> tuple[int, int, int]:
    """Heads, width and inner width."""
    width = int(config.num_attention_heads) * int(config.attention_head_dim)
    return int(config.num_attention_heads), width, int(width * float(config.mlp_ratio))


def reduced(config: Any, base: Any, layers: int) -> DetachedFluxShadowModel:
    """The shadow for shadow_model="mirror": of `layers` double-stream blocks and twice as many single-stream ones."""
    base_heads, base_width, base_inner = _sizes(base.config)
    head = int(base.config.attention_head_dim)
    width, heads = config.shadow_hidden_size, config.shadow_num_attention_heads
    width = width or (heads * head if heads else base_width)
    heads = heads or width // head
    inner = config.shadow_intermediate_size or base_inner
    if width != heads * head:
        raise ValueError(
            f"A shadow of Flux2 must preserve the base attention head dimension: expected shadow_hidden_size == {head} "
            f"* shadow_num_attention_heads, got {width} and {heads}."
        )
    for field, value, most in (("num_attention_heads", heads, base_heads), ("intermediate_size", inner, base_inner)):
        if not 1 <= value <= most:
            raise ValueError(f"`shadow_{field}` must be between 1 and the base model's {most}, got {value}.")
    chosen = {"transformer_blocks": layers, "single_transformer_blocks": 2 * layers}
    places = {name: _spread(len(getattr(base, name)), count) for name, count in chosen.items()}
    own = type(base).from_config({
        **dict(base.config), "num_layers": layers, "num_single_layers": 2 * layers, "num_attention_heads": heads,
        "mlp_ratio": inner / width,
    })  # fmt: skip
    _cut_out(own, base, places, {"h": (base_width, width), "m": (base_inner, inner)})
    if config.share_embeddings and width == base_width:
        for name in STEMS:
            if isinstance(stem := getattr(base, name, None), nn.Module):
                setattr(own, name, _SharedModuleProxy(stem))
    if getattr(base, "gradient_checkpointing", False):
        own.enable_gradient_checkpointing()
    return DetachedFluxShadowModel(own)


def _spread(total: int, count: int) -> list[int]:
    """Places of `count` blocks out of `total`, from the first to the last; the last for one."""
    if count > total:
        raise ValueError(f"A shadow of this Flux2 has between 1 and {total} blocks of each type, got {count}.")
    return [total - 1] if count == 1 else [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _cut_out(own: Any, base: Any, places: dict[str, list[int]], sizes: dict[str, tuple[int, int]]) -> None:
    source = {key.replace(".base_layer.", "."): value for key, value in base.state_dict().items()}
    with torch.no_grad():
        for key, target in own.state_dict().items():
            listed, _, rest = key.partition(".")
            if listed in places:
                i, _, rest = rest.partition(".")
                found = source.get(f"{listed}.{places[listed][int(i)]}.{rest}")
            else:
                found = source.get(key)
            if found is None:
                raise ValueError(f"the base model has no tensor {key!r}, from which its shadow starts")
            layer = key.rpartition(".")[0]
            parts = next((parts for pattern, *parts in PARTS if re.search(pattern, layer)), None)
            for dim, size in enumerate(target.shape):
                taken = _taken(parts[dim] if parts else "", sizes, found.shape[dim], size)
                found = found.index_select(dim, taken.to(found.device))
            if not target.is_meta:
                target.copy_(found)


def _taken(parts: str, sizes: dict[str, tuple[int, int]], whole: int, size: int) -> Tensor:
    """Places in a dimension of the base's tensor that the shadow's has: the first of each part, or of all."""
    with torch.device("cpu"):
        if whole == size or not parts:
            return torch.arange(size)
        starts = (sum(sizes[part][0] for part in parts[:i]) for i in range(len(parts)))
        pairs = zip(starts, parts, strict=True)
        return torch.cat([torch.arange(start, start + sizes[part][1]) for start, part in pairs])


def load(path: str, base: Any) -> DetachedFluxShadowModel:
    """A Flux2 of a checkpoint that fits as the shadow of `base`. ValueError for one that does not."""
    if not is_flux(base):
        raise ValueError(
            f"A `shadow_model` from a checkpoint is not supported for a {type(base).__name__} of diffusers (it is for "
            'Flux2): use shadow_model="mirror".'
        )
    if torch.empty(0).is_meta:
        model = type(base).from_config(type(base).load_config(path))
    else:
        model = type(base).from_pretrained(path)
    for name in SAME:
        expected, found = (_plain(getattr(m.config, name, None)) for m in (base, model))
        if expected != found:
            raise ValueError(f"The Flux2 shadow has an incompatible `{name}`: expected {expected!r}, got {found!r}.")
    limits = [(n, getattr(base.config, n), getattr(model.config, n)) for n in ("num_layers", "num_single_layers")]
    names = ("num_attention_heads", "hidden size", "intermediate size")
    for name, most, value in (*limits, *zip(names, _sizes(base.config), _sizes(model.config), strict=True)):
        if not 1 <= value <= most:
            raise ValueError(f"The Flux2 shadow's {name} must be between 1 and the base's {most}, got {value}.")
    return DetachedFluxShadowModel(model)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
