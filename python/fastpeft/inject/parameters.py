"""Which sites a configuration's `target_parameters` names, and the chain of layers that several of one module make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..config.types import PeftError
from ..files.checks import list_some
from ..layer.layer import AdapterLayer
from ..weights.base import innermost
from ..weights.read_by_module import ParameterWeight, TransientWeight
from .modules import Site


def parameter_sites(wanted: Sequence[str], sites: Mapping[str, Site], targeted: Sequence[str]) -> list[Site]:
    """A site for each parameter whose name is one of `wanted` or ends with it after a dot, innermost layer first.

    Layers of one module's parameters are nested in the order of the parameters, so that the last has the module's own
    name and each before it `.base_layer` more. targeted: the modules that the same adapter wraps whole.
    """
    result: list[Site] = []
    matched: set[str] = set()
    for name, site in sites.items():
        if name.endswith(".base_layer") and isinstance(site.parent, AdapterLayer):
            continue  # reached from the outermost layer
        base = innermost(site.module)
        own = [n for n, p in base._parameters.items() if p is not None]
        found = {n: w for n in own for w in wanted if f"{name}.{n}" == w or f"{name}.{n}".endswith(f".{w}")}
        if not found:
            continue
        matched.update(w for w in wanted for n in found if f"{name}.{n}" == w or f"{name}.{n}".endswith(f".{w}"))
        if name in targeted:
            raise ValueError(
                f"{name!r} is named by `target_modules` and its parameters {list(found)} by `target_parameters`: "
                "leave one of the two out (`target_modules=[]` for no modules)."
            )
        result += _chain(site, name, list(found), base)
    lost = sorted(set(wanted) - matched)
    if lost:
        raise PeftError(f"target_parameters: the model has no parameter {list_some(lost)}")
    return result


def _chain(site: Site, name: str, parameters: list[str], base: nn.Module) -> list[Site]:
    existing: list[AdapterLayer] = []
    module = site.module
    while isinstance(module, AdapterLayer):
        existing.insert(0, module)
        module = module.base_layer
    names = [f"{name}{'.base_layer' * (len(parameters) - 1 - i)}" for i in range(len(parameters))]
    if not existing:
        # Only the outermost is put into the model; the others hang below it.
        return [
            Site(full, base, site.parent if full == name else None, site.child_name, ParameterWeight(base, p),
                 f"{name}.{p}")
            for full, p in zip(names, parameters, strict=True)
        ]  # fmt: skip
    held = [layer.base.names[0] if isinstance(layer.base, TransientWeight) else None for layer in existing]
    if held != parameters:
        raise ValueError(
            f"all adapters of a model must target the same parameters of a module: {name!r} has {held}, and the new "
            f"adapter asks for {parameters}"
        )
    return [
        Site(full, layer, site.parent, site.child_name, layer.base, f"{name}.{p}")
        for full, p, layer in zip(names, parameters, existing, strict=True)
    ]
