"""A forward of a model with shadows: hooks that make the first state, hold the caches together and add the loss; and
what a model with a shadow has as methods."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from ..config.types import PeftType, TaskType
from ..networks.shadow_head import loss_of_classes, loss_of_tokens, of_last_token

FROM_INPUT: Any = "from the first block's input"  # in the place of a state that is made there


class Pass:
    """A forward of a model: its adapter, and the shadow state where the forward is now. layers: of the model, by id."""

    def __init__(self, owner: Following, layers: frozenset[int], adapter: str) -> None:
        self.owner, self.layers, self.adapter = owner, layers, adapter
        self.state: Any = FROM_INPUT
        self.packs, self.past = False, None


class _Now(threading.local):
    """The forwards that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []


now = _Now()


def check_tokens(state: Tensor, x: Tensor) -> None:
    if state.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"The shadow state is of shape {tuple(state.shape[:-1])} and the states of the model of "
            f"{tuple(x.shape[:-1])}. A `past_key_values` has to be what this model returned, a ShadowCache."
        )


def first_state(layer: Any, name: str, x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The shadow state from the first block's input, for models without tokens."""
    from ..networks.flux_shadow import DetachedFluxShadowModel, block_kwargs

    s = layer.view(name)
    flux = isinstance(s.shadow_backbone, DetachedFluxShadowModel)
    out = s.shadow_backbone(inputs_embeds=x, **({"block_kwargs": block_kwargs(args, kwargs)} if flux else {}))
    return s.shadow_projection(out.last_hidden_state)  # type: ignore[no-any-return]


class Following:
    """Hooks on a model with shadows: they make the first state, keep the shadow's cache beside the model's, and add the
    loss on the first state to the model's loss."""

    def __init__(self, model: Any, layers: list[Any]) -> None:
        from ..networks.shadow_backbone import blocks_of, body_of

        self.model, self.layers = model, layers
        self.body = model
        try:
            if {layer.layer_name for layer in layers} <= set(blocks_of(model)):
                self.body = body_of(model)  # where also somebody passes who calls it without the head
        except ValueError:
            pass
        self.last = _Last()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, last=_Last())

    def start(self) -> None:
        self.body.register_forward_pre_hook(self.before, with_kwargs=True)
        self.body.register_forward_hook(self.after, with_kwargs=True, always_call=True)
        self.model.register_forward_hook(self.add_loss, with_kwargs=True)

    @classmethod
    def of(cls, model: nn.Module) -> Following | None:
        hooks = (getattr(hook, "__self__", None) for hook in model._forward_hooks.values())
        return next((hook for hook in hooks if isinstance(hook, cls)), None)

    @classmethod
    def end(cls, model: nn.Module) -> None:
        """Take the hooks off a model, if it has them."""
        if (found := cls.of(model)) is None:
            return
        for module in {found.body, model}:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for number in [n for n, hook in hooks.items() if getattr(hook, "__self__", None) is found]:
                    del hooks[number]
                    for flags in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs",
                                  "_forward_hooks_always_called"):  # fmt: skip
                        getattr(module, flags).pop(number, None)

    def active(self) -> tuple[Any, str] | None:
        """The first layer that has the adapter which is active, and its name."""
        for layer in self.layers:
            rows = layer.rows.names
            for name in () if layer._disable_adapters else layer._active_adapter if rows is None else set(rows):
                if _has(layer, name):
                    return layer, name
        return None

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from ..networks.shadow_cache import ShadowCache

        self.last.state = None
        past, shadow_past = kwargs.get("past_key_values"), None
        if isinstance(past, ShadowCache):
            kwargs, shadow_past = {**kwargs, "past_key_values": past.base}, past.shadow
        active = self.active()
        if active is None:
            return args, kwargs
        layer, name = active
        this = Pass(self, frozenset(map(id, self.layers)), name)
        given = {**_by_place(module, args), **kwargs}
        tokens, embeds = given.get("input_ids"), given.get("inputs_embeds")
        main = getattr(module, "main_input_name", "input_ids")
        if tokens is None and embeds is None and main != "input_ids" and isinstance(given.get(main), Tensor):
            embeds = given[main]
        if tokens is not None or embeds is not None:
            if shadow_past is None and past is not None and past.get_seq_length():
                raise ValueError(
                    "`past_key_values` holds tokens that the shadow has not seen. It has to be what this model "
                    "returned, a ShadowCache."
                )
            use_cache = given.get("use_cache")
            config = getattr(module, "config", None)
            this.packs = bool(getattr(config, "use_cache", False) if use_cache is None else use_cache)
            this.state, this.past = self._first(layer, name, tokens, embeds, shadow_past, this.packs, given)
            self.last.state = this.state
        now.passes.append(this)
        return args, kwargs

    def _first(
        self, layer: Any, name: str, tokens: Any, embeds: Any, past: Any, use_cache: bool, given: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        s = layer.view(name)
        if embeds is None and s.shadow_shares:
            embeds = self.model.get_input_embeddings()(tokens)
        inputs = {"input_ids": tokens} if embeds is None else {"inputs_embeds": embeds}
        length = (tokens if embeds is None else embeds).shape[1] + (past.get_seq_length() if past is not None else 0)
        if given.get("position_ids") is not None:
            inputs["position_ids"] = given["position_ids"]
        out = s.shadow_backbone(
            **inputs, attention_mask=_shortened(given.get("attention_mask"), length), use_cache=use_cache,
            past_key_values=past, return_dict=True,
        )  # fmt: skip
        return s.shadow_projection(out.last_hidden_state), getattr(out, "past_key_values", None)

    def after(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        from ..networks.shadow_cache import ShadowCache

        if not now.passes or now.passes[-1].owner is not self:
            return output
        this = now.passes.pop()
        if this.packs and getattr(output, "past_key_values", None) is not None:
            output.past_key_values = ShadowCache(output.past_key_values, this.past)
        return output

    def add_loss(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        module.last_shadow_loss = None
        labels, active = kwargs.get("labels"), self.active()
        if active is None or labels is None or getattr(output, "loss", None) is None:
            return output
        loss = self.loss(self.last.state, labels, kwargs.get("attention_mask"))
        if loss is not None:
            output.shadow_loss = module.last_shadow_loss = loss.detach()
            if (weight := self.config(active[1]).auxiliary_loss_weight) > 0:
                output.loss = output.loss + weight * loss
        return output

    def config(self, name: str) -> Any:
        """The configuration of an adapter as it is now."""
        return self.model.peft_config[name]

    def loss(self, state: Tensor | None, labels: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        active = self.active()
        if active is None or state is None or (head := self.head(active[1])) is None:
            return None
        if self.config(active[1]).task_type == TaskType.CAUSAL_LM:
            return loss_of_tokens(head(state), labels)
        return loss_of_classes(head(of_last_token(state, attention_mask)), labels)

    def head(self, name: str) -> Any:
        """The head for a shadow's state: a copy of its own, or the output embeddings of a language model."""
        own = self.with_adapter(name).view(name).get("shadow_head")
        if own is None and self.config(name).task_type == TaskType.CAUSAL_LM:
            return self.model.get_output_embeddings()
        return own

    def with_adapter(self, name: str) -> Any:
        found = next((layer for layer in self.layers if _has(layer, name)), None)
        if found is None:
            raise ValueError(f"No shadow backbone found for adapter {name!r}.")
        return found


def _has(layer: Any, name: str) -> bool:
    method = layer.methods.get(name)
    return method is not None and method.peft_type == PeftType.SHADOW


class _Last(threading.local):
    """The first state of this thread's last forward."""

    state: Tensor | None = None


def _by_place(module: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(inspect.signature(module.forward).bind_partial(*args).arguments) if args else {}


def _shortened(mask: Any, length: int) -> Any:
    """A mask [batch, heads, tokens, length] for as many tokens as the shadow has seen; the base's cache may be static,
    with room for more."""
    if isinstance(mask, dict):
        return {name: _shortened(each, length) for name, each in mask.items()}
    return mask[..., :length] if isinstance(mask, Tensor) and mask.dim() == 4 else mask


# What a model with a shadow has as methods, by PEFT's names


def _following(tuner: Any) -> Following:
    found = Following.of(tuner.model)
    if found is None:
        raise ValueError("No shadow backbone found: the model has no Shadow adapter.")
    return found


def shadow_auxiliary_loss(tuner: Any, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
    """The loss of the shadow alone in the last forward, without its weight: that of the next tokens [batch, tokens] or
    of the sequences' labels. None without a forward on tokens, and where the task has no head."""
    following = _following(tuner)
    return following.loss(vars(tuner).get("_seed_shadow_state", following.last.state), labels, attention_mask)


def auxiliary_states(tuner: Any) -> list[tuple[float, Tensor]]:
    """(weight, states [batch, tokens, width]) of the last forward, for a training loop that makes the loss of the head
    itself: the same loss of these is to be added with that weight."""
    following = _following(tuner)
    active, states = following.active(), following.last.state
    if active is None or states is None or following.config(active[1]).task_type != TaskType.CAUSAL_LM:
        return []
    weight = following.config(active[1]).auxiliary_loss_weight
    return [(weight, states)] if weight > 0 else []


def unload_shadow(tuner: Any, adapter_name: str | None = None, copy: bool = False) -> Any:
    """The shadow of an adapter (None: of the active one) as a model of transformers: its backbone, projection and head.

    copy: with tensors of its own, and the embeddings that it shares with the base model: what `save_pretrained` needs.
    Else it has the very modules, and shared embeddings are in none of its files. NotImplementedError for models of
    diffusers.
    """
    from ..networks.shadow_alone import DetachedShadowModel
    from ..networks.shadow_backbone import is_diffusion

    following = _following(tuner)
    name = tuner.active_adapters[0] if adapter_name is None else adapter_name
    s = following.with_adapter(name).view(name)
    if is_diffusion(tuner.model):
        raise NotImplementedError(
            "`unload_shadow()` is not supported for Diffusers models: a denoiser is more than its blocks."
        )
    modules = (s.shadow_backbone, s.shadow_projection, following.head(name))
    backbone, projection, head = (deepcopy(m) if copy and m is not None else m for m in modules)
    embeddings = tuner.model.get_input_embeddings() if s.shadow_shares else None
    if copy and embeddings is not None:
        backbone.embed_tokens, embeddings = deepcopy(embeddings), None
    classifies = following.config(name).task_type == TaskType.SEQ_CLS
    return DetachedShadowModel(backbone, projection, head, classifies, input_embeddings=embeddings)


def resolve_shadow_head(tuner: Any, adapter_name: str) -> Any:
    return _following(tuner).head(adapter_name)


def shared_embeddings(tuner: Any) -> dict[str, bool]:
    layers = _following(tuner).layers
    return {name: shares for layer in layers for name, shares in layer.shadow_shares.items()}
