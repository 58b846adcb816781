"""Self-attention of any family that is described: projections of one input in a call, norms, rotation, one op."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import attention, native_library, rotary

from ..weights.base import acts_in_calls
from .angles import Turn, alibi_slopes
from .description import Attention, Together
from .masking import serve
from .masks import Seen
from .projections import Given, children, in_one_call, linears, modules_on, stacked
from .state import State
from .token import Token
from .ways import Ways, ways_of

MOST_SCORES = 1 << 24  # batch x heads x queries x keys that may stand at once: 64 MiB of float32
_CACHES = ("past_key_values", "cache", "layer_past")  # where a layer keeps keys and values; `cache` since 5.24


def cache_of(kwargs: dict[str, Any]) -> Any:
    for name in _CACHES:
        found = kwargs.get(name)
        if found is not None:
            return getattr(found, "self_attention_cache", found)  # of a decoder that attends to an encoder, too
    return None


def attention_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    state: State = self._fastpeft
    of, x = state.part, hidden_states
    assert isinstance(of, Attention)
    token = state.tokens.kept
    if token is not None and not args and token.serves(of, self, x, kwargs):
        given, ways, cache, causal, served = kwargs, token.ways, kwargs[token.cache], token.causal, True
    else:
        token, given = None, kwargs | dict(zip(state.names, args, strict=False)) if args else kwargs
        cache, ways = cache_of(given), ways_of(x)
        served = _serves(self, of, x, ways, given)
        # eager code of a module that does not say it sees all where no mask is given
        wanted = given.get("is_causal")
        causal = getattr(self, "is_causal", not of.eager) if wanted is None else wanted
    seen = None
    if served:
        mask = given.get("attention_mask")
        if type(mask) is Tensor and state.config is None:  # a copy, whose masks do not come as spans yet
            state.config = getattr(self, "config", None)
            serve(self, state.config)
        seen = None if adds_bools(of, state.config, mask) else state.shared.masks.seen(mask, x.shape[1], causal)
    blind = None if seen is None or of.sinks else seen.blind  # sinks take all of the softmax where no key is seen
    # gradients of a softmax whose scores a mask has rounded away are what the model's own code makes of it
    if seen is None or (blind is not None and (torch.is_grad_enabled() or self.training)):
        return _itself(self, of, state, ways, hidden_states, args, kwargs)
    q, k, v, gate = _heads(self, of, state, x, token)
    turn = None
    if of.turn is not None and (of.turned is None or of.turned(self)):
        turn = state.shared.angles.get(of, *given["position_embeddings"])
    if of.normed != "turned":
        q, k = _normed(self, of, q, k, token)
    elif turn is not None:
        q, k, turn = *_turned(turn, q, k), None
        q, k = _normed(self, of, q, k, token)
    if of.key_scale:
        k = k * getattr(self, of.key_scale)
    if cache is not None:
        if turn is not None:
            q, k, turn = *_turned(turn, q, k), None
        keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
    scale, dropout_p = getattr(self, of.scale) if of.scale else q.shape[-1] ** -0.5, dropout_of(self, of.dropout)
    if ways.attention:
        k, v = seen.up_to_now(q.shape[1], k, v)
        slopes, bias = _alibi(of, given, q, seen)
        y = attention(
            q, k, v, scale=scale, causal=seen.causal, spans=seen.spans, keep=seen.keep,
            slopes=slopes, bias=bias,
            softcap=(getattr(self, of.softcap) or 0.0) if of.softcap else 0.0,
            sinks=getattr(self, of.sinks) if of.sinks else None,
            cos=None if turn is None else turn.cos, sin=None if turn is None else turn.sin,
            interleaved=turn is not None and turn.neighbours, dropout_p=dropout_p,
        )  # fmt: skip
        if blind is not None:
            mean = v.mean(1, keepdim=True).repeat_interleave(q.shape[2] // v.shape[2], dim=2)
            y = torch.where(blind[..., None, None], mean, y)
    else:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y, _ = torch_attention()(self, q, k, v, given.get("attention_mask"), dropout=dropout_p, scaling=scale)
    y = y.flatten(2)
    if gate is not None:
        y = y * torch.sigmoid(gate)
    if token is None and x.shape[1] == 1 and cache is not None and not torch.is_grad_enabled() and not ways.launches:
        state.tokens.keep(self, of, state.qkv, state.o, x, y.squeeze(1), given, cache, head_count(self))
    out = after(self, of.after or of.residual, _out(self, of, state, y, token))
    return (out if not of.residual else given["residual"] + out), None


def _alibi(of: Attention, given: dict[str, Any], q: Tensor, seen: Seen) -> tuple[Tensor | None, Tensor | None]:
    """(slopes, bias) of the op for ALiBi, of which one says it.

    transformers counts the keys that are seen, which are not those in between where a mask has holes.
    """
    alibi = given.get(of.alibi) if of.alibi else None
    if alibi is None:
        return None, None
    if seen.keep is not None:
        return None, alibi.view(-1, q.shape[2], 1, alibi.shape[-1])
    return torch.tensor(alibi_slopes(q.shape[2]), device=q.device), None


def _serves(self: Any, of: Attention, x: Tensor, ways: Ways, given: dict[str, Any]) -> bool:
    if not ways.attention and not _is_token(of, x, ways, given):
        return False
    if x.dim() != 3 or x.dtype is torch.float64 or (of.served and not of.served(self)):
        return False
    if of.alibi and acts_in_calls(getattr(self, of.dropout)):  # such code calls it, with all probabilities
        return False
    if other_attention(self, of) or "read_index" in given:  # continuous batching: a row is not a sequence
        return False
    if given.get("output_attentions", getattr(getattr(self, "config", None), "output_attentions", False)):
        return False
    if of.turn is not None and given.get("position_embeddings") is None and (of.turned is None or of.turned(self)):
        return False
    if any(given.get(name) is not None for name in ("encoder_hidden_states", "key_value_states")):
        return False
    batch, t = x.shape[:2]
    return t == 1 or scores_fit(batch * head_count(self) * t * t)


def scores_fit(count: int) -> bool:
    """True where so many scores of an attention may stand at once, or where a kernel keeps none."""
    few = count <= MOST_SCORES or not torch.is_grad_enabled()
    return few or torch.compiler.is_compiling() or native_library().reason is None


def after(self: Any, name: str, y: Tensor) -> Tensor:
    """y after the dropout that the module has under a name: a module, or a probability."""
    found = getattr(self, name) if name else 0.0
    if type(found) is nn.Dropout and not (found.training or acts_in_calls(found)):
        return y
    if callable(found):
        dropped: Tensor = found(y)
        return dropped
    return F.dropout(y, found, self.training) if found and self.training else y


def _is_token(of: Attention, x: Tensor, ways: Ways, given: dict[str, Any]) -> bool:
    """One token on a device whose own attention is taken: what is around it takes half of the launches here."""
    few = ways.token and ways.launches and x.shape[1] == 1 and not torch.is_grad_enabled()
    return few and cache_of(given) is not None and not (of.softcap or of.sinks or of.alibi)


@functools.cache
def torch_attention() -> Any:
    """`(module, q [B, heads, T, D], k, v, mask, ...) -> (y [B, T, heads, D], None)`: torch's own, as transformers asks
    for it on each device."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS["sdpa"]


