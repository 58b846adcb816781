"""EVA: A starts as the principal components of the layer's inputs, and layers get ranks by how much of their inputs'
variance these explain (arXiv 2410.07170)."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config.targets import minimal_suffixes
from ..config.types import warn
from ..files.checks import PREFIX
from ..files.progress import shown
from ..inject.modules import adapter_layers, set_child, walk
from ..inject.place import place
from ..model.tuner import BaseTuner
from .incremental_pca import IncrementalPCA
from .layers_of import target_layers

LayerInputs = Callable[..., Tensor] | dict[str, Callable[..., Tensor]] | None


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """The (row, position) pairs of the tokens to look at: neither padding nor, if so configured, without a label."""
    if not isinstance(model_input, Mapping):
        raise TypeError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if peft_config.eva_config.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != peft_config.eva_config.label_mask_value)
    return mask.nonzero()  # type: ignore[no-any-return]


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """The layer's inputs at the pairs that `prepare_model_inputs_fn_language_modeling` gave."""
    return _tensor(layer_input, layer_name)[model_input.T.unbind()]


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    x = _tensor(layer_input, layer_name)
    return x.flatten(0, -2) if x.ndim > 2 else x


def _tensor(layer_input: Any, layer_name: str) -> Tensor:
    value = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(value, Tensor):
        raise TypeError(f"unsupported input type {type(value)} in layer {layer_name}; pass a prepare_layer_inputs_fn")
    return value


