"""Faster Llama models of transformers: the same mathematics in fewer and quicker calls, on a CPU and on a GPU.

`ways.py` says which of the following is taken where a layer is. Decoding: at one token a model spends more time between
kernels than in them. transformers' decoder layer makes about 45 torch calls, of which 14 are for the rotary embedding
and 16 for two norms; the subclass here makes about 20, and on a CPU the output head reads its matrix at the memory's
speed. Training: q, k and v are one call that reads its input once, the MLP is one function that keeps its input and
gate's and up's outputs alone, norms are one kernel each way. On a CPU attention with its rotary embeddings is one
kernel forward and one backward; on a GPU the model's own attention, whichever it is, gets q, k and v from that call.
Everything else (other families, layers whose inner modules have hooks) runs transformers' own forward, so what
`generate` and `loss.backward()` mean does not change. Norms, and attention in decoding on a CPU, are computed in
float32 and rounded once, which is never less exact.

Reversible: `handle.remove()` puts the classes back. Parameters, buffers, state dicts and adapters are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import (
    PreparedCall,
    gated,
    gated_mlp,
    lora_linear,
    lora_linear_stacked,
    native_library,
    rms_norm,
    rotary_attention,
    use_huge_pages,
)

from ..weights.base import is_listened_to
from .projections import Given, linears, modules_on, projections
from .ways import Ways, known_ways, ways_of

_ACCELERATED = "_fastpeft_accelerated"  # a class with a quicker forward has it: the part of a model that it is
QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
MOST_SCORES = 1 << 24  # batch x heads x queries x keys that may stand at once: 64 MiB of float32
_HEAD_ROWS = 4  # above this torch's matrix product is the better one


class _RotarySigns:
    """`sin` with the signs of rotate_half folded in, made once a token for all layers; in the dtype of the model."""

    def __init__(self) -> None:
        self._made: tuple[Tensor, tuple[Tensor, Tensor]] | None = None  # of this sin; whole, as threads share it

    def get(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin, [B, 1, 1, D]."""
        made = self._made
        if made is None or made[0] is not sin:
            half = sin.shape[-1] // 2
            signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
            self._made = made = sin, (cos.unsqueeze(1), signed.unsqueeze(1))
        return made[1]


class _Decoding:
    """A module's part in this: the signs of the rotation, which all layers share, and its prepared calls."""

    def __init__(self, signs: _RotarySigns) -> None:
        self.signs = signs
        self.qkv, self.o, self.gate_up, self.down = (PreparedCall(lora_linear_stacked) for _ in range(4))


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)


