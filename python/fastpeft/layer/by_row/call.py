"""The rows of a call of a model: kept with the call and its graph, never on layers, so that threads share a model.

A call is that of the thread that makes it. What runs again in a backward pass (gradient checkpointing) runs in whatever
thread evaluates a node of the graph: while a call is made, hooks of saved tensors note it down at each node that asks
for what it saved, and every checkpoint asks for its inputs before it runs its function again.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
RowNames = tuple[str, ...]
RowValues = Mapping[str, Sequence[Any]]
_NOTE = "fastpeft: rows"  # in the metadata of a node
_autograd: Any = torch._C._autograd
_top = _autograd._top_saved_tensors_default_hooks
_task, _node, _number = torch._C._current_graph_task_id, torch._C._current_autograd_node, _autograd._get_sequence_nr


class _State:
    """A thread's call, and (a layer, which rows of it are computed) where not all are. Attributes of the instance, as
    those of the class are constants to torch.compile."""

    def __init__(self) -> None:
        self.call: RowCall | None = None
        self.part: tuple[Any, list[int] | None] | None = None
        self.passes: list[_Pass] = []


class _Now(threading.local):
    """This thread's state: an object of its own, as what a graph writes into a thread-local one is lost."""

    def __init__(self) -> None:
        self.state = _State()


class RowCall:
    """A call of a model whose rows have adapters, or values, of their own, and the context in which it is made.

    owner: the model. layers: its adapter modules, with how often each sees a row of the batch (beams). names, values:
    of the rows, by that number; without names the active adapters compute. steady: nothing is written to before it
    ends. inside: made by the model's forward, so that a forward within it is a call of its own. below: the call in
    which this one is made, of another model perhaps.
    """

    def __init__(
        self, owner: Any, layers: Mapping[Any, int], names: Mapping[int, RowNames | None],
        values: Mapping[int, RowValues], steady: bool = False, inside: bool = False, graph: bool = True,
    ) -> None:  # fmt: skip
        self.owner, self.layers, self.names, self.values = owner, layers, names, values
        self.steady, self.inside, self._graph = steady, inside, graph
        self.below: RowCall | None = None
        self.task = -1  # the backward pass in which it is made
        self._hooks: Any = None  # of saved tensors, those that there were
        self._first = self._last = 0  # numbers of the nodes that its thread makes in it
        self._entered: list[Any] = []  # what to go back to

    def __enter__(self) -> None:
        before, hooked, around = (now.state.call, now.state.part), False, current()
        if around is not self:
            self.below = around
        if not torch.compiler.is_compiling():
            self.task = _task()
            if self._graph and _autograd._saved_tensors_hooks_is_enabled():
                above = _top(False)
                other = None if above is None else getattr(above[0], "__self__", None)
                self._hooks = other._hooks if isinstance(other, RowCall) else above
                self._first, self._last = self._first or _number(), sys.maxsize
                _autograd._push_saved_tensors_default_hooks(self._pack, self._unpack)
                hooked = True
        self._entered.append((before, hooked))
        now.state.call, now.state.part = self, None

    def __exit__(self, *error: object) -> None:
        (now.state.call, now.state.part), hooked = self._entered.pop()
        if hooked:
            self._last = _number()
            _autograd._pop_saved_tensors_default_hooks()

    # Its graph

    def _pack(self, tensor: Tensor) -> Any:
        task = _task()
        call = self if task == self.task else _again(task)  # a checkpoint in one that runs again while this is made
        hooks = self._hooks
        return call, hooks, (tensor, tensor._version) if hooks is None else hooks[0](tensor)

    def _unpack(self, packed: Any) -> Tensor:
        call, hooks, kept = packed
        task = _task()
        if task != -1 and call is not None:
            _note(_node(), task, call)
        if hooks is not None:
            other: Tensor = hooks[1](kept)
            return other
        tensor: Tensor = kept[0]
        if tensor._version != kept[1]:  # torch looks at it only where there are no hooks
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {kept[1]} "
                "instead."
            )
        return tensor


class _Pass:
    """A backward pass in this thread, whose nodes from then on have this number or a higher one. calls: whose nodes it
    evaluates. starts: those in which something of a call ran again. last: the call of what did so last; None: of none.
    """

    def __init__(self, task: int) -> None:
        self.task, self.number = task, _number()
        self.calls: dict[RowCall, None] = {}
        self.starts: list[Any] = []
        self.last: RowCall | None = None