class _Watch:
    """One layer's inputs as its forward hook saw them: a batch, and its principal components so far."""

    def __init__(self, name: str, module: nn.Module, prepare: Any, gather: bool, tau: float) -> None:
        self.name, self.module, self.prepare, self.gather, self.tau = name, module, prepare or _all_rows, gather, tau
        self.model_input: Any = None
        self.seen: Tensor | None = None
        self.pca: Any = None
        self.converged: Tensor
        self._handle: Any = None

    def on(self) -> None:
        if self._handle is None:
            self._handle = self.module.register_forward_hook(self._hook)

    def off(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @torch.no_grad()
    def _hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = self.prepare(args, self.model_input, self.name)
        x = _gathered(x) if self.gather else x
        if self.pca is None:
            self.seen = x.detach()
            return
        rows, n = x.shape[0], self.pca.n_components
        if rows < n:
            warn(f"EVA passes over a batch of {rows} rows for {self.name}, fewer than its {n} components.")
            return
        before = getattr(self.pca, "components_", None)
        self.pca.partial_fit(x.to(torch.float32))
        if before is not None:
            self.converged = torch.nn.functional.cosine_similarity(self.pca.components_, before) >= self.tau


def _gathered(x: Tensor) -> Tensor:
    """The rows of all processes."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return x
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, x.cpu())
    return torch.cat(parts).to(x.device)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module, dataloader: Iterable[Any], peft_config: Any = None,
    forward_fn: Callable[..., Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs = prepare_layer_inputs_fn_language_modeling, adapter_name: str = "default",
    gather_distributed_inputs: bool = True, show_progress_bar: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """The A that EVA starts each layer with, by the layer's name; its number of rows is the layer's rank, maybe 0.

    model: a PeftModel, or any model together with a `peft_config`. dataloader: batches, used as often as it takes.
    forward_fn: runs the model on a batch. prepare_model_inputs_fn: makes of a batch and the configuration what
    prepare_layer_inputs_fn (one, or one by layer name) gets beside a layer's inputs, to make rows of them.
    """
    is_peft = hasattr(model, "peft_config")
    config = peft_config or (model.peft_config[adapter_name] if is_peft else None)  # type: ignore[index]
    if config is None:
        raise ValueError("peft_config is required if model is not a PeftModel")
    if len(dataloader) == 0:  # type: ignore[arg-type]
        raise ValueError("dataloader is empty")
    search = _Search(
        model, adapter_name, config, prepare_model_inputs_fn, prepare_layer_inputs_fn, gather_distributed_inputs
    )
    was_training = model.training
    try:
        model.eval()
        with model.disable_adapter() if is_peft else nullcontext():  # type: ignore[operator]
            return search.run(dataloader, forward_fn or forward_fn_dict, show_progress_bar)
    finally:
        search.off()
        model.train(was_training)


class _Search:
    def __init__(self, model: nn.Module, adapter: str, config: Any, of_batch: Any, of_layer: Any, gather: bool) -> None:
        self.model, self.config, self.of_batch = model, config, of_batch
        own = dict(of_layer) if isinstance(of_layer, Mapping) else None
        if hasattr(model, "peft_config"):
            linear = ((n, m) for n, m in adapter_layers(model, adapter) if m.base.kind == "linear")
            ranks = {name: layer.r[adapter] for name, layer in linear if not layer.base.transient}
        else:
            ranks = {name: layer.r for name, layer in target_layers(model, config).items()}
        prepares = {name: of_layer if own is None else own.pop(name, None) for name in ranks}
        tau, rho = config.eva_config.tau, config.eva_config.rho
        self.watches = {n: _Watch(n, model.get_submodule(n), prepare, gather, tau) for n, prepare in prepares.items()}
        if own:
            raise ValueError(f"prepare_layer_inputs_fn names modules that are not adapted: {', '.join(own)}")
        if rho > 1000:
            rho = min(rho, max(max(p.shape) for p in model.parameters() if p.ndim) // config.r)
        self.budget = sum(ranks.values())
        self.most = {name: round(r * rho) for name, r in ranks.items()}
        devices = {p.device for p in model.parameters() if p.device.type != "meta"}
        self.device = devices.pop() if len(devices) == 1 else None

    def off(self) -> None:
        for watch in self.watches.values():
            watch.off()

    def _feed(self, inputs: Any) -> Any:
        """A batch on the model's device; the hooks get to know it."""
        inputs = _moved(inputs, self.device) if self.device is not None else inputs
        given = self.of_batch(inputs, self.config) if self.of_batch is not None else copy.deepcopy(inputs)
        for watch in self.watches.values():
            watch.model_input = given
        return inputs

    def _share(self, inputs: Any, forward: Callable[..., Any]) -> dict[str, str]:
        """By a layer, the layer whose components it uses: the first of those that get the same inputs."""
        for watch in self.watches.values():
            watch.on()
        forward(self.model, self._feed(inputs))
        self.off()
        of: dict[str, str] = {}
        for name, watch in self.watches.items():
            if watch.seen is None:
                raise ValueError(f"{name} did not run: EVA cannot see its inputs")
            same = (o for o in of.values() if torch.equal(self.watches[o].seen, watch.seen))  # type: ignore[arg-type]
            of[name] = next(same, name)
        for first in set(of.values()):
            group = [name for name in of if of[name] == first]
            self.most.update(dict.fromkeys(group, max(self.most[name] for name in group)))
        for watch in self.watches.values():
            watch.seen = None
        # Those that compute come first, as ties between their components and a sharer's are broken by this order.
        return dict(sorted(of.items(), key=lambda pair: pair[0] != pair[1]))

    def _ranks(self, of: Mapping[str, str]) -> dict[str, int]:
        """The budget's ranks go to the components that explain most, over all layers."""
        owners, shares = [], []
        for name, first in of.items():
            explained = self.watches[first].pca.explained_variance_ratio_[: self.most[first]]
            owners += [name] * len(explained)
            shares.append(explained)
        order = torch.cat(shares).argsort(descending=True)[: self.budget].tolist()
        counts = Counter(owners[i] for i in order)
        ranks = {name: counts.get(name, 0) for name in of}
        for name, first in of.items():  # a layer that computes needs at least as many components as its sharers
            if ranks[first] < ranks[name]:
                ranks[first], ranks[name] = ranks[name], ranks[first]
        return ranks

    def run(self, loader: Iterable[Any], forward: Callable[..., Any], progress: bool) -> dict[str, Tensor]:
        of = self._share(next(iter(loader)), forward)
        first = {name: self.watches[name] for name in of if of[name] == name}
        for name, watch in first.items():
            most = self.most[name]  # the seed is PEFT's: equal inputs give equal components
            watch.pca = IncrementalPCA(most, lowrank=True, lowrank_seed=42)
            watch.converged = torch.zeros(most, dtype=torch.bool)
        ranks = dict(self.most)
        passes = 2 * len(loader)  # type: ignore[arg-type]
        for i, batch in enumerate(shown(itertools.cycle(loader), "EVA", progress, leave=False)):
            converged = {name: bool(watch.converged[: ranks[name]].all()) for name, watch in first.items()}
            if all(converged.values()):
                break
            for name, watch in first.items():
                (watch.off if converged[name] else watch.on)()
            forward(self.model, self._feed(batch))
            short = [name for name, watch in first.items() if not watch.pca.n_samples_seen_]
            if not short:
                ranks = self._ranks(of)
            elif i + 1 == passes:  # PEFT goes on for ever
                raise ValueError(f"no batch has as many rows for {short[0]} as EVA wants components; lower r or rho")
        result = {}
        for name, rank in ranks.items():
            pca = first[of[name]].pca
            a = pca.components_[:rank]
            if self.config.eva_config.whiten:
                a = a / pca.singular_values_[:rank].sqrt()[:, None]
            result[name] = a if self.device is None else a.to(self.device)
        return result


def _moved(inputs: Any, device: torch.device) -> Any:
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return type(inputs)({k: _moved(v, device) for k, v in inputs.items()})  # type: ignore[call-arg]
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_moved(v, device) for v in inputs)
    return inputs


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module, dataloader: Iterable[Any] | None = None, eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[..., Any] | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs = prepare_layer_inputs_fn_language_modeling, adapter_name: str = "default",
    gather_distributed_inputs: bool = True, show_progress_bar: bool = True,
) -> None:  # fmt: skip
    """Start a PeftModel's LoRA, made with init_lora_weights="eva", by EVA: from batches, or from a state dict that
    `get_eva_state_dict` made. Other arguments as there. Layers with rank 0 lose the adapter; ranks and targets of the
    configuration follow."""
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    tuner: Any = getattr(model, "base_model", model)
    config: Any = tuner.peft_config[adapter_name]
    if len(tuner.active_adapters) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    if config.init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    _start(tuner, adapter_name, config, {k.removeprefix(PREFIX): v for k, v in eva_state_dict.items()})


