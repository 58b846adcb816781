"""X-LoRA: each token goes through all LoRA adapters of a layer, with weights that a classifier of the model's last
hidden states gives it (arXiv 2402.07148).

A forward is two: one of the base model, without gradients, whose hidden states the classifier sees, and the one that
the weights act in. A layer is one call of `lora_mixture`; beside n LoRAs the classifier costs its own products per
token, once for the model, and the first forward about a third of a training step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import PeftConfig, check
from ..config.types import PeftWarning
from ..files.whole import is_apart
from .fused import Fused
from .lora.lora import Lora
from .math.cache import Cache
from .math.mixture import Mixed, apart, fused, layer_state, together
from .method import AdaptedLayer, AdapterView, Inner, LayerInfo, Method, State

_SHARED = "internal_xlora_classifiers"  # the container, which has a classifier for each adapter
_IN_FILE = "internal_xlora_classifier"


@dataclass
class XLoraConfig(PeftConfig, own_type="XLORA"):
    """hidden_size: of the model's hidden states. adapters: folders or Hub repositories of LoRA adapters by name, which
    are loaded as adapters "0", "1", ... enable_softmax: over the adapters. softmax_temperature: of it.
    enable_softmax_topk: the same over those that top_k_lora leaves. layerwise_scalings: weights for every layer of its
    own. xlora_depth, xlora_size, xlora_dropout_p: linear layers of the classifier, and the width and dropout between
    them. use_trainable_adapters: train the adapters, too. scaling_pass_value: weights in the first forward.
    global_scaling_weight: factor of all weights.
    """

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        told = []
        if self.hidden_size is None:
            self.hidden_size = 4096
            told.append("No value was provided for `hidden_size`: it is set to 4096, please ensure that this is right.")
        if self.adapters is None:
            self.adapters = {}
            told.append("No value was provided for `adapters`: there are none, please ensure that this is right.")
        if self.enable_softmax_topk and self.top_k_lora is None:
            told.append("`enable_softmax_topk` is on and `top_k_lora` is not set")
        if self.enable_softmax_topk and self.enable_softmax:
            told.append("`enable_softmax_topk` and `enable_softmax` are both enabled, which gives worse results.")
        for text in told:
            warnings.warn(text, PeftWarning, stacklevel=3)


class XLoraClassifier(nn.Module):
    """The classifier of an X-LoRA. names: of the adapted layers, in the model's order.

    scalings_logging: keep the weights of each forward in `log_scalings`. latest: those of the last one.
    """

    def __init__(self, config: XLoraConfig, names: Sequence[str], n_classes: int) -> None:
        super().__init__()
        self.config, self.n_classes, self.n_layers = config, n_classes, len(names)
        self.numbers = {name: i for i, name in enumerate(names)}
        self.log_scalings: list[Tensor] = []
        self.scalings_logging = False
        self.latest: Tensor | None = None
        self.override_scaling_pass_value: float = config.scaling_pass_value
        layers: list[nn.Module] = []
        width = int(config.hidden_size or 0)
        for _ in range(config.xlora_depth - 1):
            layers += [nn.Linear(width, config.xlora_size), nn.ReLU()]
            layers += [nn.Dropout(config.xlora_dropout_p)] if config.xlora_dropout_p > 0.0 else []
            width = config.xlora_size
        count = n_classes * self.n_layers if config.layerwise_scalings else n_classes
        self.layers = nn.Sequential(*layers, nn.Linear(width, count))

    @property
    def dtype(self) -> torch.dtype:
        first: Any = self.layers[0]  # FSDP1 takes parameters away while it computes, and leaves tensors in their places
        found: torch.dtype = first.weight.dtype
        return found

    def __getstate__(self) -> dict[str, Any]:  # a copy has no graph
        return {**self.__dict__, "latest": None, "log_scalings": []}

    def forward(self, hidden: Tensor) -> Tensor:
        """Weights [batch, tokens, n_layers, n_classes] for hidden states [batch, tokens, hidden_size]."""
        first: Any = self.layers[0]
        if hidden.dim() != 3 or hidden.shape[-1] != first.in_features:
            expected = f"[batch, tokens, hidden_size={first.in_features}]"
            raise ValueError(f"X-LoRA's classifier expected hidden states {expected}, got {tuple(hidden.shape)}.")
        logits = self.layers(hidden.to(self.dtype)).unflatten(-1, (-1, self.n_classes))
        scalings: Tensor = logits.expand(-1, -1, self.n_layers, -1)
        if self.config.enable_softmax:
            scalings = torch.softmax(scalings / self.config.softmax_temperature, dim=-1)
        units = any(map(is_apart, self.layers))  # which have their tensors, and gradients, to themselves
        if scalings.requires_grad and not units and not torch.compiler.is_compiling():
            linear: list[Any] = [m for m in self.layers if isinstance(m, nn.Linear)]
            scalings = apart(scalings, [hidden, *(t for m in linear for t in (m.weight, m.bias))])
        self.latest = scalings
        if self.scalings_logging:
            self.log_scalings.append(scalings)
        return scalings


class XLoraLayer:
    """One layer's part in an X-LoRA."""

    def __init__(self, layer_number: int, config: XLoraConfig) -> None:
        self.layer_number, self.config = layer_number, config
        self.kept = Cache(by_version=True)

    def get_maybe_topk_scalings(self, scalings: Tensor) -> Tensor:
        """This layer's weights [batch, tokens, n] of [batch, tokens, layers, n], after top-k and its softmax."""
        own, config = scalings[:, :, self.layer_number, :], self.config
        if config.top_k_lora is not None:
            mask = torch.zeros_like(own, dtype=torch.bool)
            own = own * mask.scatter(-1, own.topk(config.top_k_lora, dim=-1).indices, True).to(own.dtype)
        if config.enable_softmax_topk:
            left = own != 0
            chosen = torch.softmax(own.masked_fill(~left, float("-inf")), dim=-1)
            own = chosen.masked_fill(~left, 0.0)
        return own


