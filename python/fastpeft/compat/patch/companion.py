"""Companion: an AdapterLayer over a layer of PEFT, whose modules, parameters and values are PEFT's own objects.

It is no part of the model: PEFT's layer stays what is saved, moved, merged and trained, and the companion reads what
lies there. PEFT keeps no version, so `current` looks at each call whether the objects are those that were seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ...layer.by_row.call import RowCall
from ...layer.containers import AdapterDict
from ...layer.layer import AdapterLayer
from ...methods.lora.lora import Lora
from ...methods.method import Method
from ...methods.registry import get_method
from ...weights.base import BaseWeight
from ...weights.find import weight_of
from ...weights.read_by_module import ParameterWeight
from .forms import OF_ALL_LAYERS, limits, own_forms
from .stays import Stays


class Companion(AdapterLayer):
    """theirs: PEFT's layer. name: in the model. configs: PEFT's configurations by adapter.

    limits: why a call is not ours, by "training" or "gradients". plain: every call with nothing but an input is ours.
    Raises Stays where none can be.
    """

    def __init__(self, theirs: Any, name: str, configs: Mapping[str, Any]) -> None:
        super().__init__(theirs.base_layer, name, _base_of(theirs))
        self.__dict__["theirs"] = theirs  # no submodule: this is a view of it
        self.training = theirs.training
        self._seen = list(theirs.active_adapters)
        adapters = adapters_of(theirs)
        if lost := sorted(adapters - set(configs)):
            raise Stays(f"no configuration of {', '.join(lost)} is known")
        for attribute, value in {**vars(theirs), **theirs._modules}.items():
            if attribute in self.__dict__ or attribute in self._modules:
                continue
            if isinstance(value, nn.Module):
                self._modules[attribute] = value
            elif isinstance(value, (dict, int)):
                self.__dict__[attribute] = value
        self._active_adapter = [n for n in self._seen if n in adapters]
        self.limits: dict[str, str] = {}
        self._forms: list[tuple[nn.Module, nn.Module]] = []  # modules of ours, with those of PEFT that they stand for
        for adapter in adapters:
            self._adopt(adapter, configs[adapter], adapter in self._active_adapter)
        self.several = len(self._active_adapter) > 1
        if self.several and all(type(self.methods[n]) is Lora for n in self._active_adapter):
            self.several = False  # PEFT adds up their updates, as we do
        self.plain = not (self.several or self.limits)
        self._unplanned = -1  # the version without a plan
        self._direct: Callable[[Tensor], Tensor] | None = None  # what acts then
        self._watched = self._watch()

    def _adopt(self, adapter: str, config: Any, active: bool) -> None:
        """Take an adapter on. One that is not active and cannot be ours is left out."""
        try:
            method = method_for(self.theirs, config)
            found = dict(limits(method, self.theirs, adapter, self.base))
            forms = list(own_forms(self.theirs, adapter, self.base))
        except Stays:
            if active:
                raise
            return
        if active:
            self.limits.update(found)
        elif found:
            return
        self.methods[adapter] = method
        for attribute, form in forms:
            self._replace(attribute, adapter, form)

    def _replace(self, attribute: str, adapter: str, form: Any) -> None:
        """Have our methods read `form` in the place of PEFT's entry."""
        theirs = getattr(self.theirs, attribute, None)
        if not isinstance(form, nn.Module):
            self.__dict__.setdefault(attribute, {})[adapter] = form
            return
        container = self._modules.get(attribute)
        if not isinstance(container, AdapterDict):
            container = AdapterDict({} if theirs is None else {n: theirs[n] for n in theirs})
            self._modules[attribute] = container
        container[adapter] = form
        if theirs is not None and adapter in theirs:
            self._forms.append((form, theirs[adapter]))

    def _watch(self) -> list[tuple[Any, str, Any]]:
        """(mapping, key, value) of what has to be as it is now: modules of the active adapters, their variants, and
        `forward`, where others put one of their own on a module."""
        theirs = self.theirs
        found: list[tuple[Any, str, Any]] = [(theirs._modules, "base_layer", theirs.base_layer)]
        for name, container in theirs._modules.items():
            if name != "base_layer" and type(container) is nn.ModuleDict:
                entries = container._modules
                found += [(entries, n, entries[n]) for n in self._active_adapter if n in entries]
        for module in [m for _, _, m in found]:
            if "forward" in module.__dict__:
                raise Stays(f"somebody gave the {type(module).__name__} in it another forward")
            if type(module) not in (nn.Identity, nn.Dropout):
                found.append((module.__dict__, "forward", None))
        variants = theirs.__dict__.get("lora_variant", {})
        found += [(variants, n, variants.get(n)) for n in self._active_adapter]
        if "scaling" in theirs.__dict__:  # `peft.helpers.rescale_adapter_scale` puts other dictionaries there
            found.append((theirs.__dict__, "scaling", theirs.scaling))
        if "cast_input_dtype_enabled" in theirs.__dict__:
            self.cast_input_dtype_enabled = theirs.cast_input_dtype_enabled
            found.append((theirs.__dict__, "cast_input_dtype_enabled", self.cast_input_dtype_enabled))
        return found

    def current(self) -> bool:
        """True if this is still a view of what PEFT's layer holds. Takes over its mode."""
        own = self.theirs.__dict__
        if own["training"] is not self.training:
            self.training = own["training"]
            for ours, theirs in self._forms:
                ours.training = theirs.training
            self.changed()
        active = own.get("_active_adapter")
        if active != self._seen and [active] != self._seen:
            return False
        for mapping, key, value in self._watched:  # noqa: SIM110  # a third of the time of `all` over a generator
            if mapping.get(key) is not value:
                return False
        return True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As an AdapterLayer's; a plan that there is none of is not looked for again until the layer changes."""
        if self._unplanned == self._version and not args and not kwargs:
            return self._compose(x, self._active_adapter, (), {}) if self._direct is None else self._direct(x)
        y = super().forward(x, *args, **kwargs)
        if self._plan is None:
            self._unplanned, self._direct = self._version, self._directly()
        return y

    def _directly(self) -> Callable[[Tensor], Tensor] | None:
        """The formula of one plain LoRA beside a layer for which there is no kernel, without the steps between."""
        names = self._active_adapter
        if len(names) != 1 or type(self.methods[names[0]]) is not Lora or names[0] not in self.lora_A:
            return None
        if self.base.transient or not self.cast_input_dtype_enabled:
            return None
        name, call, scaling = names[0], self.base.call, self.scaling
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]

        def run(x: Tensor) -> Tensor:
            y, dtype = call(x), a.weight.dtype
            added = b(a(dropout(x if x.dtype is dtype else x.to(dtype)))) * scaling[name]
            total: Tensor = y + added
            return total if total.dtype is y.dtype else total.to(y.dtype)

        return run

    @property
    def kernel(self) -> str:
        """The function of `peft_kernels` that computes the layer, or "torch" for our formula in torch's terms."""
        method = self.methods[self._active_adapter[0]] if len(self._active_adapter) == 1 else None
        return method.kernel if method is not None and self.plan() is not None else "torch"

    def call(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], offsets: Any = None) -> Tensor:
        """The output for any call. offsets: aLoRA's, by row. Raises Stays for rows of adapters that were left out."""
        if lost := set(kwargs.get("adapter_names", ())) & (adapters_of(self.theirs) - set(self.methods)):
            raise Stays(f"rows of {', '.join(sorted(lost))}, whose forward is PEFT's own")
        if offsets is None:
            return self._forward(x, args, kwargs)
        values = {name: [(offset, None) for offset in offsets] for name in self.methods}
        with RowCall(self, {self: 1}, {1: None}, {1: values}, graph=False):  # PEFT gives each call of a layer its own
            return self._forward(x, args, kwargs)


