"""Sites that a configuration's `target_parameters` names, and the chain of layers that several of one module make."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from ..config.types import PeftError, PeftRuntimeWarning, warn
from ..files.checks import list_some
from ..layer.layer import AdapterLayer
from ..weights.base import innermost
from ..weights.parameters_4bit import parameters_of
from ..weights.read_by_module import ParameterWeight, TransientWeight
from .modules import Site


def parameter_sites(
    wanted: Sequence[str], sites: Mapping[str, Site], targeted: Sequence[str], of_model: Collection[str]
) -> list[Site]:
    """A site for each parameter whose name is one of `wanted` or ends with it after a dot, innermost layer first.

    Layers of one module's parameters are nested in the order of the parameters, so that the last has the module's own
    name and each before it `.base_layer` more. targeted: the modules that the same adapter wraps whole. of_model: the
    model's own parameters, which no layer can hold.
    """
    result: list[Site] = []
    matched: set[str] = set()
    for name, site in sites.items():
        if name.endswith(".base_layer") and isinstance(site.parent, AdapterLayer):
            continue  # reached from the outermost layer
        base = innermost(site.module)
        own = [n for n, p in parameters_of(base).items() if p is not None]
        hits = {n: [w for w in wanted if f".{name}.{n}".endswith(f".{w}")] for n in own}
        found = [n for n in own if hits[n]]
        matched.update(*hits.values())
        if found and name in targeted:
            raise ValueError(
                f"{name!r} is named by `target_modules` and its parameters {found} by `target_parameters`: "
                f"leave one of the two out (`target_modules=[]` for no modules). Trying to wrap an `nn.Parameter` of "
                f"layer {name!r} of type {type(base).__name__}, which is not a valid target."
            )
        result += _chain(site, found, base) if found else []
    lost = sorted(set(wanted) - matched)
    if own := [name for name in lost if name in of_model]:
        raise ValueError(
            f"Targeting an nn.Parameter on the top-level module is not supported (parameter {own[0]!r}): no module "
            "holds the model, whose place a layer could take."
        )
    text = f"target_parameters: the model has no parameter {list_some(lost)}."
    if lost and targeted:
        none = "" if matched else f" target_parameters={list(wanted)} were set but no parameter was matched."
        warn(f"{text}{none}", 4, PeftRuntimeWarning)
    elif lost:
        raise PeftError(
            f"{text} No `target_modules` passed but also no `target_parameters` found. Please check the values for "
            "these arguments."
        )
    return result


def _chain(site: Site, parameters: list[str], base: nn.Module) -> list[Site]:
    layers: list[AdapterLayer] = []
    module = site.module
    while isinstance(module, AdapterLayer):
        layers.insert(0, module)
        module = module.base_layer
    held = [layer.base.names[0] if isinstance(layer.base, TransientWeight) else None for layer in layers]
    if layers and held != parameters:
        raise ValueError(
            f"all adapters of a model must target the same parameters of a module: {site.name!r} has {held}, and the "
            f"new adapter asks for {parameters}"
        )
    bases = [layer.base for layer in layers] or [ParameterWeight(base, p) for p in parameters]
    modules: list[nn.Module] = [*layers] or [base] * len(parameters)
    names = [site.name + ".base_layer" * i for i in reversed(range(len(parameters)))]
    return [  # only the outermost is put into the model; the others hang below it
        Site(full, m, site.parent if full == site.name else None, site.child_name, weight, f"{site.name}.{p}")
        for full, m, weight, p in zip(names, modules, bases, parameters, strict=True)
    ]