# What a model with an X-LoRA has: functions and attributes of PEFT's XLoraModel, by name.


def _classifier(tuner: Any) -> XLoraClassifier:
    """The classifier of the X-LoRA that is active, or of the first."""
    container = tuner._modules[_SHARED]
    name = next((n for n in tuner.active_adapters if n in container), next(iter(container)))
    found: XLoraClassifier = container[name]
    return found


def set_topk_lora(tuner: Any, value: int | None) -> None:
    """Use the `value` adapters with the largest weights for each token; None: all."""
    classifier = _classifier(tuner)
    if value is not None and not 1 <= value <= classifier.n_classes:
        raise ValueError(f"top_k_lora should be from 1 to {classifier.n_classes}, the number of adapters, got {value}")
    classifier.config.top_k_lora = value


def set_global_scaling_weight(tuner: Any, weight: float) -> None:
    """Multiply the output of every adapter by `weight`."""
    _classifier(tuner).config.global_scaling_weight = weight


def get_global_scaling_weight(tuner: Any) -> float:
    """The factor of every adapter's output."""
    return _classifier(tuner).config.global_scaling_weight


def set_scaling_pass_value(tuner: Any, value: float | None) -> None:
    """Set the weight of all adapters in the first forward; None: 1 / n."""
    classifier = _classifier(tuner)
    classifier.override_scaling_pass_value = 1 / classifier.n_classes if value is None else value
    classifier.config.scaling_pass_value = classifier.override_scaling_pass_value


def get_latest_scalings(tuner: Any) -> Tensor | None:
    """The weights [batch, tokens, layers, adapters] of the last forward, or None."""
    return _classifier(tuner).latest


def get_scalings_log(tuner: Any) -> list[Tensor]:
    """The weights of each forward since logging was enabled, in a new list."""
    return _classifier(tuner).log_scalings.copy()


def enable_scalings_logging(tuner: Any) -> None:
    """Keep the weights of each forward from now on."""
    _classifier(tuner).scalings_logging = True


def disable_scalings_logging(tuner: Any) -> None:
    """Keep no more weights; those that are there stay."""
    _classifier(tuner).scalings_logging = False


def clear_scalings_log(tuner: Any) -> None:
    """Forget the weights that were kept."""
    _classifier(tuner).log_scalings.clear()


def get_bucketed_scalings_log(tuner: Any) -> dict[int, tuple[list[int], list[Tensor]]]:
    """The log by the number of tokens: places in the log, and the weights."""
    found: dict[int, tuple[list[int], list[Tensor]]] = {}
    for i, scalings in enumerate(_classifier(tuner).log_scalings):
        places, tensors = found.setdefault(scalings.shape[1], ([], []))
        places.append(i)
        tensors.append(scalings)
    return found


