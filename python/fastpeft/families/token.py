"""A token's attention, call after call: what its layer looked at in the last one, looked at again in one go.

Decoding waits for Python: whether attention is ours, which tensors a kernel takes for each projection, in which form
they are. All of that is the same from one token to the next but for x, the cache and the mask. `Lookups` says so in a
tenth of the time, and whatever else changes makes `serves` false: the layer looks at everything then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels import QuantWeight

from ..layer.by_row.call import now
from ..weights.lookups import Lookups
from .description import Attention
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
    lookups.entries(module._modules, *of.qkv, of.out)
    for name in (*of.qkv, of.out):
        layer = module._modules.get(name)
        if layer is None:
            lookups.refuse()
        else:
            note(layer, lookups)


class Tokens:
    """The `Token` of a layer, once there is one. Copied and pickled empty."""

    def __init__(self) -> None:
        self.kept: Token | None = None
        self._pause = 0

    def __reduce__(self) -> Any:
        return Tokens, ()

    def keep(self, module: Any, of: Attention, qkv: Linears, out: Linears, x: Tensor, y: Tensor,
             given: dict[str, Any], cache: Any) -> None:  # fmt: skip
        """Keep what a call without gradients has looked at. x: its token [B, 1, K]; y: what `out` was given, [B, N]."""
        self.kept = None
        if self._pause:
            self._pause -= 1
            return
        self._pause = _PAUSE
        named = next((name for name, value in given.items() if value is cache), None)  # None: it is part of another
        if of.alibi or module.training or type(x) is not Tensor or named is None:
            return
        token = Token(module, of, x, given, named)
        if any(map(given.get, token.untrue)) or not token.lookups.keeps:
            return
        token.qkv = _prepared(qkv, x.squeeze(1), [module._modules[name] for name in of.qkv])
        token.out = _prepared(out, y, [module._modules[of.out]])
        token.norms = _norms(module, of, x, token.lookups)
        # asked for between two looks, as another thread may change the layers
        if token.qkv is not None and token.out is not None and token.lookups.hold():
            self.kept, self._pause = token, 0


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
    if found is None or any(p.dropout_p or type(p.weight) is not QuantWeight for p in found):
        return None
    return linears.call.ready(x, *found)
