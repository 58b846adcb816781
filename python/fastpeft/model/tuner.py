"""BaseTuner: what PeftModel calls `base_model`. It knows a model's adapters as a whole; layers know their own.

A model may hold adapters of different methods: each layer composes what it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..config.base import PeftConfig
from ..config.limits import BASE
from ..config.seen_as_peft import SeenAsPeft
from ..config.types import warn
from ..inject.modules import AdapterModule, KnownModules, adapter_modules
from ..inject.plan import InjectionPlan
from ..layer.by_row.call import RowCall, RowValues, call_by
from ..layer.by_row.names import check_length
from ..layer.layer import AdapterLayer
from ..layer.shared_tensors import IN_MODEL, held_containers, register_at
from ..methods.method import Method
from ..methods.registry import method_of, registry
from ..prompts.encoder import ENCODER
from ..prompts.encoders import PromptEncoders
from ..saving.load import plan_adapter
from ..saving.state_dict import bias_tensors
from ..weights.read_by_module import ParameterWeight
from . import adapters
from .combine import add_weighted_adapter
from .merging import ModelMerging

AUXILIARY_KWARGS = frozenset({"adapter_names", "alora_offsets"})


class BaseTuner(SeenAsPeft, ModelMerging):
    """A model with adapters in it. Keys in memory start with `model.`, below a PeftModel with `base_model.model.`."""

    holds_shared_adapters = True
    uses_shared_state = False  # PEFT's: what layers share needs no tuner here, so that every method can be injected
    tuner_layer_cls = AdapterLayer

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig | Mapping[str, PeftConfig], adapter_name: str = "default",
        low_cpu_mem_usage: bool = False, state_dict: Mapping[str, Any] | None = None,
        autocast_adapter_dtype: bool = False, plan: InjectionPlan | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        config = peft_config[adapter_name] if isinstance(peft_config, Mapping) else peft_config
        existing = getattr(model, "peft_config", None)
        self.peft_config: dict[str, PeftConfig] = dict(existing) if isinstance(existing, Mapping) else {}
        if self.peft_config.pop(adapter_name, None) is not None:
            warn(
                f"The model has an adapter {adapter_name!r} already, which the new one replaces in the layers that it "
                "targets; `.unload()` before takes it out.", 3,
            )  # fmt: skip
        self.model = model
        # Adapters whose methods act on the model's forward as a whole; their names may outlive them.
        self._hooked = {n: m for n, m in ((n, method_of(c)) for n, c in self.peft_config.items()) if m.hooks_model}
        self._known = KnownModules()
        self._names: tuple[tuple[str, ...], list[str]] = (), []  # the last rows' adapters, and those that there were
        self.active_adapter: str | list[str] = adapter_name
        self.prefix = method_of(config).prefix
        self.targeted_module_names: list[str] = []
        self.merge_errors: dict[str, float] = {}  # of the last merge into quantised layers, by layer
        self.add(
            adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict,
            autocast_adapter_dtype=autocast_adapter_dtype, plan=plan,
        )  # fmt: skip
        self._adopt_shared()  # of adapters that were injected before, too

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        for config in self.peft_config.values():
            found: Any = method_of(config).model_methods.get(name)
            if found is not None:
                return found.__get__(self)  # as if the class had it: a bound method, or a property's value
        return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        for name, method in self._hooks(self.active_adapters):
            output = method.model_output(self, name, output)
        return output

    def _hooks(self, names: Sequence[str]) -> list[tuple[str, Method]]:
        return [(n, self._hooked[n]) for n in names if n in self._hooked and n in self.peft_config]

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter] if isinstance(self.active_adapter, str) else self.active_adapter

    @property
    def _active_adapter(self) -> str | list[str]:
        return self.active_adapter  # PEFT's name of it in some tuners

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The parameters that `target_parameters` chose, by their full names."""
        layers = ((name, layer.base) for name, layer in self.adapter_layers())
        return [f"{n.replace('.base_layer', '')}.{b.names[0]}" for n, b in layers if isinstance(b, ParameterWeight)]

    @property
    def forward_args(self) -> frozenset[str]:
        """Names of arguments of a forward that the base model does not get."""
        return AUXILIARY_KWARGS.union(*(method.forward_args for method in self._hooked.values()))

    @property
    def generate_options(self) -> dict[str, Any]:
        """Arguments that `generate` of the base model gets beside those of the call."""
        return {name: value for method in self._hooked.values() for name, value in method.generate_options.items()}

    @staticmethod
    def get_model_config(model: Any) -> dict[str, Any]:
        """A model's configuration as a dict; that of a model that has none says "custom"."""
        config: Any = getattr(model, "config", {"model_type": "custom"})
        if hasattr(config, "to_dict"):
            return dict(config.to_dict())
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            return dataclasses.asdict(config)
        return dict(config)

    # Adding and removing adapters

    def add(
        self, adapter_name: str, config: PeftConfig, *, low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True, state_dict: Mapping[str, Any] | None = None,
        plan: InjectionPlan | None = None,
    ) -> InjectionPlan:  # fmt: skip
        """Put an adapter into the model; on an error the model is as it was. plan: made before, for a file that was
        checked against it. Returns what can undo it."""
        try:
            if adapter_name in self.peft_config:
                raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
            biased = (getattr(c, "bias", "none") != "none" for c in self.peft_config.values())
            if getattr(config, "bias", "none") != "none" and any(biased):
                raise ValueError(
                    f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, set bias "
                    "to 'none' for all adapters but one: they would train the same biases of the base model."
                )
            (method := method_of(config)).check_beside(config, [*self.peft_config.values()])
            if isinstance(adapter_name, str) and adapter_name in method.prefix:
                warn(
                    f"Adapter name '{adapter_name}' should not be contained in the prefix '{method.prefix}'. PEFT "
                    "takes keys of such an adapter for others when it loads the file."
                )
            if plan is None:
                plan = plan_adapter(
                    self.model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    keys=None if state_dict is None else list(state_dict),
                    shapes={key: tensor.shape for key, tensor in (state_dict or {}).items()},
                )  # fmt: skip
            else:
                plan.finish()
            trained = adapter_name in self.active_adapters and not config.inference_mode
            adapters.check_biases(self.model, getattr(config, "bias", "none") if trained else "none")
        except Exception:
            if plan is not None:
                plan.abandon()
            raise
        if plan.method.mixes(config) is not None:
            self.peft_config |= getattr(self.model, "peft_config", {})  # what is mixed came with the plan
        first = not self.peft_config
        plan.commit()
        if plan.shared:
            self._adopt_shared()
        self._settle(plan.method)
        if first:
            plan.freeze_base()
        self.peft_config[adapter_name] = config
        self._hooked.pop(adapter_name, None)
        if plan.method.hooks_model:
            self._hooked[adapter_name] = plan.method
        # As PEFT does: the model knows its configurations too, so that injected models can be asked for them.
        if not hasattr(type(self.model), "peft_config"):  # a PeftModel inside of another keeps its own
            self.model.peft_config = self.peft_config  # type: ignore[assignment]
        active = self.active_adapters
        train = adapter_name in active and not config.inference_mode
        modules: list[AdapterModule] = [*(p.layer for p in plan.layers), *(p.wrapper for p in plan.saved)]
        if plan.encoder is not None:
            if ENCODER not in self._modules:
                self.prompt_encoder = PromptEncoders()
            self.prompt_encoder[adapter_name] = plan.encoder
            modules.append(self.prompt_encoder)
        for module in modules:
            module._active_adapter = module.check_active(active)
            module.set_requires_grad(adapter_name, train)
        for name, bias in bias_tensors(self.model, config).items() if train else ():
            bias.requires_grad_("original_module" not in name.split("."))  # which a copy computes in the place of
        self.targeted_module_names.extend(n for n in plan.names if n not in self.targeted_module_names)
        return plan

    def remove(self, plan: InjectionPlan) -> None:
        """Undo `add`, biases and frozen parameters included."""
        plan.undo()
        self._settle(plan.method)
        self.peft_config.pop(plan.adapter, None)
        if plan.encoder is not None:
            self.prompt_encoder.delete_adapter(plan.adapter)
        if not self.peft_config and "peft_config" in vars(self.model):
            del self.model.peft_config

    def _settle(self, *methods: Method) -> None:
        layers = [layer for _, layer in self.adapter_layers()]
        for method in methods:
            method.settled(self.model, layers)

    def _adopt_shared(self) -> None:
        """Hold what layers share, so that it has a key of its own."""
        for name, container in held_containers(layer for _, layer in self.adapter_layers()).items():
            register_at(self, name, container)

    def leave_shared_in_model(self) -> None:
        """Let the model, which will be used without this tuner, have what layers share under one key."""
        layers = [layer for _, layer in self.adapter_layers()]
        once = [layer for layer in layers if not any(m.repeats_shared for m in layer.methods.values())]
        for name, container in held_containers(once).items():
            if not container.place:  # FRoD's have one
                register_at(self.model, f"{IN_MODEL}.{name}", container)

    add_weighted_adapter = add_weighted_adapter

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove an adapter, or several: all or, on an error, none. If no active one is left, the first of the others,
        by name, becomes active."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        if missing := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"Adapter {', '.join(missing)} does not exist")
        self.active_adapter = adapters.delete_adapter(self.holder, names) or []
        self._settle(*(method_of(self.peft_config.pop(name)) for name in names))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one or several adapters active, in this order."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        missing = [n for n in names if n not in self.peft_config]
        if missing:
            raise ValueError(f"Adapter(s) {missing} not found, available adapters: {sorted(self.peft_config)}")
        adapters.set_adapter(self.holder, names, inference_mode)
        self.active_adapter = adapter_name if isinstance(adapter_name, str) else names

    set_requires_grad = adapters.set_requires_grad

    def enable_adapter_layers(self) -> None:
        for _, module in self.adapter_modules():
            module.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        for name in self.active_adapters:
            bias = getattr(self.peft_config.get(name), "bias", "none")
            if bias != "none":
                warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                    "output as the base model would without adaption."
                )
        for _, module in self.adapter_modules():
            module.enable_adapters(False)

    # Prompts

    def prompts(self) -> dict[str, tuple[Any, Any, Any]]:
        """The adapters that are prompts: their methods, encoders and configurations."""
        encoders: Any = self._modules.get(ENCODER) or {}
        return {name: (self._hooked[name], encoders[name], self.peft_config[name]) for name in encoders}

    def prompted_rows(self, names: Sequence[str] | None) -> Sequence[str] | None:
        """The adapters of a batch's rows, by default one for all, if one of them is a prompt that is on; else None."""
        encoders: Any = self._modules.get(ENCODER)
        if not encoders or encoders.disable_adapters:
            return None
        if names is None and (around := call_by(self)) is not None and not around.inside:
            names = around.names[1]  # of `rows_assigned`
        found: Sequence[str] = encoders.active_adapters if names is None else names
        return found if any(name in encoders for name in found) else None

    # Mixed batches

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """For the duration of a forward: an adapter for each row, from the argument `adapter_names`, and values."""
        names = kwargs.get("adapter_names")
        if names is not None and self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        around = call_by(self)
        assigned = around if names is None and around is not None and not around.inside else None
        if assigned is not None:
            names = assigned.names[1]  # of `rows_assigned`
        values: dict[str, Any] = {}
        before: list[tuple[str, Method]] = []
        if self._hooked:
            inputs = {"input_ids": args[0], **kwargs} if args else kwargs
            hooked = self._hooks(self.active_adapters if names is None else list(dict.fromkeys(names)))
            found = ((n, m.row_values(self.peft_config[n], inputs)) for n, m in hooked)
            values = {n: v for n, v in found if v is not None}
            before = [(n, m) for n, m in hooked if type(m).before_forward is not Method.before_forward]
        if names is None and not values and around is None and not before:
            return nullcontext()
        graph = torch.is_grad_enabled()
        if assigned is not None and not values and not before:
            return RowCall(self, assigned.layers, assigned.names, assigned.values, assigned.steady, True, graph)
        repeats = adapters.repeats(kwargs, self.model)
        call = self._row_call(names, values, repeats, steady=True, inside=True, graph=graph)
        return self._measured(call, before) if before else call

    @contextmanager
    def _measured(self, call: RowCall, methods: Sequence[tuple[str, Method]]) -> Iterator[None]:
        """A call of the model in which each forward of the base model has values of its own (`before_forward`)."""

        def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for name, method in methods if call_by(self) is call else ():  # else another thread's
                def give(value: Any, name: str = name) -> None:
                    for rows in call.values.values():
                        rows[name] = value  # type: ignore[index]  # dictionaries, made for this call
                method.before_forward(self, name, give, args, kwargs)

        handle = self.model.register_forward_pre_hook(first, with_kwargs=True)
        try:
            with call:
                yield
        finally:
            handle.remove()

    def rows_assigned(
        self, names: Sequence[str] | None, values: RowValues | None = None, repeats: int = 1, steady: bool = False
    ) -> AbstractContextManager[None]:
        """Within this, the rows of a batch have the adapters `names` ("__base__" for none), in training too, and in
        this thread alone.

        `forward(adapter_names=...)` is this for evaluation. values: for the adapters' methods, by adapter, a row each.
        repeats: how often a decoder sees each row (beams); an encoder sees it once. steady: adapters stay as they are
        within this. Raises ValueError for names of no adapter.
        """
        return self._row_call(names, values or {}, repeats, steady)

    def _row_call(
        self, names: Sequence[str] | None, values: RowValues, repeats: int, steady: bool, inside: bool = False,
        graph: bool = True,
    ) -> RowCall:  # fmt: skip
        given = self._checked(names)
        layers: Mapping[AdapterModule, int] = self._known.of(self.model)
        if given is not None:
            for each in values.values():
                check_length(each, given)
        rows, repeated = {1: given}, {1: values}
        if repeats > 1:
            rows[repeats] = None if given is None else tuple(name for name in given for _ in range(repeats))
            repeated[repeats] = {a: [v for v in row for _ in range(repeats)] for a, row in values.items()}
            encoder: Any = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None  # type: ignore[operator]
            separate = isinstance(encoder, nn.Module) and encoder is not self.model
            once = {m for _, m in adapter_modules(encoder)} if separate else ()
            layers = {module: 1 if module in once else repeats for module in layers}
        return RowCall(self, layers, rows, repeated, steady, inside, graph)

    def _checked(self, names: Sequence[str] | None) -> tuple[str, ...] | None:
        """The names of adapters that there are, as a tuple; they are looked up where others came last."""
        there, keeps = [*self.peft_config], not torch.compiler.is_compiling()
        last = self._names  # another thread may put others there
        if keeps and isinstance(names, (list, tuple)) and (tuple(names), there) == last:
            return last[0]
        unknown = set(names or ()).difference(there, (BASE,))
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        if names is None:
            return None
        if not isinstance(names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
        rows = tuple(names)
        if keeps:
            self._names = rows, there
        return rows


def tuner_class(method: Method) -> type[BaseTuner]:
    """The class with PEFT's name for a method's tuner, `LoraModel` for LoRA. They differ in their name only."""
    if method.model_name not in globals():
        own = {"__module__": __name__, "prefix": method.prefix}
        globals()[method.model_name] = type(method.model_name, (BaseTuner,), own)
    return globals()[method.model_name]  # type: ignore[no-any-return]


def __getattr__(name: str) -> Any:
    # So that `from fastpeft.model.tuner import LoraModel` and unpickling find classes that nobody asked for yet.
    for method in registry().values() if name.endswith("Model") else ():
        if method.model_name == name:
            return tuner_class(method)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
