"""Quicker layers for models of transformers, on a CPU and on a GPU: the same mathematics in fewer and quicker calls.

A module whose class is described (`known/`) gets a subclass of it with the forward of its part; `ways.py` says which
parts are taken where a layer is. Training: q, k and v are one call that reads its input once, the MLP is one function
that keeps its input and the first products' outputs alone, norms are one kernel each way, attention with its rotary
embeddings is one on a CPU; on a GPU the model's own attention gets q, k and v from that call. Decoding waits for Python
and for torch's calls between kernels more than for kernels: there are half as many, and the output head reads its
matrix at the memory's speed. All else (families that are not described, modules with hooks on their parts, options
beyond a description) runs transformers' own forward. Norms and attention are computed in float32 and rounded once,
which is never less exact.

Reversible: `switch_back` puts the class back. Parameters, buffers, state dicts and adapters are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from peft_kernels import use_huge_pages

from ..weights.read_by_module import TAKES_FACTORS
from .attention import attention_forward
from .description import Attention, Experts, Part, Spread, Together
from .experts import experts_forward, why_not
from .head import CALL, head_forward
from .masking import leave, serve
from .mlp import mlp_forward, spread_method
from .norms import norm_forward
from .registry import part_of
from .state import Shared, State
from .together import together_forward
from .ways import known_ways, ways_of

_SWITCHED = "_fastpeft_accelerated"  # a class with a quicker forward has it: the name of its part
_FORWARDS: dict[str, Any] = {
    "attention": attention_forward, "mlp": mlp_forward, "norm": norm_forward, "stack": together_forward,
    "experts": experts_forward,
}  # fmt: skip


def _reduce(self: Any, protocol: int) -> Any:
    """Pickled and copied as a module of the class that was there, with the quicker one put on again."""
    state = {name: value for name, value in self.__dict__.items() if name not in ("_fastpeft", CALL)}
    own: State | None = self.__dict__.get("_fastpeft")
    return _again, (type(self).__bases__[0], None if own is None else own.shared), state


def _again(base: type, shared: Shared | None) -> Any:
    cls: Any = FAST_HEAD if base is nn.Linear else fast_class(base)
    module = cls.__new__(cls)
    if shared is not None:
        part = part_of(base)
        assert part is not None
        module.__dict__["_fastpeft"] = State(part, base, shared)
    return module


def _members(part: str, forward: Any, method: str = "forward") -> dict[str, Any]:
    return {method: forward, _SWITCHED: part, "__module__": __name__, "__reduce_ex__": _reduce}


FAST_HEAD = type("FastHead", (nn.Linear,), _members("head", head_forward))


# A class is kept while a module has it, as others make classes of which one module each is: parametrizations.
_fast_classes: WeakKeyDictionary[type, ref[type]] = WeakKeyDictionary()


def fast_class(base: type) -> type:
    """The subclass of a described class whose forward is the quicker one."""
    kept = _fast_classes.get(base)
    found = None if kept is None else kept()
    if found is None:
        found = _fast_class(base)
        _fast_classes[base] = ref(found)
    return found


def _fast_class(base: type) -> type:
    part = part_of(base)
    assert part is not None
    more = {TAKES_FACTORS: True} if isinstance(part, Experts) and not part.every else {}
    forward = spread_method(base, part) if isinstance(part, Spread) else _FORWARDS[part.name]
    return type(f"Fast{base.__name__}", (base,), _members(part.name, forward, _method(part)) | more)


def _method(part: Part) -> str:
    """The method of a class that its part is."""
    return part.method if isinstance(part, Spread) else "forward"


def is_switched(module: nn.Module) -> bool:
    """True if it is one of the modules that `accelerate` made quicker."""
    return hasattr(type(module), _SWITCHED)  # others may have made a class of it since: FSDP2, parametrizations


def switched_as(module: nn.Module) -> str:
    """The part of a model that a switched module is: "attention", "mlp", "norm", "stack", "experts" or "head"."""
    part: str = getattr(type(module), _SWITCHED)
    return part


def _without(cls: type) -> type:
    """The class without the quicker one that it is, or is made of."""
    if _SWITCHED in cls.__dict__:
        return cls.__bases__[0]
    bases = tuple(_without(base) if hasattr(base, _SWITCHED) else base for base in cls.__bases__)
    name, members = cls.__name__, dict(cls.__dict__)
    for old, new in zip(cls.__bases__, bases, strict=True):
        name = name.replace(old.__name__, new.__name__)
        for of, member in cls.__dict__.items():  # transformers' layers wrap the forward for each class made of them
            if old is not new and getattr(member, "__wrapped__", cls) is getattr(old, of, None):
                del members[of]
    return type(name, bases, members)


def switch_back(module: nn.Module) -> None:
    """Give such a module its own class again, below what others have made of it."""
    module.__class__ = _without(type(module))
    module.__dict__.pop(CALL, None)
    state = module.__dict__.pop("_fastpeft", None)
    if state is not None and state.config is not None:
        leave(module)


def described(model: nn.Module) -> Iterator[tuple[nn.Module, Part]]:
    """The modules of a model that have a description and run their own forward still."""
    for module in model.modules():
        cls: Any = type(module)
        part = None if is_switched(module) else part_of(cls)
        if isinstance(part, Experts) and why_not(module, part) is not None:
            continue
        if part is not None and _method(part) not in module.__dict__:  # somebody else's
            yield module, part


def accelerate(model: nn.Module, huge_pages: bool = True) -> list[nn.Module]:
    """Make the described layers of a model of transformers quicker, in place (also inside a PeftModel): those changed.

    huge_pages: put weights on a CPU into huge pages of memory where the system has them (`use_huge_pages`).
    Raises ValueError when the model has no described module, and where no kernel serves those that it has; nothing was
    changed then. A model that moves afterwards is served wherever it is.
    """
    found = list(described(model))
    if not found and not any(map(is_switched, model.modules())):
        raise ValueError(f"{type(model).__name__}: no layer of a described family (docs/families.md)")
    why = _nowhere(model)
    if why is not None:
        raise ValueError(why)
    shared, changed = Shared(), []
    for module, part in found:
        module.__dict__["_fastpeft"] = State(part, type(module), shared)
        cls: Any = type(module)
        module.__class__ = fast_class(cls)
        changed.append(module)
    _serve_masks(model)
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if type(head) is nn.Linear and ways_of(head.weight).head:
        head.__class__ = FAST_HEAD
        changed.append(head)
    if huge_pages:
        use_huge_pages((*model.parameters(), *model.buffers()))
    return changed


def _serve_masks(model: nn.Module) -> None:
    for owner in model.modules():  # from the outside in: the last that has an attention module is the nearest
        config = owner.__dict__.get("config")
        for module in owner.modules() if config is not None else ():
            if _attends(module):
                module.__dict__["_fastpeft"].config = config
    for module in model.modules():
        if _attends(module):
            serve(module, module.__dict__["_fastpeft"].config)


def _attends(module: nn.Module) -> bool:
    """True of a module whose attention is ours, and takes masks as spans."""
    part = module.__dict__["_fastpeft"].part if is_switched(module) and switched_as(module) != "head" else None
    return isinstance(part, Attention) or (isinstance(part, Together) and part.attends)


def _nowhere(model: nn.Module) -> str | None:
    """Why no module can be quicker where the model's parameters are; None where each place has quicker ones."""
    places = {(p.device, p.dtype) for p in model.parameters() if p.is_floating_point()}
    found = {place: known_ways(*place) for place in sorted(places, key=str)}
    if any(ways.any for ways in found.values()):
        return None
    return "; ".join(f"no layer is quicker on {device} in {str(dtype).removeprefix('torch.')}: {ways.why_none()}"
                     for (device, dtype), ways in found.items()) or "the model has no parameters"  # fmt: skip