def _start(tuner: BaseTuner, adapter: str, config: Any, found: Mapping[str, Tensor]) -> None:
    """Give each layer its A, and the rank and alpha that go with it."""
    changes = []
    for site in walk(tuner.model):
        layer: Any = site.module
        if adapter not in getattr(layer, "methods", ()):
            continue
        a, r, alpha, state = found.get(site.name), layer.r[adapter], layer.lora_alpha[adapter], None
        if a is not None:
            if a.shape[1:] != (layer.in_features,):
                raise ValueError(
                    f"the components of {site.name} are {list(a.shape)}, expected [r, {layer.in_features}]"
                )
            if config.eva_config.adjust_scaling_factors and len(a):
                alpha = alpha * len(a) / r
            r = len(a)
        tensors = [t for _, _, t in layer.adapter_state(adapter)]
        if r and (r != layer.r[adapter] or any(t.is_meta for t in tensors)):
            own = copy.copy(config)
            own.r, own.lora_alpha, own.init_lora_weights = r, alpha, config.init_lora_weights if a is not None else True
            state = layer.methods[adapter].make_state(own, layer.info, None)
            place(state, layer.info, tensors[0].dtype is torch.float32)
        changes.append((site, a, r, alpha, state))
    for site, a, r, _, state in changes:
        layer = site.module
        if r == 0:
            layer.delete_adapter(adapter)
            if not layer.methods:
                set_child(site, layer.base_layer)
            continue
        if state is not None:
            layer.add(adapter, layer.methods[adapter], state)
            layer.train(layer.training)
            layer.set_adapter(tuner.active_adapters)
        if a is not None:
            layer.lora_A[adapter].weight.copy_(a)
    kept = [change for change in changes if change[2]]
    gone = {site.name for site, *_ in changes if not site.module.methods}
    tuner.targeted_module_names = [name for name in tuner.targeted_module_names if name not in gone]
    config.target_modules = minimal_suffixes({c[0].name for c in kept}, [s.name for s in walk(tuner.model) if s.name])
    config.rank_pattern = {c[0].name: c[2] for c in kept if c[2] != config.r}
    config.alpha_pattern = {c[0].name: c[3] for c in kept if c[3] != config.lora_alpha}
    missing = [site.name for site, a, *_ in changes if a is None]
    if missing:
        warn(f"EVA has no components for {', '.join(missing)}: they start as plain LoRAs.", 2)
