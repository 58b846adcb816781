"""Method: the stateless math of one type of adapter.

A method knows one adapter's tensors in one layer and that layer's weight as a matrix. It knows nothing of names of
other adapters, merging, devices, quantisation or other methods; `AdapterLayer` composes, merges and stores.

The law that every method obeys (tests/fastpeft/test_laws.py holds each to it):

    layer.forward(x) == F.linear(x, *merged(W, b))

where W, b is the layer that the adapters before this one made. `W` is always given as [out_features, in_features]
(Conv1D transposed, an embedding as the matrix that acts on one-hot rows), for convolutions [out, in / groups, *kernel].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..config.base import PeftConfig, check_probabilities, check_ranks
from ..config.patterns import first_match
from ..config.targets import DEFAULT_TARGETS
from ..config.types import PeftType
from ..weights.base import LayerInfo as LayerInfo
from .fused import Fused
from .view import AdaptedLayer as AdaptedLayer
from .view import AdapterView as AdapterView
from .view import Inner as Inner

State = dict[str, Any]
METHODS: dict[PeftType, Method] = {}  # those whose files were imported: `registry.py` has all


class Method:
    """One adapter type. Subclasses live in `methods/`, one file each; `class X(Method, config=XConfig)`, or with such a
    `config_class` in its body, is registered.

    config_class, prefix: its names; PEFT's type and name of the tuner class ("LoraModel") follow from the former, as
    does a prefix that is the type's name.
    tensors: names of the containers with trainable tensors, in PEFT's order. kinds: of layers it can adapt.
    mergeable: whether it has a merged form; a method without one is held to composition only. default_targets: what is
    adapted when no target is named, by `model.config.model_type`. patterns: fields that a layer can have its own value
    of, with the field that gives these values by pattern ({"r": "rank_pattern"}). examples: arguments of small
    configurations that between them exercise every option; the tests of the laws run over them. model_methods:
    functions, and properties, that a model with such an adapter has, by name; each takes the tuner first. forward_args:
    of the model's forward and `generate`, which the base model does not get. generate_options: what the base model's
    `generate` gets. autocast: whether tensors become float32 on half-precision bases. repeats_shared: whether files
    repeat what is shared in every layer. counts: fields of the configuration that are positive integers, such as ranks.
    divisors: fields that divide sizes of the layer ({"block_size": ("in_features", "out_features")}). parallel: values
    of `BaseWeight.parallel` of layers that it can adapt (`parted`). kernel: the function of `peft_kernels` that `fused`
    calls.
    """

    peft_type: ClassVar[PeftType]
    prefix: ClassVar[str]
    config_class: ClassVar[type[PeftConfig]]
    model_name: ClassVar[str] = "TunerModel"
    tensors: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    default_targets: ClassVar[Mapping[str, Any]] = DEFAULT_TARGETS
    patterns: ClassVar[Mapping[str, str]] = {}
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    model_methods: ClassVar[Mapping[str, Callable[..., Any] | property]] = {}
    forward_args: ClassVar[tuple[str, ...]] = ()
    generate_options: ClassVar[Mapping[str, Any]] = {}
    mergeable: ClassVar[bool] = True
    autocast: ClassVar[bool] = True
    needs_base_weight: ClassVar[bool] = False
    repeats_shared: ClassVar[bool] = False
    prompts: ClassVar[bool] = False  # the adapter is a prompt of the model (`prompts/`), and in none of its layers
    counts: ClassVar[tuple[str, ...]] = ()
    divisors: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    parallel: ClassVar[frozenset[str]] = frozenset()
    kernel: ClassVar[str] = "lora_linear"

    def __init_subclass__(cls, config: type[PeftConfig] | None = None) -> None:
        if config is not None:
            cls.config_class = config
        if "config_class" in vars(cls) and cls.config_class.own_type is not None:
            cls.peft_type = cls.config_class.own_type
            cls.prefix = vars(cls).get("prefix", f"{cls.config_class.own_type.lower()}_")
            cls.model_name = cls.config_class.__name__.removesuffix("Config") + "Model"
            METHODS[cls.peft_type] = cls()

    def variant(self, config: Any) -> Method:
        """The method that a configuration means, where its options choose between several (LoRA and DoRA)."""
        return self

    # What is asked before anything is built. Errors here leave the model as it was.

    # PEFT's words for a size that has to be a multiple of a field's value, and is not.
    divisor_error: ClassVar[str] = "{size} ({whole}) must be divisible by {field} ({part})."

    def check_config(self, config: Any, loading: bool = False) -> None:
        """Raise for values that make no sense. loading: the tensors will come from a file, so how they would be
        initialised need not be supported."""
        for field in self.counts:
            check_ranks(getattr(config, field), getattr(config, self.patterns.get(field, ""), None), field)
        check_probabilities(config)

    def check_beside(self, config: Any, others: Sequence[Any]) -> None:
        """Raise ValueError where a new adapter cannot be in a model that has adapters of these configurations."""

    def keeps_edit(self, config: Any, info: LayerInfo) -> bool:
        """True where a new adapter is for the base weight as an edit of the one that it replaces left it."""
        return False

    def check_layer(self, config: Any, info: LayerInfo) -> None:
        """Raise ValueError where the math makes no sense on this layer (never silently do nothing)."""
        if info.kind not in self.kinds:
            what, kinds = f"{info.name!r}, a {type(info.module).__name__}", ", ".join(sorted(self.kinds))
            raise ValueError(f"{self.peft_type.value} cannot adapt {what}: it supports layers of kind {kinds}.")
        if info.base.parallel and info.base.parallel not in self.parallel:
            ways = {"tensor": "tensor parallelism splits among processes", "megatron": "Megatron splits"}
            raise ValueError(
                f"{type(self).__name__} cannot adapt {info.name!r}, which {ways[info.base.parallel]}: plain LoRA and "
                "BD-LoRA can (megatron_config=... on Megatron's layers). Train others in a model that is not split."
            )
        for field, size in ((field, size) for field, sizes in self.divisors.items() for size in sizes):
            whole, part = getattr(info, size), getattr(config, field)
            if part < 1 or whole % part:
                side = size.removesuffix("_features")
                named = {"size": size, "side": side, "whole": whole, "field": field, "part": part}
                raise ValueError(f"{self.divisor_error.format(**named)} (in {info.name!r})")
        if not info.transient:
            return
        what = f"{info.name!r}, a {type(info.module).__name__} that reads its weight itself"
        if not self.mergeable:
            raise ValueError(f"{self.peft_type.value} has no merged weight, which {what}, would need.")
        for field, value in vars(config).items():
            if field.endswith("dropout") and value:
                raise ValueError(f"{field}={value} cannot act in {what}: inputs are not seen. Set it to 0.")

    def layer_config(self, config: Any, names: Sequence[str]) -> dict[str, Any]:
        """The configuration of layers where it is not `config`, because of `patterns`, by name."""
        values = {f: first_match(getattr(config, p, None) or {}, names) for f, p in self.patterns.items()}
        result = {}
        for name in names:
            own = {f: found[name] for f, found in values.items() if name in found}
            if any(value != getattr(config, f) for f, value in own.items()):
                result[name] = copy.copy(config)
                vars(result[name]).update(own)
        return result

    def open_fields(self, config: Any, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        """Fields that a configuration leaves open and that the model decides, or ValueError if it cannot."""
        return {}

    def followers(self, config: Any, model: nn.Module) -> Mapping[str, str]:
        """Modules that are adapted along with another, whose weight they have too, by name with the other's name."""
        return {}

    # Optional: mixing other adapters of the layer, which come into the model first.

    def mixes(self, config: Any) -> Mapping[str, str] | None:
        """The adapters that it mixes, by the names that they get, each with its folder or repository; None: of none."""
        return None

    def check_mixed(self, name: str, method: Method, config: Any) -> None:
        """Raise ValueError for an adapter that it cannot mix."""

    def trains_along(self, s: Any) -> Sequence[str]:
        """Other adapters of the layer that train when this one does."""
        return ()

    # State: modules, parameters and buffers go into containers named after them, anything else into plain dicts.

    def make_shared(self, config: Any, layers: Sequence[LayerInfo]) -> State:
        """Entries that all layers of the adapter share (VeRA's A and B); {} for most methods. Parameters, buffers and
        modules go into containers of their names, which the layers hold (`shared_tensors.py`); a name that is in
        `tensors` too is trained. Other values are for `make_state` alone."""
        return {}

    def shares(self, info: LayerInfo, names: Sequence[str]) -> Mapping[str, str]:
        """Those of the shared entries `names` that a layer holds, by the name that it has there."""
        return {name: name for name in names}

    def make_state(self, config: Any, info: LayerInfo, shared: Any) -> State:
        """One layer's entries by name, initialised: those of `tensors` that this adapter has there, values such as
        `scaling`, and modules or buffers that are not trained."""
        raise NotImplementedError

    def parted(self, config: Any, state: State, info: LayerInfo) -> None:
        """Replace entries of a new state by the parts of this process, in a `parallel` layer."""

    def tie(self, config: Any, adapter: str, layers: Mapping[str, AdaptedLayer], leaders: Mapping[str, str]) -> None:
        """Let layers share entries: called once, when the adapter is in all its layers, given by name. leaders: see
        `followers`."""

    def saves(self, state: Mapping[str, Any], name: str) -> bool:
        """True if the entry `name`, where it holds tensors, is in `state_dict` and in files."""
        return bool(getattr(state.get(name), "persistent", True))  # nn.Buffer and `Computed` say it themselves

    def check_tensors(self, info: LayerInfo, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError for a layer's tensors from a file, by key, whose values make no sense; their shapes fit."""

    def check_together(self, views: Sequence[Any]) -> None:
        """Raise ValueError for adapters of one layer, in views, that cannot act or be merged at once."""

    def trains(self, s: Any, name: str) -> bool:
        """True if the entry `name` (one of `tensors`) is trained."""
        return True

    def file_key(self, key: str) -> str | None:
        """The key in a file for a tensor's key in memory, both without the adapter's name; None if it is in no file."""
        return key

    def base_key(self, key: str) -> str:
        """The key in a file for a tensor of the base model's by its key in memory."""
        return key

    def pack(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The contents of a file for the adapter's tensors by their keys in it. Also called with meta tensors."""
        return tensors

    def unpack(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `pack`, to which it may be applied twice. Raises ValueError for values that make no sense."""
        return tensors

    def ignores(self, config: Any, key: str) -> bool:
        """True for a file's tensor that is passed over because the configuration says that it is computed."""
        return False

    def may_lack(self, config: Any, key: str) -> str | None:
        """The reason why a file may lack a tensor, which then stays as it started; None: it may not."""
        return None

    def fields_in_file(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Fields of a file's configuration that say something else than its tensors, as the tensors have them."""
        return {}

    def make_room(
        self, layer: AdaptedLayer, adapter: str, tensors: Mapping[str, Tensor]
    ) -> Callable[[], None] | None:
        """Called before a file's tensors, by their keys in the layer, go into it: it can take over their sizes. Returns
        what takes that back."""

    def filled(self, layer: AdaptedLayer, adapter: str) -> None:
        """Called once a file's tensors are in a layer, for what follows from them."""

    # Math. `s` is an AdapterView, `shared` what make_shared gave, `inner` the layer that this adapter wraps.

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        """The update of W, in W's shape. Additive methods need only this. w: W, if `needs_base_weight`."""
        raise NotImplementedError

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of the adapted layer, given those of the layer that it wraps."""
        delta = self.delta_weight(s, shared, w if self.needs_base_weight else None)
        return w + delta.to(w.dtype).reshape(w.shape), b

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> Any:
        """A [r, in_features] and B [out_features, r] whose product is the whole update; None where there are none."""
        return None

    def mergeable_in(self, s: Any, info: LayerInfo) -> str | None:
        """Why this adapter has no merged form in this layer, or None if it has."""
        return None if self.mergeable else f"{self.peft_type.value} has no merged form"

    def input(self, s: Any, shared: Any, x: Tensor) -> Tensor:
        """The wrapped layer's input in place of x."""
        return x

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        """The adapted layer's output; y is the wrapped layer's for `input(x)`. By default what `delta_weight` gives is
        applied to x; a method without one acts through `input` alone."""
        if type(self).delta_weight is Method.delta_weight:
            return y
        delta = self.delta_weight(s, shared, inner.weight()[0] if self.needs_base_weight else None)
        return y + inner.apply(x, delta.to(x.dtype) if x.is_floating_point() else delta)

    def forward(self, s: Any, shared: Any, x: Tensor, inner: Inner) -> Tensor:
        """The adapted layer; only a method that calls `inner` other than once replaces it."""
        return self.output(s, shared, x, inner(self.input(s, shared, x)), inner)

    def splits(self, s: Any, info: LayerInfo) -> bool:
        """True if `forward` is now one call of `inner` between `input` and `output`: then rows of several adapters have
        that call in common (`layer/by_row`). A method that replaces `forward` says when."""
        return type(self).forward is Method.forward

    # Optional: more of a model's forward than its layers see. Both act while the adapter is active.

    def row_values(self, config: Any, inputs: Mapping[str, Any]) -> Sequence[Any] | None:
        """A value for each row of a batch, which layers have as `s.row_values` (aLoRA's offsets). inputs: the arguments
        of the model's forward or `generate` by name, with a first positional one as `input_ids`."""
        return None

    def model_output(self, tuner: Any, adapter: str, output: Any) -> Any:
        """The value that a forward of the model returns (AdaLoRA adds a regularisation to its loss)."""
        return output

    def settled(self, model: nn.Module, layers: Sequence[Any]) -> None:
        """Called when adapters of the method have come into a model or have gone. layers: all adapter layers now."""

    def before_forward(
        self, tuner: Any, adapter: str, give: Callable[[Any], None], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Called before each forward of the base model, also those of `generate`, with its arguments. give: takes a
        value for each row, as `row_values` gives them, from now on (X-LoRA's weights)."""

    @property
    def hooks_model(self) -> bool:
        names = ("row_values", "model_output", "before_forward")
        return any(getattr(type(self), name) is not getattr(Method, name) for name in names)

    # Optional: speed, and scaling by a user.

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        """A function that computes the whole layer for x while this adapter alone is active and unmerged, or None.

        It is made once and kept until the layer's adapters change, so it must read tensors through their containers (a
        parameter can be replaced at any time). Where it returns None, the composition of `input` and `output` serves.
        """
        return None

    def expert_factors(self, s: Any) -> tuple[Tensor, Tensor, float] | None:
        """(A [E, r, in], B [E, out, r], scaling) of an adapter that is W + scaling B A of each expert and nothing else.

        None of others: the layer computes with the merged weight of all experts then.
        """
        return None

    def scale(self, s: Any) -> float | None:
        """The scaling that the configuration gives, where the method has one (`layer.scaling`)."""
        return None


def check_indices(key: str, indices: Tensor, limit: str, below: int) -> None:
    """ValueError for a file's tensor unless it holds integers from 0 up to a limit."""
    if indices.is_floating_point() or ((indices < 0) | (indices.long() >= below)).any():
        raise ValueError(f"{key} should be indices below {limit}={below}")
