"""A token's attention and MLP, call after call: what a layer looked at in the last one, looked at again in one go.

Decoding waits for Python: whether attention is ours, which tensors a kernel takes for each projection, in which form
they are. All of that is the same from one token to the next but for x, the cache and the mask. `Lookups` says so in a
tenth of the time, and whatever else changes makes `serves` false: the layer looks at everything then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeGuard, TypeVar

import torch
from torch import Tensor

from peft_kernels import Projection, QuantWeight

from ..layer.by_row.call import now
from ..weights.lookups import Lookups
from .description import Attention, Mlp
from .norms import prepared
from .projections import Linears, note, projections
from .ways import ways_of

_UNTRUE = ("output_attentions", "encoder_hidden_states", "key_value_states")  # are not given
_PAUSE = 64  # calls from one that could not be kept to the next that is tried


class Token:
    """The prepared calls `qkv`, `out` and `norms` of a layer for one token, and what has to be as it was. causal: of
    the call's mask. cache: the name of the argument that is the cache."""

    def __init__(self, module: Any, of: Attention, x: Tensor, given: dict[str, Any], cache: str) -> None:
        self.lookups = Lookups()
        note_attention(module, of, self.lookups)
        self.ways, self.dtype, self.names = ways_of(x), x.dtype, frozenset(given)
        self.untrue = [name for name in _UNTRUE if name in given]
        self.cache = cache
        causal = given.get("is_causal")
        self.causal: bool = getattr(module, "is_causal", not of.eager) if causal is None else causal
        self.cache_type = type(given[cache])
        self.qkv: Any = None
        self.out: Any = None
        self.norms: tuple[Any, Any] | None = None  # of q and of k
        self.heads: list[int] | None = None  # of q, k and v where they lie so, one after the other

    def serves(self, of: Attention, module: Any, x: Tensor, given: dict[str, Any]) -> bool:
        """True of a call that is like the one that this was made of."""
        return (
            x.dim() == 3 and x.shape[1] == 1 and x.dtype is self.dtype
            and not torch.is_grad_enabled() and now.state.call is None
            and given.keys() == self.names and type(given[self.cache]) is self.cache_type
            and (of.turn is None or given.get("position_embeddings") is not None)
            and ways_of(x) is self.ways and not any(map(given.get, self.untrue))
            and (of.served is None or of.served(module)) and self.lookups.hold()
        )  # fmt: skip


def note_attention(module: Any, of: Attention, lookups: Lookups) -> None:
    """Note what says that a module's attention is ours, and which layers are around it."""
    config = module.__dict__.get("config")
    lookups.entries(module.__dict__, "config", "training", "is_causal", "_fastpeft")
    if config is not None:
        lookups.entries(vars(config), "_attn_implementation_internal", "_attn_implementation", "_output_attentions",
                        "output_attentions")  # fmt: skip
    _note_layers(module, (*of.qkv, of.out), lookups)


def _note_layers(module: Any, names: Sequence[str], lookups: Lookups) -> None:
    """Note a module's layers of these names; nothing is kept where one of them is not there."""
    lookups.entries(module._modules, *names)
    for name in names:
        layer = module._modules.get(name)
        if layer is None:
            lookups.refuse()
        else:
            note(layer, lookups)


T = TypeVar("T")


class Kept(Generic[T]):
    """A layer's kept calls, from one token to the next, once there are any. Copied and pickled empty."""

    def __init__(self) -> None:
        self.kept: T | None = None
        self._pause = 0

    def __reduce__(self) -> Any:
        return type(self), ()

    def due(self) -> bool:
        """True of a call that may be kept: not of those that follow one that could not. What was kept is no longer."""
        if self.kept is None and self._pause:
            self._pause -= 1
            return False
        self.kept, self._pause = None, _PAUSE
        return True


