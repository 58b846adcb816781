"""LoRA: W + scaling * B A, with A [r, in_features] and B [out_features, r] (arXiv 2106.09685).

scaling is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732). In a convolution A is a convolution to r
channels and B one of kernel 1. In an embedding A holds a column per row of the table. One active adapter on a plain or
4-bit linear layer is one call of `peft_kernels.lora_linear`.

(Longer than others by a configuration of thirty fields and by the fused path that its variants share.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import PreparedCall, lora_linear

from ...config.base import HasBias, HasFanInFanOut, TargetConfig
from ...config.seen_as_peft import SeenAsPeft
from ...config.types import PeftWarning
from ...weights.base import wide
from ...weights.lookups import Lookups
from ..fused import Fused, FusedProjection, LowRank
from ..math.draws import drawn_normal, kaiming_, normal_
from ..method import AdaptedLayer, Inner, LayerInfo, Method, State
from ..registry import load_all
from ..tied import Transposed, tied_fields, tied_names
from . import start
from .experts import delta_of, factors
from .parts import orthogonal, part_out
from .variants import SUB_CONFIGS, variant_of


@dataclass
class LoraRuntimeConfig(SeenAsPeft):
    """Options that only live in memory. ephemeral_gpu_offload: accepted; initialisations here need no offload."""

    ephemeral_gpu_offload: bool = False


# Fields that ask for a variant, marked as PEFT's layers look for them: they take this configuration, too.
_VARIANT = {"is_lora_variant": True}


@dataclass
class LoraConfig(HasFanInFanOut, HasBias, TargetConfig, own_type="LORA"):
    """Every field of PEFT's LoraConfig, with its default."""

    r: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = field(default=True, metadata={"lora_variants": ["mica"]})
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, int] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = field(default=False, metadata=_VARIANT)
    velora_config: Any = field(default=None, metadata=_VARIANT)
    alora_invocation_tokens: list[int] | None = field(default=None, metadata=_VARIANT)
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = field(default=None, metadata=_VARIANT)
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = field(default=None, metadata=_VARIANT)
    arrow_config: Any = field(default=None, metadata=_VARIANT)
    kasa_config: Any = field(default=None, metadata=_VARIANT)
    ensure_weight_tying: bool = False
    dora_full_gradient: bool = False  # DoRA: the gradient of the norm, too, which the paper and PEFT leave out

    runtime_fields: ClassVar[tuple[str, ...]] = ("runtime_config",)
    not_in_peft: ClassVar[tuple[str, ...]] = ("dora_full_gradient",)
    _custom_modules: ClassVar[Any] = None  # a configuration that has some has its own; PEFT's injection asks too

    def __post_init__(self) -> None:
        if not isinstance(self.megatron_config, (dict, type(None))):  # Megatron's own object, which no file holds
            vars(self)["runtime_fields"] = (*self.runtime_fields, "megatron_config")
        if isinstance(self.target_parameters, str):
            raise TypeError(f"`target_parameters` must be a list of strings or None. Got {self.target_parameters!r}.")
        super().__post_init__()
        if self.use_dora and self.megatron_config:
            raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
        for name, value in [(n, v) for n, v in vars(self).items() if isinstance(v, dict) and n not in PLAIN_DICTS]:
            load_all()  # the variants bring the classes
            if name in SUB_CONFIGS:  # a file has a nested configuration as a dictionary
                try:
                    setattr(self, name, SUB_CONFIGS[name](**value))
                except TypeError as error:  # a field that there is not, or a value of another type
                    raise ValueError(f"LoraConfig({name}={value!r}): {error}") from None
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        if self.lora_bias and isinstance(self.init_lora_weights, str):
            raise ValueError("The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                             f"{self.init_lora_weights!r}.")  # fmt: skip
        if self.lora_bias and self.use_dora:
            raise ValueError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False.")
        start.complete(self)


    def _register_custom_module(self, mapping: dict[type[nn.Module], type[nn.Module]]) -> None:
        """Put layers of your own on modules by their type: classes that derive from `fastpeft.tuners.lora.Linear`, by
        the type of what is below. A type that no adapter knows needs a matrix `weight`. In no file."""
        vars(self)["_custom_modules"] = {**(self._custom_modules or {}), **mapping}


PLAIN_DICTS = ("rank_pattern", "alpha_pattern", "loftq_config", "megatron_config", "auto_mapping")
INITS = (True, False, "gaussian", "orthogonal")


class Lora(Method):
    prefix = "lora_"
    config_class = LoraConfig
    tensors: ClassVar[tuple[str, ...]] = (
        "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
    )  # fmt: skip
    kinds = frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d", "experts"})
    patterns: ClassVar[dict[str, str]] = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
    counts = ("r",)
    parallel = frozenset({"tensor"})
    inits: ClassVar[tuple[str, ...]] = ()  # values of `init_lora_weights` that a variant adds
    combined_by: ClassVar[str | None] = None  # field to agree in, where `add_weighted_adapter` combines a variant
    examples: ClassVar[Any] = (
        {"r": 4, "lora_alpha": 3},
        {"r": 6, "lora_alpha": 5, "use_rslora": True},
        {"r": 2, "lora_bias": True},
        {"r": 30, "init_lora_weights": "gaussian"},  # a rank above both sizes of the layer
    )

    def variant(self, config: LoraConfig) -> Method:
        load_all()  # finds the variants too
        return variant_of(config) or self

    def open_fields(self, config: LoraConfig, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        return tied_fields(config, model) if config.ensure_weight_tying else {}

    def followers(self, config: LoraConfig, model: nn.Module) -> Mapping[str, str]:
        return tied_names(model) if config.ensure_weight_tying else {}

    def tie(self, config: Any, adapter: str, layers: Mapping[str, AdaptedLayer], leaders: Mapping[str, str]) -> None:
        for name, leader in leaders.items():  # the transposed update of the transposed weight
            layers[name].lora_A[adapter] = Transposed(layers[leader].lora_embedding_B, adapter)
            layers[name].lora_B[adapter] = Transposed(layers[leader].lora_embedding_A, adapter)

    def check_config(self, config: LoraConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        init, found = config.init_lora_weights, start.start_of(config.init_lora_weights)
        if found is not None:
            found.check_config(config)
        elif init not in (*INITS, *self.inits):
            names = (*INITS, *(s.name for s in start.starts()), "pissa_niter_<n>")
            raise ValueError(
                f"LoraConfig(init_lora_weights={init!r}) is unknown; there are {names} and the variant 'mica'."
            )
        if config.dora_full_gradient and not config.use_dora:
            raise ValueError("LoraConfig(dora_full_gradient=True) is an option of DoRA: pass use_dora=True with it.")
        for r in (config.r, *(config.rank_pattern or {}).values()):
            if init == "orthogonal" and r % 2:
                raise ValueError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")

    def check_beside(self, config: LoraConfig, others: Sequence[Any]) -> None:
        start.warn_beside([config, *others])

    def keeps_edit(self, config: LoraConfig, info: LayerInfo) -> bool:
        return (found := start.start_of(config.init_lora_weights)) is not None and found.for_edited(info)

    def check_layer(self, config: LoraConfig, info: LayerInfo) -> None:
        super().check_layer(config, info)
        if info.transient and type(self) is not Lora:
            what = type(info.module).__name__
            also = f" {what} does not support DoRA (yet), please set use_dora to False." if config.use_dora else ""
            raise ValueError(f"{type(self).__name__} cannot adapt {info.name!r}, a {what}.{also}")
        if config.r % info.groups:
            raise ValueError(
                f"Targeting a {type(info.module).__name__} with groups={info.groups} and rank {config.r}. Currently, "
                "support is limited to conv layers where the rank is divisible by groups. Either choose a different "
                f"rank or do not target this specific layer. It is {info.name!r}."
            )
        start.check_layer(config, info)
        if info.base.parallel and (start.start_of(config.init_lora_weights) or config.ensure_weight_tying):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} and ensure_weight_tying={config.ensure_weight_tying} "
                f"need all of {info.name!r}, which processes split: use init_lora_weights=True without tying."
            )
        if config.init_lora_weights == "orthogonal" and info.kind.startswith("conv"):
            raise ValueError(f"init_lora_weights='orthogonal' is for linear layers, {info.name!r} is a convolution")
        if config.lora_bias and not info.has_bias and info.transient:
            raise ValueError(f"lora_bias=True needs a bias beside {info.name!r}, which its module reads itself")
        if config.lora_bias and not info.has_bias and info.kind != "embedding":
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {type(info.module).__name__} has no bias. "
                f"The adapter cannot be merged there ({info.name!r}).",
                PeftWarning,
                stacklevel=2,
            )

    # State. Modules are made and initialised in PEFT's order, so that a seed gives the same numbers here and there.

    def make_state(self, config: LoraConfig, info: LayerInfo, shared: Any) -> State:
        state: State = {
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "scaling": scaling_of(config.lora_alpha, config.r, config.use_rslora) * info.times,
            "lora_dropout": nn.Dropout(p=config.lora_dropout) if config.lora_dropout > 0.0 else nn.Identity(),
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
            "lora_bias": config.lora_bias and info.kind != "embedding",
        }
        if info.kind == "experts":
            state["experts"] = info.shape[0]
        if info.times != 1:
            state["times"] = info.times
        if info.kind == "embedding":
            into, back = drawn_normal(config.r, info.in_features), drawn_normal(info.out_features, config.r)
            if config.init_lora_weights is not False:
                into.zero_()
                normal_(back)
            return {**state, "lora_embedding_A": nn.Parameter(into), "lora_embedding_B": nn.Parameter(back)}
        a, b = (_linear if info.kind in ("linear", "experts") else _conv)(config, info)
        init, found = config.init_lora_weights, start.start_of(config.init_lora_weights)
        if found is not None and not start.starts_plain(found, info):
            more = found.initialise(config, info, state["scaling"], a.weight, b.weight)
            return {**state, "lora_A": a, "lora_B": b, **more}
        with torch.no_grad():
            if a.weight.is_meta:
                pass  # a file will bring the numbers
            elif init == "orthogonal":
                orthogonal(a.weight, b.weight, info)
            elif init is not False:
                if init == "gaussian":
                    nn.init.normal_(a.weight, std=1 / config.r)
                else:
                    kaiming_(a.weight)
                nn.init.zeros_(b.weight)
                if b.bias is not None:
                    nn.init.zeros_(b.bias)
        return {**state, "lora_A": a, "lora_B": b}

    def parted(self, config: LoraConfig, state: State, info: LayerInfo) -> None:
        part_out(state, info)

    # Math

    def matrices(self, s: Any) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of a layer that is no embedding; a variant's modules can have them in another form,
        which a method `matrix` of theirs expands."""
        return _matrix(s.lora_A), _matrix(s.lora_B)

    def drawn(self, s: Any) -> tuple[Tensor, Tensor]:
        """`matrices` as they act on this forward's input, where a variant draws them anew in training."""
        return self.matrices(s)

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        into = s.get("lora_embedding_A")
        a, b = self.matrices(s) if into is None else (s.own(into), s.own(s.lora_embedding_B))
        dtype = wide(a.dtype)
        if s.get("experts"):
            return delta_of(a.to(dtype), b.to(dtype), s.experts, s.scaling)
        # A of a convolution is [r, in, *kernel] and B [out, r, 1, ...]: the product is that of the matrices.
        delta: Tensor = b.to(dtype).flatten(1) @ a.to(dtype).flatten(1) * s.scaling
        return delta.reshape(b.shape[0], *a.shape[1:])

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        w, b = super().merged(s, shared, w, b)
        if s.lora_bias:
            bias = s.lora_B.bias.to_local() if hasattr(s.lora_B.bias, "to_local") else s.lora_B.bias
            added = bias.to(w.dtype) * s.scaling
            b = added if b is None else b + added
        return w, b

    def mergeable_in(self, s: Any, info: LayerInfo) -> str | None:
        if info.groups > 1:
            return "in a convolution with groups its update connects the groups, which the base weight cannot hold"
        if s.lora_bias and not info.has_bias:
            return "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias"
        return None

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        added: Tensor
        if (into := s.get("lora_embedding_A")) is not None:
            added = F.linear(inner.apply(x, s.own(into)), s.own(s.lora_embedding_B)) * s.scaling
            return y + added
        a, b, dropout = s.lora_A, s.lora_B, s.lora_dropout
        added = b(a(dropout(s.cast(x, a.weight.dtype)))) * s.scaling
        return y + added

    def scale(self, s: Any) -> float | None:
        return scaling_of(s.lora_alpha, s.r, s.use_rslora) * int(s.get("times", 1))

    # Speed

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        name = s._name
        if layer.base.kind != "linear" or s.get("lora_embedding_A") is not None or s.lora_bias:
            return None
        weight = layer.base.fast()
        a, b, dropout = s.lora_A, s.lora_B, s.lora_dropout
        if weight is None or not all(type(m) is nn.Linear or hasattr(m, "matrix") for m in (a, b)):
            return None
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return None
        get_weight = weight
        drops = dropout if type(dropout) is nn.Dropout else None
        compute = layer.base.computes_in
        # Dicts rather than modules: a parameter that is replaced is seen, and a lookup costs a tenth of an attribute's.
        scaling: Any = layer.scaling
        base_parameters = layer.base.parameters
        modules_a, modules_b, modules_drop = (_modules(layer, c) for c in ("lora_A", "lora_B", "lora_dropout"))
        parameters_a, parameters_b = a._parameters, b._parameters
        derived = type(self).drawn is not Lora.drawn or not type(a) is type(b) is nn.Linear
        hooks = (a._forward_hooks, a._forward_pre_hooks, b._forward_hooks, b._forward_pre_hooks)

        def adapter() -> LowRank | None:
            wa, wb = parameters_a.get("weight"), parameters_b.get("weight")
            if (
                wa is None or wb is None
                or modules_a.get(name) is not a or modules_b.get(name) is not b or modules_drop.get(name) is not dropout
                or any(hooks)
            ):  # fmt: skip
                return None
            if derived:
                wa, wb = self.drawn(s)
            scale = scaling[name]
            if isinstance(scale, Tensor):  # so that a compiled graph does not freeze it (`utils.hotswap`)
                wb, scale = wb * scale, 1.0
            elif not scale:
                return None  # the base layer alone, bit for bit
            return LowRank(wa, wb, scale, drops.p if drops is not None and drops.training else 0.0)

        # what is made anew for each call cannot be prepared for the next
        call = lora_linear if derived or isinstance(scaling[name], Tensor) else PreparedCall(lora_linear)

        def run(x: Tensor) -> Tensor | None:
            found, w = adapter(), get_weight()
            if found is None or w is None:
                return None
            own = found.a, found.b, found.scaling, base_parameters.get("bias"), found.dropout_p
            if compute is not None and x.dtype is not compute:
                return call(x.to(compute), w, *own).to(x.dtype)
            y: Tensor = call(x, w, *own)
            return y

        def note(lookups: Lookups) -> None:
            layer.base.note(lookups)
            for held, *keys in ((modules_a, name), (modules_b, name), (modules_drop, name), (scaling, name),
                                (parameters_a, "weight"), (parameters_b, "weight"), (vars(dropout), "p", "training")):
                lookups.entries(held, *keys)
            lookups.no_hooks(*hooks)
            lookups.keeps &= call is not lora_linear

        return FusedProjection(run, get_weight, adapter, base_parameters, compute, note)

    def expert_factors(self, s: Any) -> tuple[Tensor, Tensor, float] | None:
        cls = type(self)
        return factors(s) if cls.merged is Lora.merged and cls.delta_weight is Lora.delta_weight else None


def _matrix(module: Any) -> Tensor:
    expanded: Tensor = module.matrix() if hasattr(module, "matrix") else module.weight
    return expanded


def _modules(layer: AdaptedLayer, container: str) -> dict[str, nn.Module | None]:
    module: nn.Module = layer._modules[container]
    assert module is not None
    return module._modules


def scaling_of(alpha: float, r: int, rslora: bool) -> float:
    """The factor of B A."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def _linear(config: LoraConfig, info: LayerInfo) -> tuple[nn.Linear, nn.Linear]:
    r = config.r * (info.shape[0] if info.kind == "experts" else 1)
    a = nn.Linear(info.in_features, r, bias=False)
    return a, nn.Linear(r, info.out_features, bias=config.lora_bias)


def _conv(config: LoraConfig, info: LayerInfo) -> tuple[Any, Any]:
    base: Any = info.module
    conv = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}[info.kind]
    a = conv(
        info.in_features, config.r, base.kernel_size, base.stride, base.padding, base.dilation, bias=False,
        padding_mode=base.padding_mode,
    )  # fmt: skip
    return a, conv(config.r, info.out_features, 1, groups=info.groups, bias=config.lora_bias)
