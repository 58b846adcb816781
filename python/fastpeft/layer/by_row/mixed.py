"""Rows of a batch through adapters of their own, in one pass over the base layer.

Rows of LoRA adapters and rows without one are one call of `peft_kernels.multi_lora_linear`. Other methods go group by
group: those that act on the layer's input and output (`Method.splits`) share that call too; those that compute with
another weight, or call the layer several times, get a call for their rows alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels import AdapterStack, multi_lora_linear
from peft_kernels.dispatch import forced_backends, forward_mode, watched
from peft_kernels.ops.lora_linear import flat_weight
from peft_kernels.ops.multi_lora_linear import forward_op

from ...config.limits import BASE
from ...methods.method import Fused, Method
from ..compose import Stack
from .packed import Packed, pack
from .train import linears

if TYPE_CHECKING:
    from ..layer import AdapterLayer

Parts = Callable[[], "tuple[Any, ...] | None"]  # `parts` of what `Lora.fused` gives


def grouped(rows: Iterable[str]) -> dict[str, list[int]]:
    """The rows of each adapter."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(rows):
        groups.setdefault(name, []).append(i)
    return groups


def check_length(x: Tensor | Sequence[Any], rows: Sequence[str]) -> None:
    if len(x) != len(rows):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(rows)} and {len(x)} respectively."
        )


class _LowRank(NamedTuple):
    """The adapters that the kernel can take, and what it needs besides."""

    slots: Mapping[str, int]  # places in the stack
    stack: AdapterStack
    weight: Any
    bias: Tensor | None
    compute: torch.dtype | None
    dropout: float


class _Ready(NamedTuple):
    """The kernel for one shape, dtype and device of x, while some backends are forced, one stack is kept, and the base
    layer's tensors are in their places."""

    x: tuple[torch.Size, torch.dtype, torch.device]
    forced: dict[str, str]
    kept: Packed
    places: tuple[Any, ...]
    run: Callable[[Tensor], Any]
    lasts: bool  # beyond a forward: `run` keeps nothing of the base layer


def _after(run: Callable[..., Any], args: tuple[Any, ...], x: Tensor) -> Any:
    return run(x, *args)


@dataclass
class _Layout:
    """Where the rows go. Indices are tensors on the device of x."""

    inside: Tensor | None  # the rows that share the call of the base layer; None: all
    adapters: Tensor | None  # of these, the place in the stack or -1; None where no row uses it
    split: list[tuple[str, list[int], Tensor]]  # adapters on top: their rows, and where these are inside
    on_top: Tensor | None  # all of those places
    apart: list[tuple[str, list[int], Tensor]]  # adapters with calls of their own
    back: Tensor | None  # where each row is when the parts are one after the other