class Tokens(Kept[Token]):
    """The `Token` of a layer."""

    def keep(self, module: Any, of: Attention, qkv: Linears, out: Linears, x: Tensor, y: Tensor,
             given: dict[str, Any], cache: Any, queries: int) -> None:  # fmt: skip
        """Keep what a call without gradients has looked at. x: its token [B, 1, K]; y: what `out` was given, [B, N];
        queries: the heads of q."""
        if not self.due():
            return
        named = next((name for name, value in given.items() if value is cache), None)  # None: it is part of another
        if of.alibi or module.training or type(x) is not Tensor or named is None:
            return
        token = Token(module, of, x, given, named)
        if any(map(given.get, token.untrue)) or not token.lookups.keeps:
            return
        token.qkv = _prepared(qkv, x.squeeze(1), [module._modules[name] for name in of.qkv])
        token.out = _prepared(out, y, [module._modules[of.out]])
        token.heads = _heads(module, of, token.qkv, queries, token.lookups)
        token.norms = _norms(module, of, x, token.lookups)
        # asked for between two looks, as another thread may change the layers
        if token.qkv is not None and token.out is not None and token.lookups.hold():
            self.kept = token


def _heads(module: Any, of: Attention, qkv: Any, queries: int, lookups: Lookups) -> list[int] | None:
    """The heads of q, of k and of v where the prepared call makes them one after the other; else None."""
    d = module.__dict__.get(of.head_size)
    if qkv is None or d is None or of.gated or of.normed == "whole":
        return None
    lookups.entries(module.__dict__, of.head_size)
    if len(qkv.widths) == 3:
        return [n // d for n in qkv.widths] if not any(n % d for n in qkv.widths) else None
    if of.order != "parts" or len(qkv.widths) > 1:
        return None
    lookups.entries(module.__dict__, "num_heads")
    lookups.entries(vars(module.__dict__.get("config", module)), "num_attention_heads")
    groups = (qkv.widths[0] // d - queries) // 2
    return [queries, groups, groups]


def _norms(module: Any, of: Attention, x: Tensor, lookups: Lookups) -> tuple[Any, Any] | None:
    """The prepared calls of the norms of each head of q and k; None where they are called as modules."""
    if of.norms is None or of.normed not in ("heads", "turned"):
        return None
    norms = [module._modules.get(name) for name in of.norms]
    heads = x.new_empty((1, getattr(module, of.head_size)))
    found = [None if norm is None else prepared(norm, heads, lookups) for norm in norms]
    lookups.entries(module._modules, *of.norms)
    return None if None in found else (found[0], found[1])


def _prepared(linears: Linears, x: Tensor, layers: Sequence[Any]) -> Any:
    """The prepared call of layers in 4 bits; None where they are called otherwise."""
    found = projections(x, *layers)
    return linears.call.ready(x, *found) if in_4_bits(found) else None


def in_4_bits(found: Sequence[Projection] | None) -> TypeGuard[list[Projection]]:
    """True of projections that one kernel takes without gradients: weights in few bits, and no dropout."""
    return found is not None and not any(p.dropout_p or type(p.weight) is not QuantWeight for p in found)


class MlpToken:
    """The prepared call of an MLP for one token, and what has to be as it was."""

    def __init__(self, call: Any, lookups: Lookups, x: Tensor) -> None:
        self.call, self.lookups, self.dtype, self.ways = call, lookups, x.dtype, ways_of(x)

    def serves(self, module: Any, of: Mlp, x: Tensor) -> bool:
        """True of a call that is like the one that this was made of."""
        return (
            x.dim() == 3 and x.shape[1] == 1 and x.dtype is self.dtype
            and not torch.is_grad_enabled() and now.state.call is None and ways_of(x) is self.ways
            and (of.served is None or of.served(module)) and self.lookups.hold() and self.call.serves(x)
        )  # fmt: skip


def note_mlp(module: Any, of: Mlp, lookups: Lookups) -> None:
    """Note what says that a module's MLP is ours, its activation, and which layers are around it."""
    lookups.entries(module.__dict__, "training", "_fastpeft", of.act, of.limit)
    lookups.entries(module._modules, of.act)
    act = module._modules.get(of.act)
    if act is not None:
        lookups.calls_of(act)
        lookups.entries(vars(act), "approximate")
    elif of.act not in module.__dict__ and hasattr(module, of.act):  # of its class
        lookups.refuse()
    if "." in of.act or (of.limit and of.limit not in module.__dict__):
        lookups.refuse()
    _note_layers(module, (*of.up, of.down), lookups)
