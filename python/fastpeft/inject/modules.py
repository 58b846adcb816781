"""Where modules hang in a model, which of them hold adapters, and what an adapter is told about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config.types import warn
from ..files.checks import list_some
from ..layer.containers import AdapterDict
from ..layer.layer import AdapterLayer
from ..layer.module_layer import ModuleLayer
from ..layer.saved_modules import ModulesToSaveWrapper
from ..layer.shared_tensors import SharedDict
from ..methods.method import Method, State
from ..methods.tied import embeddings_of
from ..prompts.encoders import PromptEncoders
from ..weights.base import BaseWeight, LayerInfo, innermost
from ..weights.find import weight_of
from ..weights.split import is_split

AdapterModule = AdapterLayer | ModulesToSaveWrapper | PromptEncoders
WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch's names of a module in a wrapper


@dataclass(frozen=True)
class Site:
    """A module and where it hangs. base: its weight, where not its type says it but `target_parameters`. key: by what
    name patterns know it, where that is not `name`, which keys of tensors start with."""

    name: str
    module: nn.Module
    parent: nn.Module | None
    child_name: str
    base: BaseWeight | None = None
    key: str = ""


@dataclass
class LayerPlan:
    """An adapter's part in one layer, which is `site.module` itself where other adapters are in it already."""

    site: Site
    layer: AdapterLayer
    state: State
    method: Method