def other_attention(self: Any, of: Attention | Together) -> str | None:
    """The attention that was chosen for the model, if it was: what is usual in the family is None."""
    config = getattr(self, "config", None)  # a module without one has one way
    wanted: str = "eager" if config is None else config._attn_implementation
    return None if wanted == "sdpa" or (of.eager and wanted == "eager") else wanted


def adds_bools(of: Attention | Together, config: Any, mask: Tensor | None) -> bool:
    """True where the module's own code adds a mask of bools to the scores, as numbers: it hides no key then."""
    if mask is None or not of.eager or mask.dtype is not torch.bool:
        return False
    return config is None or config._attn_implementation == "eager"  # a module without one has one way


def head_count(self: Any) -> int:
    """Heads of q."""
    own = "num_heads" in self.__dict__ or hasattr(type(self), "num_heads")  # a module's own miss takes microseconds
    count: int = self.num_heads if own else self.config.num_attention_heads
    return count


def dropout_of(self: Any, name: str) -> float:
    """The probability of a dropout now; name: of the attribute that is its module, or the number."""
    if not self.training:
        return 0.0
    found = getattr(self, name, 0.0)
    p: float = getattr(found, "p", found)
    return p


def _stacked(self: Any, state: State, x: Tensor, names: tuple[str, ...]) -> Any:
    """Outputs of projections of one input, [B, T, F], or [B, F] of a token: one call of a kernel where that serves."""
    layers = children(self, names)
    if not torch.is_grad_enabled() and x.shape[1] == 1:  # decoding
        return linears(state.qkv, x.squeeze(1), ways_of(x).launches, *layers)
    return stacked(state.qkv, x, *layers)


