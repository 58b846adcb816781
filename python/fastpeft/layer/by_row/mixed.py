"""Rows of a batch through adapters of their own, in one pass over the base layer.

Rows of LoRA adapters and rows without one are one call of `peft_kernels.multi_lora_linear`. Other methods go group by
group: those that act on the layer's input and output (`Method.splits`) share that call too; those that compute with
another weight, or call the layer several times, get a call for their rows alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels import AdapterStack, PreparedCall, QuantWeight, RowPlan, multi_lora_linear
from peft_kernels.dispatch import forward_mode

from ...config.limits import BASE
from ...config.types import UnmixableError
from ...methods.fused import Fused, FusedProjection, LowRank
from ...methods.method import Method
from ..compose import Composed
from .call import part, unnoted
from .names import RowHost, check_length, grouped
from .packed import Packed, pack
from .train import linears


class _Stacked(NamedTuple):
    """The adapters that the kernel can take, and what it needs besides."""

    slots: Mapping[str, int]  # places in the stack
    stack: AdapterStack
    weight: Tensor | QuantWeight
    bias: Tensor | None
    compute: torch.dtype | None
    dropout_p: float


@dataclass
class _Layout:
    """Where the rows go. Indices are tensors on the device of x."""

    inside: Tensor | None  # the rows that share the call of the base layer; None: all
    adapters: Tensor | None  # of these, the place in the stack or -1; None where no row uses it
    split: list[tuple[str, list[int], Tensor]]  # adapters on top: their rows, and where these are inside
    on_top: Tensor | None  # all of those places
    apart: list[tuple[str, list[int], Tensor]]  # adapters with calls of their own
    back: Tensor | None  # where each row is when the parts are one after the other
    of_tokens: dict[int, Tensor] = field(default_factory=dict)  # `adapters` for each token, by their number

    def adapters_of(self, tokens: int) -> Tensor:
        assert self.adapters is not None
        if tokens == len(self.adapters) or torch.compiler.is_compiling():
            return self.adapters
        found = self.of_tokens.get(tokens)
        if found is None:
            with torch.inference_mode(False):
                found = self.adapters.repeat_interleave(tokens // len(self.adapters))
            self.of_tokens = {tokens: found}  # decoding has one number, its first step another
        return found


class Routed:
    """The computation of a layer for one assignment of its rows, for as long as the layer stays as it is.

    methods: of the adapters that are there, with their views. low: those that the kernel can take; first: any of them.
    row_plan: for training.
    """

    def __init__(self, layer: RowHost, rows: tuple[str, ...]) -> None:
        self.layer, self.rows = layer, rows
        self._look()

    def _look(self) -> None:
        """Find what serves the adapters as the layer's containers have them now."""
        layer, rows = self.layer, self.rows
        self._version = 0 if torch.compiler.is_compiling() else layer.version
        # An adapter that this layer does not have leaves it as it is, like "__base__".
        here: Mapping[str, Method] = {} if layer._disable_adapters else layer.methods
        self.groups = grouped(name if name in here else BASE for name in rows)
        self.methods = {name: (here[name], layer.view(name)) for name in self.groups if name != BASE}
        self._fused: dict[str, Fused] = {}
        self.low: dict[str, FusedProjection] = {}
        if layer.cast_input_dtype_enabled and not layer.merged_adapters:
            for name, (method, view) in self.methods.items():
                made = method.fused(layer, view, view)
                if made is not None:
                    self._fused[name] = made
                if isinstance(made, FusedProjection):
                    self.low[name] = made
        self.first = next(iter(self.low.values()), None)
        places = {name: i for i, name in enumerate(self.low)}
        self.row_plan = RowPlan([places.get(name, -1) for name in rows])
        self._layouts: dict[Any, _Layout] = {}
        self._last: tuple[Any, torch.device, _Layout] | None = None  # where every method is in these slots
        self._kernel = PreparedCall(multi_lora_linear)
        self.again(getattr(self, "turn", None), getattr(self, "steady", False))

    def again(self, turn: Any, steady: bool) -> None:
        """The same rows come once more, in another call of the model, say (turn): the adapters are looked at anew.
        steady: nothing is written to in this turn."""
        self.turn, self.steady = turn, steady
        self._looked: Packed | None = None  # found unchanged since then
        self._found: _Stacked | None = None  # of these

    def __call__(self, x: Tensor, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Tensor:
        layer = self.layer
        if not args and not kwargs:
            y = self._directly(x)
            if y is not None:
                return y
        self._follow()
        if not layer.base.transient:  # which need not have a row of x for each of the batch (experts, attention)
            check_length(x, self.rows)
        if layer.merged_adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if layer.base.transient and len(self.groups) > 1:
            raise UnmixableError(
                f"lora.{layer.base.label} does not support mixed adapter batches yet. {layer.layer_name or 'It'} runs "
                "with one merged weight, so that its rows cannot have adapters of their own (`adapter_names`)."
            )
        if len(self.groups) == 1:
            return self._alone(next(iter(self.groups)), x, args, kwargs or {})
        if torch.is_grad_enabled() and not args and not kwargs and self._trains():
            trained = linears(x, [layer])
            if trained is not None:
                return trained[0]
        low = None if args or kwargs or not self.low else self._stacked()
        layout = self._layout(x, {} if low is None else low.slots)
        y = None
        if layout.inside is None or layout.inside.numel():
            rows = x if layout.inside is None else x.index_select(0, layout.inside)
            y = self._together(rows, layout, low, args, kwargs or {})
        if not layout.apart:
            assert y is not None
            return y
        parts = [] if y is None else [y]
        for name, members, index in layout.apart:
            with part(layer, members):
                parts.append(self._alone(name, x.index_select(0, index), args, kwargs or {}))
        assert layout.back is not None
        return torch.cat(parts).index_select(0, layout.back)

    def _follow(self) -> None:
        """Look anew where an entry of a container is another."""
        if not torch.compiler.is_compiling() and self._version != self.layer.version:
            self._look()

    def quick(self, x: Tensor) -> Tensor | None:
        """The layer for x [tokens, K] by the kernel alone; None where it takes the ordinary way."""
        return self._directly(x) if x.dim() == 2 else None

    def _directly(self, x: Tensor) -> Tensor | None:
        """The layer without gradients, while nothing of it changes: the adapters are looked at once for an assignment
        of rows. None where the kernel's output is not all that a call of the layer gives."""
        layer = self.layer
        if not self.steady or layer.training or torch.is_grad_enabled() or layer.merged_adapters:
            return None
        found = self._found if self._found is not None else self._begin(x)
        if found is None or len(x) != len(self.rows) or found.compute not in (None, x.dtype):
            return None
        layout = self._layout(x, found.slots)
        if layout.inside is not None or layout.split or layout.adapters is None or x.dim() < 2:
            return None
        adapters = layout.adapters_of(x.numel() // x.shape[-1]) if x.numel() else layout.adapters
        y: Tensor = self._kernel(x, found.weight, found.stack, adapters, found.bias)
        return y

    def _begin(self, x: Tensor) -> _Stacked | None:
        """The stack of all rows, to be used until they are assigned again."""
        if self.layer.base.transient or len(self.groups) == 1 or not self.low or torch.compiler.is_compiling():
            return None
        packed = self.layer.rows.packed
        if packed is None or not self._holds(packed):
            self._follow()
        low = self._stacked()
        self._found = low if low is not None and self._looked is not None and not low.dropout_p else None
        return self._found

    def _trains(self) -> bool:
        """True if a stack would have gradients; in evaluation one without them is kept."""
        if self.layer.training:
            return True
        packed = self.layer.rows.packed
        if self._looked is not None and self._looked is packed:
            return not self._looked.same_versions()
        found = [each.adapter() for each in self.low.values()]
        return any(each is not None and (each.a.requires_grad or each.b.requires_grad) for each in found)

    def _alone(self, name: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Rows of one adapter, as if it alone were active."""
        fused = None if args or kwargs else self._fused.get(name)
        y = None if fused is None else unnoted(fused, x)
        return self.layer._compose(x, [] if name == BASE else [name], args, kwargs) if y is None else y

    # The rows that share a call of the base layer

    def _together(
        self, rows: Tensor, layout: _Layout, low: _Stacked | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        layer = self.layer
        given = self._inputs(rows, layout) if layout.split else rows
        if low is None or layout.adapters is None:
            y: Tensor = layer.base.call(given, *args, **kwargs)
        else:
            inside = given if low.compute is None else given.to(low.compute)
            y = multi_lora_linear(inside, low.weight, low.stack, layout.adapters, low.bias, low.dropout_p)
            y = y if inside is given else y.to(given.dtype)
        if layout.on_top is None:
            return y
        inner, parts = Composed(layer, (), args, kwargs), []
        for name, members, index in layout.split:
            method, view = self.methods[name]
            own = (rows.index_select(0, index), y.index_select(0, index))
            with part(layer, members):
                parts.append(method.output(view, view, *own, inner).to(y.dtype))
        return y.index_copy(0, layout.on_top, torch.cat(parts))

    def _inputs(self, rows: Tensor, layout: _Layout) -> Tensor:
        changed = []
        for name, members, index in layout.split:
            method, view = self.methods[name]
            if type(method).input is not Method.input:
                with part(self.layer, members):
                    changed.append((index, method.input(view, view, rows.index_select(0, index)).to(rows.dtype)))
        if not changed:
            return rows
        return rows.index_copy(0, torch.cat([i for i, _ in changed]), torch.cat([part for _, part in changed]))

    def _stacked(self) -> _Stacked | None:
        """The adapters that the kernel can take, in a stack; None where it can take none."""
        rows, first = self.layer.rows, self.first
        evaluation = not (self.layer.training or torch.compiler.is_compiling() or forward_mode())
        weight = None if first is None else first.weight()
        if first is None or weight is None:
            return None
        bias = first.parameters.get("bias")
        packed = rows.packed if evaluation else None
        if packed is not None and self._holds(packed):
            return _Stacked(packed.slots, packed.stack, weight, bias, first.compute, 0.0)
        rows.packed = self._looked = None
        every = {name: each.adapter() for name, each in self.low.items()}
        there = {name: found for name, found in every.items() if found is not None}
        # One call has one dropout: adapters with another go on top of the base's output.
        chances = [found.dropout_p for found in there.values()]
        if not chances:
            return None
        p = max(chances, key=chances.count)
        chosen = {name: found for name, found in there.items() if found.dropout_p == p}
        if not evaluation or len(chosen) < len(self.low) or _trained(chosen.values()):
            slots = {name: i for i, name in enumerate(chosen)}
            return _Stacked(slots, pack([*chosen.values()]), weight, bias, first.compute, p)
        self._looked = rows.packed = packed = Packed(self.layer, chosen)
        return _Stacked(packed.slots, packed.stack, weight, bias, first.compute, 0.0)

    def _holds(self, packed: Packed) -> bool:
        """True if the adapters are as they were packed: looked at in full once for an assignment of rows."""
        steady = self.steady and not torch.is_grad_enabled()
        if packed is self._looked and (steady or packed.same_versions()):
            return True
        self._looked = packed if packed.serves(self.low) else None
        return self._looked is not None

    # Where rows go

    def _layout(self, x: Tensor, slots: Mapping[str, int]) -> _Layout:
        last = self._last
        if last is not None and last[0] is slots and last[1] == x.device:
            return last[2]
        info: Any = None
        fused = [name for name in self.groups if name in slots]
        split: list[str] = []
        apart: list[str] = []
        for name, (method, view) in self.methods.items():
            if name not in slots:
                info = info or self.layer.info
                (split if method.splits(view, info) else apart).append(name)
        key = (x.device, tuple(slots[name] for name in fused), tuple(split), tuple(apart))
        if key not in self._layouts:
            self._layouts[key] = self._new_layout(x.device, slots, split, apart)
        layout = self._layouts[key]
        self._last = None if split or apart else (slots, x.device, layout)
        return layout

    def _new_layout(
        self, device: torch.device, slots: Mapping[str, int], split: Sequence[str], apart: Sequence[str]
    ) -> _Layout:
        def tensor(values: Sequence[int]) -> Tensor:
            # kept for forwards with gradients, too, which tensors of inference mode cannot be in
            with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
                return torch.tensor(values, dtype=torch.int64, device=device)

        alone = {i for name in apart for i in self.groups[name]}
        inside = [i for i in range(len(self.rows)) if i not in alone]
        place = {i: at for at, i in enumerate(inside)}
        adapters = [-1] * len(inside)
        for name, members in self.groups.items():
            for i in members if name in slots else ():
                adapters[place[i]] = slots[name]
        on_top = [(n, self.groups[n], tensor([place[i] for i in self.groups[n]])) for n in split]
        order = inside + [i for name in apart for i in self.groups[name]]
        return _Layout(
            inside=tensor(inside) if apart else None,
            adapters=tensor(adapters) if any(i >= 0 for i in adapters) else None,
            split=on_top,
            on_top=tensor([place[i] for name in split for i in self.groups[name]]) if on_top else None,
            apart=[(n, self.groups[n], tensor(self.groups[n])) for n in apart],
            back=tensor(sorted(range(len(order)), key=order.__getitem__)) if apart else None,
        )


def _trained(adapters: Iterable[LowRank]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for each in adapters for t in (each.a, each.b))


def stacked(layer: RowHost, stack: AdapterStack, adapters: Tensor) -> Fused:
    """The computation of a layer with adapters of a stack, which are none of its own (`AdapterLayer.set_row_stack`)."""
    base = layer.base_layer
    get_weight = None if layer.base.kind != "linear" else layer.base.fast()
    where = layer.layer_name or "The layer"
    if get_weight is None:
        raise ValueError(
            f"{where}, a {type(base).__name__}, cannot have a stack of adapters: it needs a linear layer, dense or in "
            "4 bits, that peft_kernels.multi_lora_linear can compute."
        )
    compute = layer.base.computes_in
    parameters = base._parameters

    def run(x: Tensor) -> Tensor:
        weight = get_weight()
        if weight is None or layer.merged_adapters:
            why = "has merged adapters" if layer.merged_adapters else "trains its weight or has hooks"
            raise ValueError(f"{where} {why} while it has adapters of a stack: undo it, or set_row_stack(None, None).")
        inside = x if compute is None else x.to(compute)
        y = multi_lora_linear(inside, weight, stack, adapters, parameters.get("bias"))
        return y if inside is x else y.to(x.dtype)

    return run