def unwrapped_name(name: str) -> str:
    """A module's or a tensor's name without those of torch's wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def walk(model: nn.Module) -> Iterator[Site]:
    """Every module once, like `named_modules`, but not what is inside an adapter layer; on with what is inside a whole
    module that has adapters. Names are those of keys in files: what torch wraps around a module, to shard it or to
    compute it twice, has no part in them, nor have adapters around a whole module."""
    seen: set[int] = set()
    waiting = [Site("", model, None, "")]
    while waiting:
        site = waiting.pop()
        if id(site.module) in seen:
            continue
        seen.add(id(site.module))
        yield site
        if isinstance(site.module, AdapterLayer):
            waiting.extend(parts(site))
            if not isinstance(site.module, ModuleLayer):
                continue
        prefix = f"{site.name}." if site.name else ""
        around = site.module.base_layer if isinstance(site.module, ModuleLayer) else site.module
        if isinstance(site.module, SharedDict):
            continue  # no part of the model, whose names its modules may have
        children = [
            Site(site.name if n in WRAPPED else prefix + n, m, around, n)
            for n, m in around._modules.items() if m is not None
        ]  # fmt: skip
        waiting.extend(reversed(children))


def parts(site: Site) -> list[Site]:
    """The modules in or below a layer that its adapters go into as well (the out_proj of an attention), or are in."""
    module, below = site.module, f"{site.name}.base_layer"
    base = module.base if isinstance(module, AdapterLayer) else weight_of(module)
    found = {} if base is None else base.parts()
    own = [Site(f"{below}.{n}", w.module, innermost(module), n, w, f"{site.name}.{n}") for n, w in found.items()]
    inner = module.base_layer if isinstance(module, AdapterLayer) else None
    return [Site(below, inner, module, "base_layer", None, below), *own] if isinstance(inner, AdapterLayer) else own


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """(name, module) of every adapter layer, every module that adapters train in full, and the prompts."""
    return ((s.name, s.module) for s in walk(model) if isinstance(s.module, AdapterModule))


def adapter_layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, AdapterLayer]]:
    """(name, layer) of every adapter layer, or of those that have an adapter."""
    layers = ((site.name, site.module) for site in walk(model) if isinstance(site.module, AdapterLayer))
    return ((name, layer) for name, layer in layers if adapter is None or adapter in layer.methods)


def check_whole(layers: Iterable[AdapterLayer], what: str, instead: str) -> None:
    """Raise ValueError if processes split one of the layers, for what needs all of an adapter in each."""
    if parted := [layer.layer_name for layer in layers if layer.base.parallel]:
        raise ValueError(f"{what}: processes split {list_some(parted)}. {instead}")


class KnownModules:
    """The modules of `adapter_modules`, looked for anew only where a module of the model is another than before."""

    def __init__(self) -> None:
        # model, the `_modules` of every module that was walked through, what was in them, what was found
        self._last: tuple[nn.Module | None, list[Any], list[list[Any]], dict[AdapterModule, int]] = (None, [], [], {})

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of a model has modules of its own
        return KnownModules, ()

    def of(self, model: nn.Module) -> dict[AdapterModule, int]:
        """Those of `model`, each with a 1; not to be changed."""
        if torch.compiler.is_compiling():  # a graph has guards of its own
            return {module: 1 for _, module in adapter_modules(model)}
        known, stores, children, found = self._last
        if known is not model or [*map(list, map(dict.values, stores))] != children:
            modules = [site.module for site in walk(model)]
            inner = [module.base_layer for module in modules if isinstance(module, AdapterLayer)]
            stores = [module._modules for module in (*modules, *inner)]
            found = dict.fromkeys((m for m in modules if isinstance(m, (AdapterLayer, ModulesToSaveWrapper))), 1)
            self._last = model, stores, [[*store.values()] for store in stores], found
        return found


def iter_adapter_tensors(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, str, Tensor]]:
    """(key in memory, key in a file, tensor) of everything that is saved for an adapter.

    The keys start at `model`: pass a PeftModel for PEFT's `base_model.model.` keys. Tensors that all layers of the
    adapter share come once, from the tuner that holds them or, where there is none, from the first layer.
    state: the model's state dict, to take all of it from (`files/whole.py`).
    """
    if state is not None:
        state = {k: t for k, t in state.items() if f".{adapter_name}." in f".{k}."}
    tuner: str | None = None
    shared: dict[str, tuple[str, AdapterDict]] = {}
    for site in walk(model):
        prefix = f"{site.name}." if site.name else ""
        if isinstance(site.module, AdapterModule):
            for memory, file, tensor in site.module.adapter_state(adapter_name, state, prefix):
                yield prefix + memory, prefix + file, tensor
        if isinstance(site.module, AdapterLayer):
            for name, path in site.module.shared.items():
                shared.setdefault(path, (prefix + name, getattr(site.module, name)))
        elif getattr(site.module, "holds_shared_adapters", False):
            tuner = prefix
    for path, (where, container) in shared.items():
        file = f"{tuner or ''}{path}"
        memory = where if tuner is None else file
        for suffix, tensor in container.tensors(adapter_name, state, f"{memory}."):
            end = f".{suffix}" if suffix else ""
            yield f"{memory}.{adapter_name}{end}", f"{file}{end}", tensor


def inside_saved(site: Site) -> bool:
    return "modules_to_save" in site.name.split(".")


def set_child(site: Site, module: nn.Module) -> None:
    assert site.parent is not None
    site.parent._modules[site.child_name] = module


def base_of(site: Site) -> BaseWeight | None:
    """The weight that adapters of a module act on; None where there is none."""
    return site.module.base if isinstance(site.module, AdapterLayer) else site.base or weight_of(site.module)


def checked_info(site: Site) -> LayerInfo:
    """The layer that an adapter goes into. ValueError for modules that adapters cannot serve."""
    if (base := base_of(site)) is None:
        raise ValueError(
            f"Target module {site.name!r}, a {type(site.module).__name__}, is not supported. Supported are linear "
            "layers (torch, transformers' Conv1D, 4-bit and 8-bit), Embedding, Conv1d, Conv2d, Conv3d, "
            "MultiheadAttention and, by `target_parameters`, parameters."
        )
    if isinstance(site.parent, nn.MultiheadAttention) and not site.key:
        raise ValueError(
            f"{site.name!r} is read by its MultiheadAttention, which never calls it: target the attention itself "
            f"({site.name.rpartition('.')[0]!r}); its adapters act on {site.child_name} too."
        )
    if not base.parallel and is_split(base.holder):
        what = f"{site.key or site.name!r}, a {type(site.module).__name__}"
        raise ValueError(f"Tensor parallelism splits {what}: only a LoRA that has it in `target_modules` can follow.")
    try:
        base.check()
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None
    return base.info(site.key or site.name)


def corrected_fan_in_fan_out(config: Any, sites: Mapping[str, Site], names: Sequence[str]) -> dict[str, bool]:
    """The layer's type decides how its weight is stored; a configuration that says otherwise is corrected."""
    asked = getattr(config, "fan_in_fan_out", None)
    transposed = {b.fan_in_fan_out for n in names if (b := base_of(sites[n])) is not None and b.kind == "linear"}
    if asked is None or transposed != {not asked}:
        return {}
    what = "does not store its weight transposed" if asked else "stores its weight transposed"
    warn(f"fan_in_fan_out is set to {asked} but the target {what}. Setting it to {not asked}.", level=3)
    return {"fan_in_fan_out": not asked}


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The layer that makes vectors of tokens, if the model has one."""
    if (found := embeddings_of(model)) is not None:
        return found
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == size)
    return next(tables, None)
