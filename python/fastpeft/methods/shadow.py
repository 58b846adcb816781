"""Shadow: a small network beside a decoder, whose state is led from block to block and corrects what they get.

s_0 = projection(backbone(tokens)). Block l gets h + alpha * dropout(h - s) W_down^T W_up^T in the place of h, and from
its output o comes s <- (1 - g) s + g T(o) with g = sigmoid(G(o)); T and G are MLPs of one inner layer. A loss of the
task's head on s_0 is added, so that backbone, projection and head serve alone (`unload_shadow`). FLOPs beside a block's
for a token, at width h, rank r and inner width u: 4 h r + 8 h u; those of the backbone once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.base import HasInitWeights, TargetConfig, check
from ..config.limits import MAX_RANK
from ..config.types import SEQ_CLS_HEADS, TaskType
from ..weights.whole_module import WholeModule
from .math.factored import dropout
from .method import LayerInfo, State
from .shadow_forward import (
    FROM_INPUT,
    Following,
    auxiliary_states,
    check_tokens,
    first_state,
    now,
    resolve_shadow_head,
    shadow_auxiliary_loss,
    shared_embeddings,
    unload_shadow,
)
from .whole import Rows, WholeMethod

SHARED = ("shadow_backbone", "shadow_projection", "shadow_head")
OWN = ("shadow_down", "shadow_up", "shadow_update_transform", "shadow_update_gate")
MAX_LAYERS = 1024  # each takes time to make, also without memory for a file to fill
_KEPT = "_fastpeft_shadow"  # on a block's input: the state that the block had beside it


@dataclass
class ShadowConfig(HasInitWeights, TargetConfig, own_type="SHADOW"):
    """target_modules: whole blocks, all of the decoder by default. r: rank of the correction. shadow_alpha: its factor.
    init_weights: start without correction, or random (False). shadow_model: "mirror" for a backbone of the model's
    architecture with the shadow_* sizes below, or the checkpoint of one. share_embeddings: it gets the base model's
    embeddings of the tokens, where it is as wide. update_hidden_size: inner width of T and G, by default r.
    auxiliary_loss_weight: of the loss on the backbone alone."""

    whole_modules = True
    by_layer = False  # `open_fields` chooses by `layers_to_transform`, whose numbers end the names of blocks
    mirrored = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")

    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f"shadow_{name}" for name in self.mirrored if getattr(self, f"shadow_{name}") is not None]
        if given and self.shadow_model != "mirror":
            raise ValueError(
                f"shadow_model={self.shadow_model!r} brings its sizes along: unset these mirror-only overrides: "
                f"{', '.join(given)}."
            )


class Shadow(WholeMethod, config=ShadowConfig):
    tensors = (*OWN, *SHARED)
    model_methods: ClassVar[Any] = {
        "shadow_auxiliary_loss": shadow_auxiliary_loss, "unload_shadow": unload_shadow,
        "auxiliary_states": auxiliary_states,
        "_resolve_shadow_head": resolve_shadow_head, "_shadow_share_embeddings": property(shared_embeddings),
        "shadow_head": property(lambda tuner: nn.ModuleDict()),  # where no adapter has one
    }  # fmt: skip
    counts = ("r",)
    autocast = False  # the blocks' tensors are float32 in any case, and the backbone computes as the model does
    alone = True

    # Putting it in

    def check_config(self, config: ShadowConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        for name in (*(f"shadow_{name}" for name in config.mirrored), "update_hidden_size"):
            value, most = getattr(config, name), MAX_LAYERS if name.endswith("layers") else MAX_RANK
            fits = value is None or (type(value) is int and 1 <= value <= most)
            check(config, name, fits, f"a positive integer of at most {most}, or None")
        check(config, "auxiliary_loss_weight", config.auxiliary_loss_weight >= 0, "0 or more")

    def check_beside(self, config: ShadowConfig, others: Sequence[Any]) -> None:
        shadows = [other for other in others if isinstance(other, ShadowConfig)]
        if shadows and any(c.task_type == TaskType.SEQ_CLS for c in (config, *shadows)):
            raise ValueError(
                "Shadow does not support multiple adapters when any adapter uses sequence classification: each would "
                "have a classifier in `modules_to_save` beside its `shadow_head`."
            )

    def open_fields(self, config: ShadowConfig, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        from ..networks.shadow_backbone import blocks_of

        if config.target_modules is not None:
            return {}
        names, wanted = blocks_of(model), config.layers_to_transform
        chosen = {wanted} if isinstance(wanted, int) else set(wanted or range(len(names)))
        if lost := sorted(chosen - set(range(len(names)))):
            raise ValueError(f"layers_to_transform has {lost}, the model has {len(names)} blocks")
        return {"target_modules": {name for i, name in enumerate(names) if i in chosen}}

    def base_of(self, module: nn.Module, model: nn.Module) -> WholeModule:
        from ..networks.shadow_backbone import width_of

        return WholeModule(module, width_of(getattr(model, "config", None)), model, "ShadowLayer")

    def make_shared(self, config: ShadowConfig, layers: Sequence[LayerInfo]) -> State:
        from ..networks.shadow_backbone import build

        model: Any = layers[0].base.model  # type: ignore[attr-defined]
        backbone, projection = build(config, model)
        made = {"shadow_backbone": backbone, "shadow_projection": projection}
        heads = [getattr(model, name, None) for name in SEQ_CLS_HEADS]
        head = next((head for head in heads if isinstance(head, nn.Module)), None)
        if config.task_type == TaskType.SEQ_CLS and head is not None:
            made["shadow_head"] = copy.deepcopy(getattr(head, "original_module", head))
            if torch.empty(0).is_meta:
                made["shadow_head"].to("meta")
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return {name: _exactly(module, dtype) for name, module in made.items()}

    def make_state(self, config: ShadowConfig, info: LayerInfo, shared: Any) -> State:
        from ..networks.shadow_backbone import shares_embeddings

        width, inner = info.in_features, config.update_hidden_size or config.r
        down, up = nn.Linear(width, config.r, bias=False), nn.Linear(config.r, width, bias=False)
        if config.init_weights:
            nn.init.zeros_(up.weight)
        transform, gate = (
            nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)) for _ in range(2)
        )
        dtype = torch.promote_types(info.dtype, torch.float32)
        state: State = dict(zip(OWN, (_exactly(m, dtype) for m in (down, up, transform, gate)), strict=True))
        model: Any = info.base.model  # type: ignore[attr-defined]
        return {
            **state, "shadow_dropout": dropout(config.shadow_dropout), "shadow_r": config.r,
            "shadow_alpha": config.shadow_alpha, "shadow_config": copy.copy(config),
            "shadow_shares": shares_embeddings(config, model, shared.shadow_backbone),
        }  # fmt: skip

    def freeze(self, layer: Any, name: str) -> None:
        s = layer.view(name)
        if s.shadow_config.shadow_model == "mirror":
            return
        backbone = s.shadow_backbone
        if hasattr(backbone, "get_input_embeddings"):
            backbone.get_input_embeddings().requires_grad_(False)
        else:
            from ..networks.flux_shadow import freeze_stems

            freeze_stems(backbone)

    # Files: PEFT writes the name "default" into the keys of every adapter

    def pack(self, config: ShadowConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {_named(key): tensor for key, tensor in tensors.items()}

    def unpack(self, config: ShadowConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {_named(key, False): tensor for key, tensor in tensors.items()}

    def filled(self, layer: Any, adapter: str) -> None:
        """Make buffers that are in no file, such as the angles of rotary embeddings."""
        from ..networks.shadow_backbone import build

        s = layer.view(adapter)
        empty = [name for name, buffer in s.shadow_backbone.named_buffers() if buffer.is_meta]
        if not empty:
            return
        with torch.device("cpu"):
            made = dict(build(s.shadow_config, layer.base.model)[0].named_buffers())
        device = next(s.shadow_backbone.parameters()).device
        for name in empty:
            where, _, last = name.rpartition(".")
            s.shadow_backbone.get_submodule(where)._buffers[last] = made[name].to(device)

    # Computing

    def settled(self, model: Any, layers: Sequence[Any]) -> None:
        own = [layer for layer in layers if any(m.peft_type == self.peft_type for m in layer.methods.values())]
        Following.end(model)
        if own:
            Following(model, own).start()

    def around(
        self, layer: Any, name: str, inner: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], rows: Rows
    ) -> Any:
        if rows is not None:
            raise ValueError("Shadow has one state for the whole batch: rows cannot have adapters of their own.")
        s, x = layer.view(name), args[0] if args else kwargs["hidden_states"]
        this = next((p for p in reversed(now.passes) if id(layer) in p.layers and p.adapter == name), None)
        before = getattr(x, _KEPT, None) if this is None else this.state
        if before is None:
            raise RuntimeError(
                f"{layer.layer_name}: no shadow state comes with this input. A block runs in a forward of its model; "
                "gradient checkpointing has to be with use_reentrant=False."
            )
        if this is not None and torch.is_grad_enabled():
            # For a block that is checkpointed and runs again, when the forward is over. Values suffice there, and a
            # state with its graph would hold x, which holds it.
            kept = before if before is FROM_INPUT else before.detach().requires_grad_(before.requires_grad)
            setattr(x, _KEPT, kept)
        if before is FROM_INPUT:
            before = first_state(layer, name, x, args, kwargs)
        check_tokens(before, x)
        before = before.to(x.device)

        dtype = s.shadow_down.weight.dtype
        correction = s.shadow_up(s.shadow_down(s.shadow_dropout((x - before).to(dtype))))
        x = x + (s.shadow_alpha * correction).to(x.dtype)
        output = inner(x, *args[1:], **kwargs) if args else inner(**{**kwargs, "hidden_states": x})
        after = _hidden(output).to(dtype)
        gate = torch.sigmoid(s.shadow_update_gate(after))
        state = (1.0 - gate) * before.to(dtype) + gate * s.shadow_update_transform(after)
        if this is not None:
            this.state = state.to(before.dtype)
        return output


def _exactly(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module in a dtype that `inject.place` leaves as it is."""
    module.to(dtype).exact = True  # type: ignore[assignment]
    return module


def _named(key: str, with_default: bool = True) -> str:
    """A key in PEFT's files, which has "default" after the name of what it is in; or the key without that."""
    parts = key.split(".")
    at = next((i for i, part in enumerate(parts) if part in Shadow.tensors), None)
    if at is None or (parts[at + 1 : at + 2] == ["default"]) == with_default:
        return key
    start, rest = parts[: at + 1], parts[at + 1 :]
    return ".".join([*start, "default", *rest] if with_default else start + rest[1:])


def _hidden(output: Any) -> Tensor:
    """The states that a block returns, alone or with others."""
    found = output[0] if isinstance(output, (tuple, list)) else output
    for name in ("hidden_states", "last_hidden_state"):
        found = getattr(found, name, None) if not isinstance(found, Tensor) else found
    if not isinstance(found, Tensor):
        raise TypeError(f"Unsupported decoder block output type: {type(output)}. Expected a Tensor or a tuple.")
    return found