def adapters_of(theirs: Any) -> set[str]:
    """The adapters that a layer of PEFT has."""
    names = {*theirs.adapter_layer_names, *theirs.other_param_names} - OF_ALL_LAYERS
    found: list[Any] = [getattr(theirs, name, None) for name in names]
    return {adapter for container in found if hasattr(container, "keys") for adapter in container.keys()}  # noqa: SIM118


def method_for(theirs: Any, config: Any) -> Method:
    """The method of an adapter in a layer, by PEFT's configuration. Raises Stays where none is here."""
    if hasattr(theirs, "trainable_tokens_delta"):  # of LoRA's `trainable_token_indices`, too
        return get_method("TRAINABLE_TOKENS")
    for option in ("arrow_config", "megatron_config"):  # adapters that look at each other, layers that are parts of one
        if getattr(config, option, None):
            raise Stays(f"{option} is left to PEFT's own layers")
    try:
        return get_method(getattr(config.peft_type, "value", config.peft_type)).variant(config)
    except (NotImplementedError, ValueError) as error:
        raise Stays(str(error)) from None


class _Parameter(ParameterWeight):
    """The parameter of a `ParamWrapper` of PEFT, whose base layer may be another one."""

    @property
    def holder(self) -> Any:
        return self.module.get_base_layer() if hasattr(self.module, "get_base_layer") else self.module


def _base_of(theirs: Any) -> BaseWeight:
    base = theirs.base_layer
    if hasattr(theirs, "parameter_name"):
        return _Parameter(base, theirs.parameter_name)
    found = None if hasattr(base, "base_layer") else weight_of(base)
    if found is None or found.transient:
        raise Stays(f"its base layer is a {type(base).__name__}")
    try:
        found.check()
    except ValueError as error:
        raise Stays(str(error)) from None
    return found