def _heads(
    self: Any, of: Attention, state: State, x: Tensor, token: Token | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q [B, T, H, D], k and v [B, T, G, D], as views of what the projections made; the gate [B, T, H D]."""
    d, (batch, t, _) = getattr(self, of.head_size), x.shape
    if token is not None and token.qkv.serves(rows := x.squeeze(1)):
        if token.heads is not None and batch == 1:  # lie one after the other
            q, k, v = torch.split_with_sizes(token.qkv.joined(rows).view(1, 1, -1, d), token.heads, 2)
            return q, k, v, None
        ys = token.qkv.run(rows)
    else:
        ys = _stacked(self, state, x, of.qkv)
    gate = None
    if len(ys) == 3:
        q, k, v = _whole(self, of, ys) if of.normed == "whole" else ys
        q, k, v = _by_head(q, batch, t, 2 * d if of.gated else d), _by_head(k, batch, t, d), _by_head(v, batch, t, d)
        if of.gated:
            q, gate = q.chunk(2, dim=-1)
            gate = gate.flatten(2)
        return q, k, v, gate
    order = of.order(self) if callable(of.order) else of.order
    heads: Any = _by_head(ys[0], batch, t, d)
    queries = head_count(self)
    groups = (heads.shape[2] - queries) // 2
    if order == "parts":
        q, k, v = heads.split((queries, groups, groups), dim=2)
        return q, k, v, None
    of_group = heads.unflatten(2, (groups, -1))  # [B, T, G, H / G + 2, D]
    q = of_group[..., :-2, :]
    return (q[..., 0, :] if q.shape[3] == 1 else q.flatten(2, 3)), of_group[..., -2, :], of_group[..., -1, :], None


def _by_head(y: Tensor, batch: int, t: int, d: int) -> Tensor:
    return y.view(batch, t, y.shape[-1] // d, d)  # torch's unflatten takes longer, and a token has one view less


def _whole(self: Any, of: Attention, ys: Any) -> tuple[Tensor, Tensor, Tensor]:
    assert of.norms is not None
    norms = [getattr(self, name) for name in of.norms]
    if ys[0].dim() == 2 and any(map(acts_in_calls, norms)):  # a token: whoever listens gets [B, 1, F], as elsewhere
        ys = [y.unsqueeze(1) for y in ys]
    return norms[0](ys[0]), norms[1](ys[1]), ys[2]


def _normed(self: Any, of: Attention, q: Tensor, k: Tensor, token: Token | None) -> tuple[Tensor, Tensor]:
    if of.norms is None or of.normed == "whole":
        return q, k
    if token is not None and token.norms is not None:
        of_q, of_k = token.norms
        if of_q.serves(q) and of_k.serves(k):
            made_q, made_k = of_q.run(q), of_k.run(k)
            if made_q is not None and made_k is not None:  # in memory as they come
                return made_q, made_k
    norms = [getattr(self, name, None) for name in of.norms]  # some models of a family have none
    if norms[0] is None or norms[1] is None:
        return q, k
    if of.normed == "apart" or (of.heads_first and (acts_in_calls(norms[0]) or acts_in_calls(norms[1]))):
        return norms[0](q.transpose(1, 2)).transpose(1, 2), norms[1](k.transpose(1, 2)).transpose(1, 2)
    return norms[0](q), norms[1](k)


def _turned(turn: Turn, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return rotary(q, k, turn.cos, turn.sin, interleaved=turn.neighbours)


def _out(self: Any, of: Attention, state: State, y: Tensor, token: Token | None) -> Tensor:
    if token is not None and token.out.serves(rows := y.squeeze(1)):
        found: Tensor = token.out.run(rows)[0]
        return found.unsqueeze(1)
    (layer,) = children(self, (of.out,))
    if not torch.is_grad_enabled() and y.shape[1] == 1:
        return linears(state.o, y.squeeze(1), ways_of(y).launches, layer)[0].unsqueeze(1)
    return modules_on(y, layer)[0]


def _itself(
    self: Any, of: Attention, state: State, ways: Ways, x: Tensor, args: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The model's own forward, which gets q, k and v from one call."""
    others = in_one_call(self, of.qkv, x, state.qkv) if ways.stack else {}
    itself = Given(self, others) if others else self
    result: tuple[Tensor, Tensor | None] = state.base.forward(itself, x, *args, **kwargs)
    return result


def why_not(self: Any, of: Attention | Together, dtype: torch.dtype) -> str | None:
    """Why the module's attention is the model's own code now, in words for a report."""
    if of.served is not None and not of.served(self):
        return "a variant of the family that is not described"
    wanted = other_attention(self, of)
    if wanted is not None:
        return f"the model asks for {wanted}"
    return "it is in float64" if dtype is torch.float64 else None
