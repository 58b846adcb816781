"""Backbones of Shadow: the network that makes the first shadow state, for the architectures of transformers."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..files.checks import read_json
from . import flux_shadow

BLOCKS = ("layers", "h", "single_transformer_blocks", "transformer_blocks")  # names of lists of blocks
WIDTHS = ("hidden_size", "n_embd", "d_model")
PROJECTED = "causal_lm_with_hidden_projection"  # a checkpoint of a shadow along with its projection


def is_diffusion(model: nn.Module) -> bool:
    """True for a transformer of diffusers, which gets latents instead of tokens."""
    lists = [name for name in BLOCKS if isinstance(getattr(model, name, None), nn.ModuleList)]
    return "single_transformer_blocks" in lists or ("transformer_blocks" in lists and "layers" not in lists)


def body_of(model: nn.Module) -> nn.Module:
    """The module with the list of blocks, LlamaModel of LlamaForCausalLM. ValueError where none is found."""
    if is_diffusion(model):
        return model
    candidates = [getattr(model, name, None) for name in ("model", "transformer", "base_model", "decoder")]
    for outer in [*candidates, model]:
        for module in (getattr(outer, "decoder", None), outer):  # OPT has it a level deeper
            if isinstance(module, nn.Module) and _list_name(module):
                return module
    raise ValueError(
        f"Shadow cannot find the blocks of a {type(model).__name__}: no list of them is called {', '.join(BLOCKS)}. "
        "Set `target_modules` to the blocks, such as r'.*\\.layers\\.\\d+$'."
    )


def blocks_of(model: nn.Module) -> list[str]:
    """The names of a model's blocks."""
    body = body_of(model)
    prefix = next(name for name, module in model.named_modules() if module is body)
    listed = _list_name(body)
    return [f"{prefix}.{listed}.{i}".lstrip(".") for i in range(len(getattr(body, listed)))]


def _list_name(module: nn.Module) -> str:
    return next((name for name in BLOCKS if isinstance(getattr(module, name, None), nn.ModuleList)), "")


def width_of(config: Any) -> int:
    """The width of the states between blocks."""
    if (found := next((getattr(config, name) for name in WIDTHS if hasattr(config, name)), None)) is not None:
        return int(found)
    if hasattr(config, "num_attention_heads") and hasattr(config, "attention_head_dim"):  # diffusers
        return int(config.num_attention_heads) * int(config.attention_head_dim)
    raise ValueError(f"Shadow cannot tell the hidden size of a model from its {type(config).__name__}")


class _TokenShadowBackbone(nn.Module):
    """A residual MLP on each token, for transformers of diffusers that have no backbone of their own kind here."""

    def __init__(self, width: int, hidden: int, layers: int, inner: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=hidden)
        self.proj_in = nn.Linear(width, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, hidden))
            for _ in range(layers)
        )

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        hidden = self.proj_in(inputs_embeds)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return SimpleNamespace(last_hidden_state=hidden, past_key_values=None)


def build(config: Any, model: Any) -> tuple[Any, nn.Module]:
    """(backbone, projection to the model's width) as a ShadowConfig asks for, with their first values; their tensors
    are on the device that is the default, where nothing of a checkpoint's weights is read if that is the meta device.
    """
    width = width_of(model.config)
    projection: Any = None
    if config.shadow_model == "mirror":
        backbone = _mirror(config, model)
    elif is_diffusion(model):
        backbone = flux_shadow.load(config.shadow_model, model)
    else:
        backbone, projection = _loaded(config.shadow_model)
    own = width_of(backbone.config)
    if projection is not None:
        found = tuple(projection.weight.shape)[::-1]
        if found != (own, width):
            raise ValueError(f"the projection of {config.shadow_model!r} maps {found}, expected {(own, width)}")
    elif own == width:
        projection = nn.Identity()
    else:
        projection = nn.Linear(own, width, bias=False)
        if flux_shadow.is_flux(model) and not projection.weight.is_meta:
            nn.init.eye_(projection.weight)
    if shares_embeddings(config, model, backbone) and isinstance(getattr(backbone, "embed_tokens", None), nn.Module):
        del backbone.embed_tokens
    return backbone, projection


def shares_embeddings(config: Any, model: Any, backbone: Any) -> bool:
    """True if the backbone gets the base model's embeddings of the tokens instead of the tokens."""
    if not config.share_embeddings or config.shadow_model != "mirror" or is_diffusion(model):
        return False
    takes = "inputs_embeds" in inspect.signature(backbone.forward).parameters
    return takes and width_of(backbone.config) == width_of(model.config)


def _mirror(config: Any, model: Any) -> Any:
    layers = config.shadow_num_hidden_layers or 1
    if flux_shadow.is_flux(model):
        return flux_shadow.reduced(config, model, layers)
    if is_diffusion(model):
        width = width_of(model.config)
        hidden = config.shadow_hidden_size or width
        return _TokenShadowBackbone(width, hidden, layers, config.shadow_intermediate_size or hidden)
    body: Any = body_of(model)
    own = copy.deepcopy(body.config)
    _put(own, ("num_hidden_layers", "n_layer", "num_layers"), layers)
    _put(own, WIDTHS, config.shadow_hidden_size)
    _put(own, ("intermediate_size", "ffn_dim", "n_inner"), config.shadow_intermediate_size)
    _put(own, ("num_attention_heads", "n_head", "num_heads"), config.shadow_num_attention_heads)
    if (kinds := getattr(own, "layer_types", None)) is not None:  # one for each layer
        kinds = list(kinds) or ["full_attention"]
        own.layer_types = (kinds + kinds[-1:] * layers)[:layers]
    if isinstance(windows := getattr(own, "max_window_layers", None), int):
        own.max_window_layers = min(windows, layers)
    return type(body)(own)


def _put(config: Any, names: tuple[str, ...], value: int | None) -> None:
    if value is None:
        return
    if (name := next((name for name in names if hasattr(config, name)), None)) is None:
        raise ValueError(
            f"shadow_model='mirror' needs a model with one of the settings {', '.join(names)}, which a "
            f"{type(config).__name__} lacks; set `shadow_model` to a pretrained model instead."
        )
    setattr(config, name, int(value))


def _loaded(name: str) -> tuple[Any, nn.Module | None]:
    """The backbone of a checkpoint, and its projection if it has one. No code that comes with it is run."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel
    from transformers.utils.hub import cached_file

    on_meta = torch.empty(0).is_meta
    content = read_json(Path(str(cached_file(name, "config.json"))))
    if content.get("model_type") != PROJECTED:
        if on_meta:
            return AutoModel.from_config(AutoConfig.from_pretrained(name, trust_remote_code=False)), None
        return AutoModel.from_pretrained(name, trust_remote_code=False), None
    inner = dict(content["shadow_model_config"])
    backbone = AutoModel.from_config(AutoConfig.for_model(inner.pop("model_type"), **inner))
    projection = nn.Linear(width_of(backbone.config), int(content["base_hidden_size"]), bias=False)
    if not on_meta:
        weights = load_file(str(cached_file(name, "model.safetensors")))
        own = {k.removeprefix("shadow_model."): t for k, t in weights.items() if k.startswith("shadow_model.")}
        if "shadow_hidden_projection.weight" not in weights:
            raise ValueError(f"{name!r} is a projected shadow checkpoint but has no 'shadow_hidden_projection.weight'")
        backbone.load_state_dict(own, strict=True)
        projection.weight = nn.Parameter(weights["shadow_hidden_projection.weight"].to(projection.weight.dtype))
    return backbone, projection