class Routed:
    """What computes a layer for one assignment of its rows, for as long as the layer stays as it is."""

    def __init__(self, layer: AdapterLayer, rows: tuple[str, ...]) -> None:
        self.layer, self.rows = layer, rows
        # An adapter that this layer does not have leaves it as it is, like "__base__".
        here: Mapping[str, Method] = {} if layer._disable_adapters else layer.methods
        self.groups = grouped(name if name in here else BASE for name in rows)
        self._methods = {name: (here[name], layer.view(name)) for name in self.groups if name != BASE}
        self._fused: dict[str, Fused] = {}
        self._parts: dict[str, Parts] = {}
        if layer.cast_input_dtype_enabled and not layer.merged_adapters:
            for name, (method, view) in self._methods.items():
                made = method.fused(layer, view, view)
                if made is not None:
                    self._fused[name] = made
                    if hasattr(made, "parts"):
                        self._parts[name] = made.parts
        self._layouts: dict[Any, _Layout] = {}
        self._last: tuple[Any, torch.device, _Layout] | None = None  # where every method is in these slots
        self.tables: Any = None  # of `trained_rows`
        self._known: Packed | None = None  # serves these rows, as was found when they were assigned
        self._ready: _Ready | None = None
        self._base: list[Tensor] = []  # the base layer's tensors, as they were looked up for this forward

    def again(self) -> None:
        """The same rows come in another forward of the model."""
        self._known, self._base = None, []
        if self._ready is not None and not self._ready.lasts:
            self._ready = None

    def __call__(self, x: Tensor, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Tensor:
        layer = self.layer
        if layer._steady and not args and not kwargs and type(x) is Tensor and self._alone(x):
            y = self._directly(x)
            if y is not None:
                return y
        if not layer.base.transient:  # which need not have a row of x for each of the batch (experts, attention)
            check_length(x, self.rows)
        if layer.merged_adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if layer.base.transient and len(self.groups) > 1:
            raise ValueError(
                f"{layer.layer_name or 'The layer'} ({layer.base.label}) does not support mixed adapter batches: it "
                "runs with one merged weight, so that its rows cannot have adapters of their own (`adapter_names`)."
            )
        if len(self.groups) == 1:
            return self._call(next(iter(self.groups)), x, args, kwargs or {})
        if torch.is_grad_enabled() and not args and not kwargs and self._trains():
            trained = linears(x, [layer])
            if trained is not None:
                return trained[0]
        low = None if args or kwargs or not self._parts else self._low_rank()
        layout = self._layout(x, {} if low is None else low.slots)
        y = None
        if layout.inside is None or layout.inside.numel():
            rows = x if layout.inside is None else x.index_select(0, layout.inside)
            y = self._together(rows, layout, low, args, kwargs or {})
        if not layout.apart:
            assert y is not None
            return y
        parts = [] if y is None else [y]
        try:
            for name, members, index in layout.apart:
                layer._members = members
                parts.append(self._call(name, x.index_select(0, index), args, kwargs or {}))
        finally:
            layer._members = None
        assert layout.back is not None
        return torch.cat(parts).index_select(0, layout.back)

    def _unwritten(self, kept: Packed) -> bool:
        """`Packed.unwritten`, unless it is known already: a look at each tensor of each adapter takes as long as a
        small layer's product."""
        return (self.layer._steady and not torch.is_grad_enabled()) or kept.unwritten()

    def quick(self, x: Tensor) -> Tensor | None:
        """The layer for x [rows, K] without gradients while all that it has is steady, by the kernel alone: without the
        checks of the operator, which the first call made. None where it takes the ordinary way."""
        return self._directly(x) if x.dim() == 2 else None

    @staticmethod
    def _alone(x: Tensor) -> bool:
        """Whether the kernel's output is all that a call of the layer has to give."""
        return not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or watched())

    def _directly(self, x: Tensor) -> Tensor | None:
        """`quick` for x [rows, ..., K]."""
        ready, layer = self._ready, self.layer
        if not layer._steady or layer.training or layer.merged_adapters:
            return None
        if ready is None or not self._in_place(ready, x):
            ready = self._made_ready(x)
        if ready is None:
            return None
        y: Tensor = ready.run(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))[0]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def _in_place(self, ready: _Ready, x: Tensor) -> bool:
        """Whether all is as it was when `ready` was made. Adapters are looked at once in a forward."""
        if ready.forced is not forced_backends() or ready.x != (x.shape, x.dtype, x.device):
            return False
        if ready.kept is not self.layer._packed:
            return False
        if self._known is ready.kept and self._base:
            return bool([*map(Tensor.data_ptr, self._base)] == ready.places[0])
        if not ready.kept.unchanged():
            return False
        found = next(iter(self._parts.values()))()
        if found is None or self._placed(found) != ready.places:
            return False
        self._known = ready.kept
        return True

    def _placed(self, found: tuple[Any, ...]) -> tuple[Any, ...]:
        """Where the base layer's tensors are in memory, and all else that the kernel's arguments come from."""
        flat, n, _ = flat_weight("multi_lora_linear", found[0])
        self._base = base = [t for t in (*flat[:5], found[4]) if t is not None]
        forms = [(t.dtype, t.numel(), t.is_contiguous()) for t in base]
        return [*map(Tensor.data_ptr, base)], forms, flat[5:], n, found[4] is None, found[5:]

    def _made_ready(self, x: Tensor) -> _Ready | None:
        self._ready, layer = None, self.layer
        if layer.base.transient or len(self.groups) == 1 or not self._parts or len(x) != len(self.rows):
            return None
        low = self._low_rank()
        if low is None or self._known is None or low.compute not in (None, x.dtype) or low.dropout:
            return None
        layout = self._layout(x, low.slots)
        if layout.inside is not None or layout.split or layout.adapters is None:
            return None
        flat, n, k = flat_weight("multi_lora_linear", low.weight)
        if x.dim() < 2 or x.shape[-1] != k:
            return None
        rows, t = x if x.dim() == 2 else x.reshape(-1, k), low.stack
        adapters = layout.adapters.repeat_interleave(len(rows) // len(x)) if len(x) else layout.adapters
        args = (*flat, n, t.a, t.b, adapters, t.starts, t.ranks, t.scaling, t.max_rank, low.bias, 0.0, None)
        bound = forward_op.bind(rows, *args)
        run = bound or functools.partial(_after, forward_op.settle(rows, *args), args)
        places = self._placed((low.weight, None, None, None, low.bias, low.compute, low.dropout))
        self._ready = _Ready((x.shape, x.dtype, x.device), forced_backends(), self._known, places, run, bool(bound))
        return self._ready

    def _trains(self) -> bool:
        """Whether a stack would have gradients; in evaluation one without them is kept."""
        layer = self.layer
        if layer.training:
            return True
        if self._known is not None and self._known is layer._packed:
            return not self._known.unwritten()
        found = [parts() for parts in self._parts.values()]
        return any(f is not None and (f[1].requires_grad or f[2].requires_grad) for f in found)

    def _call(self, name: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Rows of one adapter, as if it alone were active."""
        fused = None if args or kwargs else self._fused.get(name)
        y = None if fused is None else fused(x)
        return self.layer._compose(x, [] if name == BASE else [name], args, kwargs) if y is None else y

    # The rows that share a call of the base layer

    def _together(
        self, rows: Tensor, layout: _Layout, low: _LowRank | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        layer = self.layer
        given = self._inputs(rows, layout) if layout.split else rows
        if low is None or layout.adapters is None:
            y: Tensor = layer.base.call(given, *args, **kwargs)
        else:
            inside = given if low.compute is None else given.to(low.compute)
            y = multi_lora_linear(inside, low.weight, low.stack, layout.adapters, low.bias, low.dropout)
            y = y if inside is given else y.to(given.dtype)
        if layout.on_top is None:
            return y
        inner, parts = Stack(layer, (), args, kwargs), []
        try:
            for name, members, index in layout.split:
                method, view = self._methods[name]
                layer._members = members
                own = (rows.index_select(0, index), y.index_select(0, index))
                parts.append(method.output(view, view, *own, inner).to(y.dtype))
        finally:
            layer._members = None
        return y.index_copy(0, layout.on_top, torch.cat(parts))

    def _inputs(self, rows: Tensor, layout: _Layout) -> Tensor:
        changed = []
        try:
            for name, members, index in layout.split:
                method, view = self._methods[name]
                if type(method).input is not Method.input:
                    self.layer._members = members
                    changed.append((index, method.input(view, view, rows.index_select(0, index)).to(rows.dtype)))
        finally:
            self.layer._members = None
        if not changed:
            return rows
        return rows.index_copy(0, torch.cat([i for i, _ in changed]), torch.cat([part for _, part in changed]))

    def _low_rank(self) -> _LowRank | None:
        layer = self.layer
        evaluation = not (layer.training or torch.compiler.is_compiling() or forward_mode())
        kept = layer._packed if evaluation else None
        if kept is not None and (self._unwritten(kept) if kept is self._known else kept.serves(self._parts)):
            self._known = kept
            found = next(iter(self._parts.values()))()
            if found is not None:
                return _LowRank(kept.slots, kept.stack, found[0], *found[4:])
        layer._packed = self._known = None
        there = {name: parts() for name, parts in self._parts.items()}
        # One call has one dropout: adapters with another go on top of the base's output.
        chances = [found[6] for found in there.values() if found is not None]
        if not chances:
            return None
        p = max(chances, key=chances.count)
        chosen = {name: found for name, found in there.items() if found is not None and found[6] == p}
        weight, _, _, _, bias, compute, _ = next(iter(chosen.values()))
        low_rank = [found[1:4] for found in chosen.values()]
        trained = torch.is_grad_enabled() and any(t.requires_grad for a, b, _ in low_rank for t in (a, b))
        if not evaluation or trained or len(chosen) < len(self._parts):
            return _LowRank({name: i for i, name in enumerate(chosen)}, pack(low_rank), weight, bias, compute, p)
        self._known = layer._packed = kept = Packed(layer, list(chosen), low_rank)
        return _LowRank(kept.slots, kept.stack, weight, bias, compute, p)

    # Where rows go

    def _layout(self, x: Tensor, slots: Mapping[str, int]) -> _Layout:
        last = self._last
        if last is not None and last[0] is slots and last[1] == x.device:
            return last[2]
        info: Any = None
        fused = [name for name in self.groups if name in slots]
        split: list[str] = []
        apart: list[str] = []
        for name, (method, view) in self._methods.items():
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


def stacked(layer: AdapterLayer, stack: AdapterStack, adapters: Tensor) -> Fused:
    """What computes a layer with adapters of a stack, which are none of its own (`AdapterLayer.set_row_stack`)."""
    base = layer.base_layer
    get_weight = None if layer.base.kind != "linear" else layer.base.fast()
    where = layer.layer_name or "The layer"
    if get_weight is None:
        raise ValueError(
            f"{where}, a {type(base).__name__}, cannot have a stack of adapters: it needs a linear layer, dense or in "
            "4 bits, that peft_kernels.multi_lora_linear can compute."
        )
    compute = getattr(base, "compute_dtype", None) if layer.base.quantized else None
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