def _one_token(
    layer: Any, ways: Ways, x: Tensor, mask: Tensor | None, cache: Any, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """A decoder layer for x [B, 1, H] with `cache` holding the tokens before; x [B, 1, H] out."""
    attention, mlp, own, few = layer.self_attn, layer.mlp, layer._fastpeft_decoding, ways.launches
    d = attention.head_dim
    batch = x.shape[0]
    x = x.view(batch, -1)
    h = _norm(layer.input_layernorm, x)
    q, k, v = linears(own.qkv, h, few, attention.q_proj, attention.k_proj, attention.v_proj)
    heads = q.shape[-1] // d
    cos, signed_sin = own.signs.get(*position_embeddings)
    qk = torch.cat((q, k), dim=-1).view(batch, -1, 1, d)
    qk = torch.addcmul(qk * cos, torch.roll(qk, d // 2, dims=-1), signed_sin)
    keys, values = cache.update(qk[:, heads:], v.view(batch, -1, 1, d), attention.layer_idx)
    if ways.attention:
        out = F.scaled_dot_product_attention(
            # torch's bfloat16 attention on a CPU takes five times the float32 one at one query
            qk[:, :heads].float(), keys.float(), values.float(), attn_mask=_wide(mask), scale=attention.scaling,
            enable_gqa=keys.shape[1] != heads,
        )  # fmt: skip
    else:
        attend = _torch_attention()
        out, _ = attend(attention, qk[:, :heads], keys, values, mask, dropout=0.0, scaling=attention.scaling)
    x = x + linears(own.o, out.to(x.dtype).view(batch, -1), few, attention.o_proj)[0]
    h = _norm(layer.post_attention_layernorm, x)
    gate, up = linears(own.gate_up, h, few, mlp.gate_proj, mlp.up_proj)
    # for one row Python takes longer over an operator of ours than over torch's two calls
    active = gated(gate, up) if few else F.silu(gate).mul_(up)
    return (x + linears(own.down, active, few, mlp.down_proj)[0]).unsqueeze(1)


def _wide(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype is torch.bool else mask.float()


@cache
def _torch_attention() -> Any:
    """`(module, q [B, heads, T, D], k, v, mask, ...) -> (y [B, T, heads, D], None)`: torch's own, as transformers asks
    for it on each device."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS["sdpa"]


def _head_forward(self: Any, input: Tensor) -> Tensor:
    # `hidden[:, -1:]` is not contiguous: torch takes the matrix once a row then, in bfloat16 at 200 times the time
    input = input.contiguous()
    # torch reads a large matrix at half of the memory's speed when it meets one row, and copies it first in bfloat16
    if (
        input.numel() > _HEAD_ROWS * self.in_features or torch.is_grad_enabled()
        or input.dtype is not self.weight.dtype or not ways_of(input).head
    ):  # fmt: skip
        dense: Tensor = nn.Linear.forward(self, input)
        return dense
    one: Tensor = lora_linear(input, self.weight, bias=self.bias)
    return one


def _reduce(self: Any, protocol: int) -> Any:
    """Pickled and copied as a module of the class that was there, with the quicker one put on again."""
    state = {name: value for name, value in self.__dict__.items() if name != "_fastpeft_decoding"}
    return _again, (type(self).__bases__[0],), state


def _again(base: type) -> Any:
    kind: Any = _FastHead if base is nn.Linear else _classes()[base]
    module = kind.__new__(kind)
    if base is not nn.Linear:
        module.__dict__["_fastpeft_decoding"] = _Decoding(_RotarySigns())
    return module


def _members(part: str, forward: Any) -> dict[str, Any]:
    return {"forward": forward, _ACCELERATED: part, "__module__": __name__, "__reduce_ex__": _reduce}


_FastHead = type("_FastHead", (nn.Linear,), _members("head", _head_forward))


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """Where a layer keeps keys and values: `cache` since transformers 5.24, `past_key_values` before."""
    found = kwargs.get("past_key_values")
    return kwargs.get("cache") if found is None else found


def _serves(layer: Any, ways: Ways, x: Tensor, cache: Any, position_embeddings: Any, kwargs: dict[str, Any]) -> bool:
    if x.shape[1] != 1 or cache is None or position_embeddings is None or layer.training or torch.is_grad_enabled():
        return False
    if "read_index" in kwargs:  # continuous batching: a row is not a sequence
        return False
    if not ways.token or kwargs.get("output_attentions"):
        return False
    attention = layer.self_attn
    if not is_switched(attention):  # an adapter is around it
        return False
    if attention.config._attn_implementation not in ("sdpa", "eager") or attention.config.hidden_act != "silu":
        return False
    return not any(map(is_listened_to, (attention, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)))


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    x, weight = hidden_states, self.weight
    plain = x.dtype is weight.dtype and x.dtype is not torch.float64 and not weight.requires_grad
    if plain and not torch.compiler.is_compiling() and ways_of(x).norm:  # a graph has its own fusions
        return rms_norm(x, weight, self.variance_epsilon)
    result: Tensor = self._fastpeft_base.forward(self, x)
    return result


def _attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    batch, t = hidden_states.shape[:2]
    ways = ways_of(hidden_states)
    layers = (self.q_proj, self.k_proj, self.v_proj)
    qkv = self._fastpeft_decoding.qkv
    if (
        not ways.attention or not torch.is_grad_enabled() or _cache_of(kwargs) is not None
        or position_embeddings is None or hidden_states.dtype is torch.float64
        or self.config._attn_implementation != "sdpa" or (self.training and self.attention_dropout)
        or (attention_mask is not None and attention_mask.dtype is not torch.bool)
        # eager code would keep every score
        or (batch * self.config.num_attention_heads * t * t > MOST_SCORES and native_library().reason is not None)
    ):  # fmt: skip
        found = projections(hidden_states, *layers) if ways.stack and not ways.attention else None
        itself = self if found is None else Given(self, QKV, hidden_states, qkv(hidden_states, *found))
        result: tuple[Tensor, Tensor | None] = self._fastpeft_base.forward(
            itself, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
        )
        return result
    found = projections(hidden_states, *layers)
    ys = modules_on(hidden_states, *layers) if found is None else qkv(hidden_states, *found)
    q, k, v = (y.view(batch, t, -1, self.head_dim) for y in ys)
    # no mask means causal, as transformers' sdpa has it
    keep = None if attention_mask is None else attention_mask[:, 0]
    out = rotary_attention(q, k, v, *position_embeddings, keep, scale=self.scaling)
    return modules_on(out.view(batch, t, -1), self.o_proj)[0], None



def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    if self.config.hidden_act == "silu" and not is_listened_to(self.act_fn) and ways_of(x).mlp:
        found = projections(x, self.gate_proj, self.up_proj, self.down_proj)
        if found is not None:
            gate, up, down = found
            return gated_mlp(x, gate, up, down)
        if torch.is_grad_enabled():
            of_gate, of_up = modules_on(x, self.gate_proj, self.up_proj)
            y: Tensor = modules_on(gated(of_gate, of_up), self.down_proj)[0]
            return y
    result: Tensor = self._fastpeft_base.forward(self, x)
    return result


def _plain_subclass(base: type, part: str, forward: Any) -> type:
    return type(f"Fast{base.__name__}", (base,), {**_members(part, forward), "_fastpeft_base": base})


def _layer_subclass(base: type) -> type:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        kept, ways = _cache_of(kwargs), ways_of(hidden_states)
        if position_embeddings is not None and _serves(self, ways, hidden_states, kept, position_embeddings, kwargs):
            return _one_token(self, ways, hidden_states, attention_mask, kept, position_embeddings)
        result: Tensor = base.forward(  # type: ignore[attr-defined]
            self, hidden_states, attention_mask=attention_mask, position_ids=position_ids,
            position_embeddings=position_embeddings, **kwargs,
        )  # fmt: skip
        return result

    return type(f"Fast{base.__name__}", (base,), _members("layer", forward))


@cache
def _classes() -> dict[type, type]:
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

    return {
        LlamaDecoderLayer: _layer_subclass(LlamaDecoderLayer),
        LlamaAttention: _plain_subclass(LlamaAttention, "attention", _attention_forward),
        LlamaMLP: _plain_subclass(LlamaMLP, "mlp", _mlp_forward),
        LlamaRMSNorm: _plain_subclass(LlamaRMSNorm, "norm", _norm_forward),
    }


@dataclass
class Accelerated:
    """The changes of `accelerate`: `modules` switched modules. `remove()` undoes it."""

    switched: list[nn.Module] = field(default_factory=list)

    @property
    def modules(self) -> int:
        return len(self.switched)

    def remove(self) -> None:
        for module in self.switched:
            switch_back(module)
        self.switched.clear()


def is_switched(module: nn.Module) -> bool:
    """True if it is one of the modules that `accelerate` made quicker."""
    return _ACCELERATED in type(module).__dict__


def switched_as(module: nn.Module) -> str:
    """The part of a model that a switched module is: "layer", "attention", "mlp", "norm" or "head"."""
    part: str = type(module).__dict__[_ACCELERATED]
    return part


def place_of(module: Any) -> tuple[torch.device, torch.dtype]:
    """Where a norm, or a decoder layer by its first norm, computes, and in which dtype."""
    weight = module.input_layernorm.weight if hasattr(module, "input_layernorm") else module.weight
    return weight.device, weight.dtype


def switch_back(module: nn.Module) -> None:
    """Give such a module its own class again."""
    module.__class__ = type(module).__bases__[0]
    module.__dict__.pop("_fastpeft_decoding", None)


def accelerate(model: nn.Module, huge_pages: bool = True) -> Accelerated:
    """Speed up decoding and training of a Llama model of transformers (also inside a PeftModel), in place.

    huge_pages: put weights on a CPU into huge pages of memory where the system has them (`use_huge_pages`).
    Raises ValueError when the model has no decoder layer of a class that is known here, and where no kernel serves
    those that it has; nothing was changed then. A model that moves afterwards is served wherever it is.
    """
    classes = _classes()
    layers = [m for m in model.modules() if type(m) in classes]
    known = [*layers, *(m for m in model.modules() if is_switched(m))]
    if not known:
        raise ValueError(f"{type(model).__name__}: no decoder layer of Llama, nothing to accelerate")
    why = _nowhere(model, known)
    if why is not None:
        raise ValueError(why)
    handle, signs = Accelerated(), _RotarySigns()
    for module in layers:
        module.__dict__["_fastpeft_decoding"] = _Decoding(signs)
        module.__class__ = classes[type(module)]
        handle.switched.append(module)
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if handle.switched and type(head) is nn.Linear and ways_of(head.weight).head:
        handle.switched.append(head)
        head.__class__ = _FastHead
    if huge_pages:
        use_huge_pages((*model.parameters(), *model.buffers()))
    return handle


def _nowhere(model: nn.Module, modules: list[nn.Module]) -> str | None:
    """Why these modules cannot be quicker where the model's parameters are; None where each place has quicker ones."""
    dtypes = {place_of(m)[1] for m in modules if hasattr(m, "variance_epsilon")}
    places = {(p.device, dtype) for p in model.parameters() for dtype in dtypes}
    found = {place: known_ways(*place) for place in sorted(places, key=str)}
    return "; ".join(f"no layer is quicker on {device} in {str(dtype).removeprefix('torch.')}: {ways.why_none()}"
                     for (device, dtype), ways in found.items() if not ways.any) or None  # fmt: skip
