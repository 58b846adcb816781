"""Faster Llama models of transformers on a CPU: the same mathematics in fewer and quicker calls.

Decoding: at one token a model spends more time between kernels than in them. transformers' decoder layer makes about 45
torch calls, of which 14 are for the rotary embedding and 16 for two norms; the subclass here makes about 20, and the
output head reads its matrix at the memory's speed. Training: q, k and v are one call that reads its input once,
attention with its rotary embeddings is one kernel forward and one backward, the MLP is one function that keeps its
input and gate's and up's outputs alone. Norms are one kernel each way. Everything else (the attention of prefill, other
attention implementations, layers whose inner modules have hooks) runs transformers' own forward, so what `generate` and
`loss.backward()` mean does not change. Norms, and attention in decoding, are computed in float32 and rounded once,
which is never less exact.

Reversible: `handle.remove()` puts the classes back. Parameters, buffers, state dicts and adapters are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import (
    PreparedCall,
    Projection,
    QuantWeight,
    lora_linear,
    lora_linear_stacked,
    native_library,
    rms_norm,
    rotary_attention,
    swiglu,
    swiglu_mlp,
    use_huge_pages,
)

from ..layer.by_row import train as trained_rows
from ..layer.layer import AdapterLayer
from ..methods.fused import FusedProjection
from ..weights.base import is_listened_to
from ..weights.bnb import quant_view
from ..weights.nf4_linear import NF4Linear

_ACCELERATED = "_fastpeft_accelerated"
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


def _projection(module: Any, dtype: torch.dtype) -> Projection | None:
    """A linear layer as the kernels take it, for x of `dtype`; None where it has to be called as a module: adapters
    other than a single plain LoRA, hooks, a base that is computed in another dtype, weights that train. Layers of PEFT
    that `fastpeft.patch` took over and Linear4bit of bitsandbytes are such layers too.
    """
    if is_listened_to(module):
        return None
    if type(module) is NF4Linear:
        given = module.compute_dtype in (None, dtype)
        return Projection(module.quant_weight(), bias=module.bias) if given else None
    layer = _adapter_layer(module)
    if layer is None:
        weight = quant_view(module) if getattr(module, "compute_dtype", dtype) in (None, dtype) else None
        return None if weight is None else Projection(weight, bias=module.bias)
    # the plan is made here where it is not there yet: a first call must compute what the second will (checkpointing)
    plan = layer.plan()
    return plan.projection() if isinstance(plan, FusedProjection) and plan.compute in (None, dtype) else None


def _adapter_layer(module: Any) -> AdapterLayer | None:
    """The layer that computes a module with adapters: itself, or what `fastpeft.patch` gave to one of PEFT's."""
    if type(module) is AdapterLayer:
        return module
    find = getattr(type(module), "fastpeft_layer", None)
    return None if find is None else find(module)  # type: ignore[no-any-return]


def _projections(x: Tensor, *modules: Any) -> list[Projection] | None:
    """Those of all modules, or None."""
    if torch.compiler.is_compiling():  # a graph sees the modules
        return None
    found = []
    for module in modules:
        projection = _projection(module, x.dtype)
        if projection is None:
            return None
        found.append(projection)
    return found


def _modules_on(x: Tensor, *modules: Any) -> Sequence[Tensor]:
    """`module(x)` of each; adapters by row in training are one node of the graph."""
    if all(type(module) is AdapterLayer and not is_listened_to(module) for module in modules):
        together = trained_rows.linears(x, modules)
        if together is not None:
            return together
    return [module(x) for module in modules]


def _by_row(x: Tensor, modules: Sequence[Any]) -> Sequence[Tensor] | None:
    """`module(x)` of layers whose rows have adapters of their own, where each is one call of a kernel; else None."""
    found = []
    for module in modules:
        routed = module.rows.by_name() if type(module) is AdapterLayer and not is_listened_to(module) else None
        y = None if routed is None else routed.quick(x)
        if y is None:
            return None
        found.append(y)
    return found


