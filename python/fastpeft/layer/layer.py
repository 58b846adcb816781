"""AdapterLayer: the one layer that holds adapters, composes their methods, merges and unmerges them.

Adapter i wraps the layer that adapters 0..i-1 made, in the order of `active_adapters`; merging does exactly the same.
So a layer with adapters of different methods is no special case.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import AdapterStack

from ..config.types import PeftWarning
from ..methods.base_edit import EDIT
from ..methods.fused import Fused
from ..methods.method import Method, State
from ..weights.base import BaseWeight
from ..weights.lookups import Lookups
from .base import STILL_MERGED, MergingLayer
from .by_row.call import RowValues, now
from .by_row.rows import RowState
from .compose import Composed
from .containers import CHANGES, AdapterDict, AdapterValues
from .seen_layers import layer_classes
from .shared_tensors import SharedDict


class AdapterLayer(MergingLayer):
    """A base layer with any number of adapters of any methods. Its attributes are those of PEFT's tuner layers.

    The tensors of an adapter are spread over one container per tensor name: `layer.lora_A["default"].weight`. Values
    are in plain dicts: `layer.scaling["default"]`.
    """

    cast_input_dtype_enabled = True  # see `helpers.disable_input_dtype_casting`

    def __init__(self, base_layer: nn.Module, name: str = "", base: BaseWeight | None = None) -> None:
        super().__init__(base_layer, name, base)
        self._entries: dict[str, None] = {}  # attributes that are containers by adapter, but for what layers share
        self.shared: dict[str, str] = {}  # attributes that are containers of several layers: their names on a tuner
        self._trained: set[str] = set()  # adapters whose tensors may require gradients
        self._version = self._planned = 0  # now, and when the plan was made
        self.rows = RowState(self)
        self._prefix = ""  # of the first method that the layer had
        info = self.info
        self.in_features, self.out_features = info.in_features, info.out_features
        self.fan_in_fan_out = self.base.fan_in_fan_out

    # What it is

    def peft_classes(self) -> tuple[type, ...]:
        return layer_classes((m.peft_type.value for m in self.methods.values()), self._base.label, self._base.quantized)

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_base" or name not in self._base.attributes:
                raise
        return self.base.attribute(name)

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    @property
    def quantization_backend(self) -> str | None:
        return self.base.quantized

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(n for m in self.methods.values() for n in m.tensors))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        return tuple(n for n in self._entries if n not in self.adapter_layer_names and getattr(self, n))

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def _get_available_adapters(self) -> set[str]:
        return set(self.methods)

    def containers(self) -> Iterator[tuple[str, AdapterDict]]:
        """(name, container) of everything that holds adapters' tensors."""
        for name, module in self._modules.items():
            if isinstance(module, AdapterDict):
                yield name, module

    def adapter_state(
        self, adapter: str, state: Mapping[str, Tensor] | None = None, prefix: str = ""
    ) -> Iterator[tuple[str, str, Tensor]]:
        """(key in memory, key in a file, tensor) of what is saved for an adapter; keys start after the layer's name.

        state: a state dict to take the tensors from, where the keys of this layer start with `prefix`.
        """
        method = self.methods.get(adapter)
        for name, container in self.containers() if method is not None else ():
            assert method is not None
            if name in self.shared and not method.repeats_shared:
                continue
            for suffix, tensor in container.tensors(adapter, state, f"{prefix}{name}."):
                end = f".{suffix}" if suffix else ""
                file = method.file_key(f"{name}{end}")
                if file is not None:
                    yield f"{name}.{adapter}{end}", file, tensor

    # Has it changed?

    @property
    def version(self) -> int:
        """Rises with each change of the adapters, of the containers' entries, of the base weight and of the mode.

        Tensors have versions of their own (`peft_kernels.Fingerprint`): whoever keeps what it made of a layer looks at
        both. What writes to a few elements without a trace calls `changed()`.
        """
        total = self._version + getattr(self._scaling, "version", 0)
        for module in self._modules.values():
            if isinstance(module, AdapterDict):
                total += module.version
        return total

    def changed(self) -> None:
        """Forget whatever was made from the layer's adapters, base and mode: one of them is another now."""
        self._version += 1
        self._plan = None
        self.rows.forget()

    # Adding and removing adapters

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Refuse PEFT's injection, which calls this on layers that it takes for its own."""
        raise TypeError(
            f"{self._shown} is a layer of fastpeft's, into which PEFT itself can put no adapter: add it with "
            "`fastpeft.inject_adapter_in_model(config, model, name)` or `model.add_adapter` of fastpeft's PeftModel."
        )

    def add(self, adapter: str, method: Method, state: State, shared: Mapping[str, SharedDict] | None = None) -> None:
        """Add an adapter whose state was made by `method.make_state`. Replaces one of the same name.

        shared: the containers of what the adapter's layers share, by their names on a tuner.
        """
        if EDIT in state:
            self.edit_base(adapter, state[EDIT])
        self.methods[adapter] = method
        self._prefix = self._prefix or method.peft_type.value.lower()
        held = method.shares(self.info, list(shared)) if shared else {}
        for attribute, name in held.items():
            self._modules[attribute] = several = (shared or {})[name]
            self.shared[attribute] = name
            several.hold(adapter)
        others = [name for name in state if name not in method.tensors and name != EDIT]
        for name in self._entries.keys() - self.shared.keys():
            getattr(self, name).pop(adapter, None)
        for name in (*others, *method.tensors):
            if name in held:
                continue
            self._entries[name] = None
            value = state.get(name)
            holds_tensors = name in method.tensors or isinstance(value, (nn.Module, Tensor))
            if name not in self._modules and name not in self.__dict__:
                setattr(self, name, AdapterDict() if holds_tensors else AdapterValues())
            container = getattr(self, name)
            if isinstance(container, AdapterDict) and value is not None:
                container.set(adapter, value, persistent=method.saves(state, name))
            elif name in state:
                container[adapter] = value
        self.changed()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first of the others, by name, becomes active."""
        if adapter_name in self.merged_adapters:
            raise ValueError(STILL_MERGED.format([adapter_name]))
        self.restore_base(adapter_name)
        method = self.methods.pop(adapter_name, None)
        self._trained.discard(adapter_name)
        if method is not None:
            for name in {*self._entries, *self.shared}:
                container = getattr(self, name)
                (container.release if isinstance(container, SharedDict) else container.pop)(adapter_name, None)
        self.changed()
        if adapter_name not in self._active_adapter:
            return
        left = [name for name in self._active_adapter if name != adapter_name]
        if not left and self.methods:
            left = [min(self.methods)]
            text = f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}."
            warnings.warn(text, PeftWarning, stacklevel=2)
        self.set_adapter(left)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, in this order; only their tensors require gradients, if any do."""
        names = self.check_active([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        # Only what changes is touched, so that the hundredth adapter costs no more than the first.
        for name in self._trained - set(names):
            self._set_requires_grad(name, False)
        for name in names:
            if name in self.methods:
                self._set_requires_grad(name, not inference_mode)
        self._active_adapter = names
        self.changed()

    def _set_requires_grad(self, adapter: str, requires_grad: bool) -> None:
        method, s = self.methods[adapter], self.view(adapter)
        for name in method.tensors:
            trains = requires_grad and method.trains(s, name)
            for parameter in getattr(self, name).parameters_of(adapter):
                if parameter.is_leaf:
                    parameter.requires_grad_(trains)
        (self._trained.add if requires_grad else self._trained.discard)(adapter)
        for other in method.trains_along(s):
            if other in self.methods:
                self._set_requires_grad(other, requires_grad)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Turn gradients of some adapters on or off without changing which are active."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.methods:
                self._set_requires_grad(name, requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Turn all adapters on or off; while off, the layer is its base layer and no adapter requires gradients."""
        self._disable_adapters = not enabled
        self.changed()
        if enabled:
            self.set_adapter(self._active_adapter)
        else:
            for name in list(self._trained):
                self._set_requires_grad(name, False)

    # Scaling, for methods that have one

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to `scale` times what its configuration gives."""
        if (initial := self._initial_scale(adapter)) is not None:
            self._scaling[adapter] = scale * initial

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self._scaled_active() if scale != 1 else ():
            self._scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or reset it to what the configuration gives."""
        for name in self._scaled_active():
            self._scaling[name] = self._initial_scale(name) if scale is None else self._scaling[name] / scale

    @property
    def _scaling(self) -> dict[str, Any]:
        return getattr(self, "scaling", {})  # type: ignore[no-any-return]

    def _initial_scale(self, adapter: str) -> float | None:
        return self.methods[adapter].scale(self.view(adapter)) if adapter in self.methods else None

    def _scaled_active(self) -> list[str]:
        return [n for n in self._active_adapter if n in self._scaling and self._initial_scale(n) is not None]

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mine = now.state.call is None and self.rows.idle and not torch.compiler.is_compiling()
        plan = self._plan if mine else None
        if plan is not None and not args and not kwargs:
            y = plan(x)
            if y is not None:
                return y
        return self._forward(x, args, kwargs)

    def plan(self) -> Fused | None:
        """The function that computes this layer in one call (`Method.fused`), made anew after each change of the layer.

        None while several adapters, none or merged ones are active, and where the method has no such function.
        """
        compiling = torch.compiler.is_compiling()  # a graph makes its own, and does not depend on one that is there
        made: Fused | None = self.rows.plan()
        if made is not None:
            return made
        version = 0 if compiling else self.version
        if not compiling and self._plan is not None and self._planned == version:
            return self._plan
        off = self._disable_adapters or self.merged_adapters
        names = [name for name in self._active_adapter if name in self.methods]
        if off or len(names) != 1 or not self.cast_input_dtype_enabled:
            return None
        view = self.view(names[0])
        made = self.methods[names[0]].fused(self, view, view)
        if not compiling:
            self._plan, self._planned = made, version
        return made

    def note(self, lookups: Lookups) -> None:
        """Note what `plan` looks at, beside the thread's own rows."""
        lookups.entries(vars(self), "_plan", "_version")
        lookups.entries(vars(self.rows), "_names", "stack")
        lookups.entries(CHANGES, "containers")

    def _forward(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        names = kwargs.pop("adapter_names", None)
        by_row: Any = self.rows.plan() if names is None else self.rows.routed(tuple(names))
        if by_row is not None:
            return by_row(x, args, kwargs) if args or kwargs else by_row(x)  # type: ignore[no-any-return]
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self._disable_adapters or self.merged_adapters:
            return self._compose(x, (), args, kwargs)
        names = [name for name in self._active_adapter if name in self.methods]
        if not args and not kwargs:
            plan = self.plan()
            y = None if plan is None else plan(x)
            if y is not None:
                return y
        return self._compose(x, names, args, kwargs)

    def _compose(self, x: Tensor, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.base.transient:
            with self.base.alone(), self._given(names):
                return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        composed = Composed(self, names, args, kwargs)
        y = composed(x)
        return y if composed.dtype is None else y.to(composed.dtype)

    # Rows of a batch that differ

    @property
    def row_names(self) -> tuple[str, ...] | None:
        """The adapters of the rows that are computed now, if they were assigned."""
        return self.rows.names

    def set_rows(self, adapter_names: Sequence[str] | None, steady: bool = False) -> None:
        """Assign an adapter to each row of the next batches ("__base__" for none), in every thread; None ends that. A
        call of the model with rows of its own (`adapter_names`, `rows_assigned`) goes before it.

        steady: nothing is written to before rows are assigned again, so that only the first batch looks whether
        something was.
        """
        self.rows.assign(adapter_names, steady)

    def set_row_stack(self, stack: AdapterStack | None, adapters: Tensor | None) -> None:
        """Compute the next batches with adapters of `stack`, none of which is this layer's own; None ends that.

        adapters: int64, the place in the stack for each of x.shape[0] rows, or for each token of x flattened to
        [tokens, in_features]; -1 is the base alone. Both may be written to between forwards, in place (a CUDA graph
        sees the new values). The layer needs no adapter of its own; it must be linear, dense or in 4 bits, frozen, and
        without merged adapters: else ValueError.
        """
        self.rows.assign_stack(stack, adapters)

    def set_row_values(self, values: RowValues | None) -> None:
        """Give what `Method.row_values` found for each row of the next batches, by adapter; None ends that."""
        self.rows.values = values

    def row_values(self, adapter: str) -> Sequence[Any] | None:
        """An adapter's values for the rows that its method sees now."""
        return self.rows.values_of(adapter)

    # A plan reads tensors through their containers, but it is bound to these containers and to their device.

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterLayer:
        self.changed()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.changed()
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> AdapterLayer:
        if mode != self.training:
            self.changed()
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> AdapterLayer:
        replica: AdapterLayer = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._plan, replica.rows = None, RowState(replica)  # these are bound to a layer
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}

    def extra_repr(self) -> str:
        shown = {"parameter_name": self.base.names[0]} if "parameter_name" in self.base.attributes else {}
        shown |= {} if (backend := self.quantization_backend) is None else {"quantization_backend": backend}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def __repr__(self) -> str:
        # As PEFT's class of the same purpose: `lora.Linear(...)`.
        return super().__repr__().replace(type(self).__name__, f"{self._prefix or 'adapter'}.{self.base.label}", 1)