_FUNCTIONS: Iterable[Callable[..., Any]] = (
    set_topk_lora, set_global_scaling_weight, get_global_scaling_weight, set_scaling_pass_value, get_latest_scalings,
    get_scalings_log, enable_scalings_logging, disable_scalings_logging, clear_scalings_log, get_bucketed_scalings_log,
)  # fmt: skip


class XLora(Method, config=XLoraConfig):
    tensors = (_SHARED,)
    kinds = frozenset({"linear", "embedding"})
    examples = ()  # it needs adapters in files
    mergeable = False
    autocast = False
    kernel = "lora_mixture"
    generate_options: ClassVar[Mapping[str, Any]] = {"use_cache": False}  # a token's weights follow from all before it
    model_methods: ClassVar[Mapping[str, Callable[..., Any] | property]] = {
        **{f.__name__: f for f in _FUNCTIONS},
        _IN_FILE: property(_classifier), "internal_xlora_scalings": property(get_latest_scalings),
        "lora_model": property(lambda tuner: tuner), "disabled": property(lambda tuner: _is_off(tuner)),
        "xlora_config": property(lambda tuner: _classifier(tuner).config),
    }  # fmt: skip

    def check_config(self, config: XLoraConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        adapters, k = config.adapters, config.top_k_lora
        good = isinstance(adapters, dict) and bool(adapters) and all(isinstance(p, str) for p in adapters.values())
        check(config, "adapters", good, "folders or repositories of one LoRA adapter at least, by name")
        if config.xlora_depth < 1:
            raise ValueError(f"X-LoRA depth must be strictly positive, got xlora_depth={config.xlora_depth}.")
        for name in ("hidden_size", "xlora_size"):
            check(config, name, (getattr(config, name) or 0) > 0, "positive")
        check(config, "xlora_dropout_p", 0.0 <= config.xlora_dropout_p < 1.0, "in [0, 1)")
        check(config, "softmax_temperature", config.softmax_temperature > 0, "greater than 0")
        check(config, "top_k_lora", k is None or 1 <= k <= len(adapters or ()), "from 1 to the number of adapters")

    def open_fields(self, config: XLoraConfig, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        if getattr(getattr(model, "config", None), "use_cache", False):
            why = "weights follow from the whole sequence: set model.config.use_cache = False"
            raise ValueError(f"`use_cache` must be False for X-LoRA, whose {why}.")
        return {}

    def mixes(self, config: XLoraConfig) -> Mapping[str, str]:
        return {str(i): path for i, path in enumerate((config.adapters or {}).values())}

    def check_mixed(self, name: str, method: Method, config: Any) -> None:
        if type(method) is not Lora:
            raise ValueError(f"X-LoRA mixes plain LoRA adapters; adapter {name!r} is a {type(method).__name__}.")

    def mergeable_in(self, s: Any, info: LayerInfo) -> str | None:
        return "X-LoRA has no merged form: each token has other weights"

    def make_shared(self, config: XLoraConfig, layers: Sequence[LayerInfo]) -> State:
        return {_SHARED: XLoraClassifier(config, [info.name for info in layers], len(config.adapters or ()))}

    def make_state(self, config: XLoraConfig, info: LayerInfo, shared: Any) -> State:
        return {"xlora_layers": XLoraLayer(getattr(shared, _SHARED).numbers[info.name], config)}

    def trains_along(self, s: Any) -> Sequence[str]:
        config: XLoraConfig = s.xlora_layers.config
        return [*self.mixes(config)] if config.use_trainable_adapters else ()

    def pack(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace(f"{_SHARED}.", f"{_IN_FILE}."): value for key, value in tensors.items()}

    def unpack(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace(f"{_IN_FILE}.", f"{_SHARED}."): value for key, value in tensors.items()}

    def may_lack(self, config: XLoraConfig, key: str) -> str | None:
        number = key.partition(".layers.")[2].partition(".")[0]
        if not number.isdigit() or int(number) >= len(config.adapters or ()):
            return None
        return "PEFT 0.21 leaves layers of the classifier out of its files whose number is an adapter's name"

    # The two forwards of a model

    def before_forward(
        self, tuner: Any, adapter: str, give: Callable[[Any], None], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        classifier: XLoraClassifier = tuner._modules[_SHARED][adapter]
        choices = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
        given = next((v for v in choices if v is not None), None)
        if not isinstance(given, Tensor) or given.dim() < 2:
            raise ValueError("X-LoRA needs `input_ids` [batch, tokens] or `inputs_embeds` [batch, tokens, ...].")
        rows, value = given.shape[:2], classifier.override_scaling_pass_value
        if _is_off(tuner):
            return give(None)
        dtype = classifier.dtype
        every = torch.full((), value, dtype=dtype, device=given.device)
        off = value == 0
        give([None] * rows[0] if off else every.expand(*rows, classifier.n_layers, classifier.n_classes))
        with torch.no_grad():
            found = tuner.model.forward(*args, **{**kwargs, "output_hidden_states": True, "return_dict": True})
        hidden = getattr(found, "hidden_states", None)
        if not hidden:
            raise ValueError(f"X-LoRA needs `hidden_states` of the model, which {type(found).__name__} has not.")
        give(classifier(hidden[-1]))
        return None

    # A layer

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        found = self._weights(s, x)
        if found is None:
            return y
        weights, factor = found
        for i, view in self._experts(s):
            w = weights[..., i, None]
            scale = view.scaling * factor
            if view.get("lora_embedding_A") is not None:
                low = inner.apply(x, view.lora_embedding_A)
                y = y + F.linear(low * w.to(low.dtype), view.lora_embedding_B) * scale
            else:
                given = s.cast(x, view.lora_A.weight.dtype)
                y = y + view.lora_B(view.lora_A(view.lora_dropout(given * w.to(given.dtype)))) * scale
        return y

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        if layer.base.kind != "linear":
            return None

        def of(x: Tensor) -> Mixed | None:
            experts = self._experts(s)
            if not all(_is_plain(view) for _, view in experts):
                return None
            found = self._weights(s, x)
            if found is None:
                return None
            weights, factor = found
            if len(experts) < weights.shape[-1]:
                weights = weights[..., [i for i, _ in experts]]
            a, b = ([getattr(v, name).weight for _, v in experts] for name in ("lora_A", "lora_B"))
            scaling = [view.scaling * factor for _, view in experts]
            masked = s.xlora_layers.config.top_k_lora is not None
            return Mixed(*together(s.xlora_layers.kept, layer_state(s), a, b), weights, scaling, masked)

        return fused(layer, of)

    def _experts(self, s: Any) -> list[tuple[int, AdapterView]]:
        """The adapters that this layer has, each with its number."""
        others = s.neighbours()
        return [(i, others[n][1]) for i, n in enumerate(self.mixes(s.xlora_layers.config)) if n in others]

    @staticmethod
    def _weights(s: Any, x: Tensor) -> tuple[Tensor, float] | None:
        """Weights [..., n] for the tokens of x, and their factor; None while the adapters are off. Outside of a forward
        of the model each adapter acts in full."""
        own, rows = s.xlora_layers, s.row_values
        if rows is None:
            return torch.ones(len(own.config.adapters), device=x.device), 1.0
        if not isinstance(rows, Tensor):
            if rows[0] is None:
                return None
            rows = torch.stack([*rows])
        weights: Tensor = own.get_maybe_topk_scalings(rows).to(x.device)
        leading = x.shape[:-1] if x.is_floating_point() else x.shape
        if weights.shape[:-1] != leading:
            if weights.shape[:-1].numel() != leading.numel():
                here = f"{tuple(weights.shape[:-1])} tokens, but the input of {s.layer_shown} is {tuple(x.shape)}"
                raise ValueError(f"X-LoRA has weights for {here}.")
            weights = weights.reshape(*leading, weights.shape[-1])
        return weights, own.config.global_scaling_weight


def _is_plain(view: AdapterView) -> bool:
    """True for an adapter that the kernel can take now: without hooks, a bias, or dropout."""
    a, b, dropout = view.lora_A, view.lora_B, view.lora_dropout
    hooks = (a._forward_hooks, a._forward_pre_hooks, b._forward_hooks, b._forward_pre_hooks)
    drops = type(dropout) is not nn.Identity and dropout.training
    return not (drops or view.lora_bias or any(hooks)) and type(a) is type(b) is nn.Linear


def _is_off(tuner: Any) -> bool:
    return any(module.disable_adapters for _, module in tuner.adapter_modules())