def _linears(call: PreparedCall, x: Tensor, *modules: Any) -> Sequence[Tensor]:
    """`module(x)` of each for x [M, K] without gradients, as one call of a kernel and without the modules around it."""
    by_row = _by_row(x, modules)
    if by_row is not None:
        return by_row
    found = _projections(x, *modules)
    if found is None or any(p.dropout_p or type(p.weight) is not QuantWeight for p in found):
        return [module(x) for module in modules]
    ys: Sequence[Tensor] = call(x, *found)
    return ys


def _one_token(
    layer: Any, x: Tensor, mask: Tensor | None, cache: Any, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """A decoder layer for x [B, 1, H] with `cache` holding the tokens before; x [B, 1, H] out."""
    attention, mlp, own = layer.self_attn, layer.mlp, layer._fastpeft_decoding
    d = attention.head_dim
    batch = x.shape[0]
    x = x.view(batch, -1)
    h = _norm(layer.input_layernorm, x)
    q, k, v = _linears(own.qkv, h, attention.q_proj, attention.k_proj, attention.v_proj)
    heads = q.shape[-1] // d
    cos, signed_sin = own.signs.get(*position_embeddings)
    qk = torch.cat((q, k), dim=-1).view(batch, -1, 1, d)
    qk = torch.addcmul(qk * cos, torch.roll(qk, d // 2, dims=-1), signed_sin)
    keys, values = cache.update(qk[:, heads:], v.view(batch, -1, 1, d), attention.layer_idx)
    out = F.scaled_dot_product_attention(
        # torch's bfloat16 attention on a CPU takes five times the float32 one at one query
        qk[:, :heads].float(), keys.float(), values.float(), attn_mask=mask, scale=attention.scaling,
        enable_gqa=keys.shape[1] != heads,
    )  # fmt: skip
    x = x + _linears(own.o, out.to(x.dtype).view(batch, -1), attention.o_proj)[0]
    h = _norm(layer.post_attention_layernorm, x)
    gate, up = _linears(own.gate_up, h, mlp.gate_proj, mlp.up_proj)
    return (x + _linears(own.down, F.silu(gate).mul_(up), mlp.down_proj)[0]).unsqueeze(1)


def _head_forward(self: Any, input: Tensor) -> Tensor:
    # `hidden[:, -1:]` is not contiguous: torch takes the matrix once a row then, in bfloat16 at 200 times the time
    input = input.contiguous()
    # torch reads a large matrix at half of the memory's speed when it meets one row, and copies it first in bfloat16
    if input.numel() > _HEAD_ROWS * self.in_features or torch.is_grad_enabled() or input.dtype is not self.weight.dtype:
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


def _members(forward: Any) -> dict[str, Any]:
    return {"forward": forward, _ACCELERATED: True, "__module__": __name__, "__reduce_ex__": _reduce}


_FastHead = type("_FastHead", (nn.Linear,), _members(_head_forward))


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """Where a layer keeps keys and values: `cache` since transformers 5.24, `past_key_values` before."""
    found = kwargs.get("past_key_values")
    return kwargs.get("cache") if found is None else found


def _serves(layer: Any, x: Tensor, cache: Any, position_embeddings: Any, kwargs: dict[str, Any]) -> bool:
    if x.shape[1] != 1 or cache is None or position_embeddings is None or layer.training or torch.is_grad_enabled():
        return False
    if "read_index" in kwargs:  # continuous batching: a row is not a sequence
        return False
    if x.device.type != "cpu" or kwargs.get("output_attentions"):
        return False
    attention = layer.self_attn
    if attention.config._attn_implementation not in ("sdpa", "eager") or attention.config.hidden_act != "silu":
        return False
    return not any(map(is_listened_to, (attention, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)))


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    x, weight = hidden_states, self.weight
    plain = x.device.type == "cpu" and x.dtype is weight.dtype and x.dtype is not torch.float64
    if plain and not weight.requires_grad and not torch.compiler.is_compiling():  # a graph has its own fusions
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
    if (
        not torch.is_grad_enabled() or _cache_of(kwargs) is not None or position_embeddings is None
        or hidden_states.dtype is torch.float64 or hidden_states.device.type != "cpu"
        or self.config._attn_implementation != "sdpa" or (self.training and self.attention_dropout)
        or (attention_mask is not None and attention_mask.dtype is not torch.bool)
        # eager code would keep every score
        or (batch * self.config.num_attention_heads * t * t > MOST_SCORES and native_library().reason is not None)
    ):  # fmt: skip
        result: tuple[Tensor, Tensor | None] = self._fastpeft_base.forward(
            self, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
        )
        return result
    layers = (self.q_proj, self.k_proj, self.v_proj)
    found = _projections(hidden_states, *layers)
    qkv = self._fastpeft_decoding.qkv
    ys = _modules_on(hidden_states, *layers) if found is None else qkv(hidden_states, *found)
    q, k, v = (y.view(batch, t, -1, self.head_dim) for y in ys)
    # no mask means causal, as transformers' sdpa has it
    keep = None if attention_mask is None else attention_mask[:, 0]
    out = rotary_attention(q, k, v, *position_embeddings, keep, scale=self.scaling)
    return _modules_on(out.view(batch, t, -1), self.o_proj)[0], None


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    if x.device.type == "cpu" and self.config.hidden_act == "silu" and not is_listened_to(self.act_fn):
        found = _projections(x, self.gate_proj, self.up_proj, self.down_proj)
        if found is not None:
            return swiglu_mlp(x, *found)
        if torch.is_grad_enabled():
            gate, up = _modules_on(x, self.gate_proj, self.up_proj)
            y: Tensor = _modules_on(swiglu(gate, up), self.down_proj)[0]
            return y
    result: Tensor = self._fastpeft_base.forward(self, x)
    return result


def _plain_subclass(base: type, forward: Any) -> type:
    return type(f"Fast{base.__name__}", (base,), {**_members(forward), "_fastpeft_base": base})


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
        kept = _cache_of(kwargs)
        if position_embeddings is not None and _serves(self, hidden_states, kept, position_embeddings, kwargs):
            mask = attention_mask
            if mask is not None and mask.dtype is not torch.bool:
                mask = mask.float()
            return _one_token(self, hidden_states, mask, kept, position_embeddings)
        result: Tensor = base.forward(  # type: ignore[attr-defined]
            self, hidden_states, attention_mask=attention_mask, position_ids=position_ids,
            position_embeddings=position_embeddings, **kwargs,
        )  # fmt: skip
        return result

    return type(f"Fast{base.__name__}", (base,), _members(forward))


@cache
def _classes() -> dict[type, type]:
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

    return {
        LlamaDecoderLayer: _layer_subclass(LlamaDecoderLayer),
        LlamaAttention: _plain_subclass(LlamaAttention, _attention_forward),
        LlamaMLP: _plain_subclass(LlamaMLP, _mlp_forward),
        LlamaRMSNorm: _plain_subclass(LlamaRMSNorm, _norm_forward),
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


def switch_back(module: nn.Module) -> None:
    """Give such a module its own class again."""
    module.__class__ = type(module).__bases__[0]
    module.__dict__.pop("_fastpeft_decoding", None)


def accelerate(model: nn.Module, huge_pages: bool = True) -> Accelerated:
    """Speed up decoding and training of a Llama model of transformers (also inside a PeftModel) on a CPU, in place.

    huge_pages: put its weights into huge pages of memory where the system has them (`use_huge_pages`).
    Raises ValueError when the model has no decoder layer of a class that is known here.
    """
    handle = Accelerated()
    signs = _RotarySigns()
    classes = _classes()
    for module in model.modules():
        own = type(module)
        if own in classes:
            module.__dict__["_fastpeft_decoding"] = _Decoding(signs)
            module.__class__ = classes[own]
            handle.switched.append(module)
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if handle.switched and type(head) is nn.Linear and head.weight.device.type == "cpu":
        handle.switched.append(head)
        head.__class__ = _FastHead
    if not handle.switched and not any(map(is_switched, model.modules())):
        raise ValueError(f"{type(model).__name__}: no decoder layer of Llama, nothing to accelerate")
    if huge_pages:
        use_huge_pages((*model.parameters(), *model.buffers()))
    return handle