_UNKNOWN = RowCall(None, {}, {}, {})  # this thread's call while a backward pass may run layers of others again
now = _Now()


def _note(node: Any, task: int, call: RowCall) -> None:
    """Note down whose node is evaluated."""
    node.metadata[_NOTE] = call
    if now.state.call is None:
        now.state.call = _UNKNOWN
    passes = now.state.passes
    if not passes or passes[-1].task != task:
        new = _Pass(task)
        passes.append(new)  # until the pass ends
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _ended(new, passes))  # type: ignore[attr-defined]
    passes[-1].calls[call] = None


def _ended(one: _Pass, passes: list[_Pass]) -> None:
    if one in passes:
        passes.remove(one)


def current() -> RowCall | None:
    """The call whose layers are computed now."""
    call = now.state.call
    if call is None or torch.compiler.is_compiling():
        return call
    task = _task()
    if task != call.task:
        return _again(task)
    if call is _UNKNOWN:
        now.state.call = call = None  # the backward pass is over, by an error perhaps
        now.state.passes.clear()
    return call


def _again(task: int) -> RowCall | None:
    """The call of which something is computed once more, within a backward pass that began after it."""
    node = _node()
    if node is None:  # what is done after the last one
        return None
    notes: Any = node.metadata
    if _NOTE not in notes:
        notes[_NOTE] = _surrounding(node, task)
    call: RowCall | None = notes[_NOTE]
    passes = now.state.passes
    if passes and passes[-1].task == task:
        passes[-1].last = call
        if call is not None and node not in passes[-1].starts:
            passes[-1].starts.append(node)
    return call


def _surrounding(node: Any, task: int) -> RowCall | None:
    """The call of a checkpoint in another, which has its inputs from that one, not from us. Its node is one of the
    call's, or it was made while the outer function ran again (reentrant ones)."""
    number = node._sequence_nr()
    for one in reversed(now.state.passes):
        if one.task == task:
            found = [call for call in one.calls if call._first <= number < call._last]  # numbers are those of a thread
            reached = (start.metadata[_NOTE] for start in reversed(one.starts) if _leads(start, node, number))
            return next((call for call in reached if call in found), None)
        if one.task < task and number >= one.number:
            return one.last
    return None


def _leads(start: Any, node: Any, number: int) -> bool:
    """True if a graph's node was made of another one, which has this number."""
    seen, waiting = {start}, [start]
    while waiting:
        for following, _ in waiting.pop().next_functions:
            if following is node:
                return True
            if following is not None and following not in seen and following._sequence_nr() > number:
                seen.add(following)
                waiting.append(following)
    return False


def unnoted(make: Callable[..., T], *args: Any) -> T:
    """make(*args), a node of the graph in which no checkpoint begins: it is spared the hooks of what it saves."""
    spared = None if now.state.call is None or torch.compiler.is_compiling() else _top(False)
    call = None if spared is None else getattr(spared[0], "__self__", None)
    if spared is None or type(call) is not RowCall or call._hooks is not None:
        return make(*args)
    _autograd._pop_saved_tensors_default_hooks()
    try:
        return make(*args)
    finally:
        _autograd._push_saved_tensors_default_hooks(*spared)


def call_of(layer: Any) -> RowCall | None:
    """The call that says what the rows of an adapter module are."""
    call = current()
    while call is not None and layer not in call.layers:
        call = call.below
    return call


def names_of(layer: Any) -> RowNames | None:
    """The adapters that a call has for the rows of an adapter module."""
    call = call_of(layer)
    return None if call is None else call.names[call.layers[layer]]


def values_of(layer: Any) -> RowValues | None:
    """The values that a call has for them."""
    call = call_of(layer)
    return None if call is None else call.values[call.layers[layer]]


def call_by(owner: Any) -> RowCall | None:
    """The innermost call of a model that is made now."""
    call = current()
    while call is not None and call.owner is not owner:
        call = call.below
    return call


@contextmanager
def part(layer: Any, rows: list[int] | None) -> Iterator[None]:
    """Within this, methods see these rows of a layer alone; None: an input that is not of the batch."""
    before, now.state.part = now.state.part, (layer, rows)
    try:
        yield
    finally:
        now.state.part = before
