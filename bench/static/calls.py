"""Calls, as a user makes them, of which launches are compiled: `CALLS`, by the kernel's name in the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from peft_kernels.testing import random_quant_weight

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
_SHORT = {f32: "f32", f16: "f16", bf16: "bf16"}
ADAPTERS = 64  # in the stack of a case of multi_lora_linear, slots of lora_shrink
MIXED = 8  # adapters of lora_mixture
ROWS = 1024  # of x where a tuned row sets no limit; `cases.run` has panels begin at twice as many


@dataclass(frozen=True)
class Case:
    """kernel: its name in `CALLS`; row: of that kernel in the tuned table, None where nothing is forced.
    first: without a search, a launch would take this row. core: CI compiles it whatever else there is. p: dropout.
    ds: of outer's two launches the one that gives ds, too. Adapters are float32, as PEFT keeps them for training, in
    multi_forward x's type, as in a pool."""

    kernel: str
    M: int = ROWS
    N: int = 4096
    K: int = 4096
    r: int = 16
    dtype: torch.dtype = bf16
    p: float = 0.05
    dense: bool = False
    blocksize: int = 64
    quant_type: str = "nf4"
    ds: bool = False
    row: int | None = None
    first: bool = True
    core: bool = True

    @property
    def op(self) -> str:
        return CALLS[self.kernel][0]

    @property
    def title(self) -> str:
        kind = " dense" if self.dense else "" if self.blocksize == 64 else f" blocks of {self.blocksize}"
        kind += "" if self.quant_type == "nf4" else f" {self.quant_type}"
        drop = "" if self.p else " p=0"
        return f"{self.M} {self.K}x{self.N} r{self.r} {_SHORT[self.dtype]}{kind}{drop}"


def meta(*shape: int, dtype: torch.dtype = f32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@cache
def _packed(n: int, k: int, blocksize: int, quant_type: str = "nf4") -> tuple[Any, ...]:
    w = random_quant_weight(n, k, quant_type=quant_type, blocksize=blocksize, nested=True)
    return tuple(w.to("meta").flatten())


def _weight(c: Case) -> tuple[Any, ...]:
    if c.dense:
        return meta(c.N, c.K, dtype=c.dtype), None, None, None, None, 0, 64, 256
    return _packed(c.N, c.K, c.blocksize, c.quant_type)


def _forward(c: Case) -> None:
    from peft_kernels.ops.lora_linear import triton as backend

    seed, bias = meta(1, dtype=torch.int64), meta(c.N, dtype=c.dtype)
    backend.forward(meta(c.M, c.K, dtype=c.dtype), *_weight(c), c.N, meta(c.r, c.K), meta(c.N, c.r), 2.0, bias, c.p,
                    seed)  # fmt: skip


def _backward(c: Case) -> None:
    from peft_kernels.ops.lora_linear import triton as backend

    x, dy, seed = meta(c.M, c.K, dtype=c.dtype), meta(c.M, c.N, dtype=c.dtype), meta(1, dtype=torch.int64)
    backend.backward(dy, x, *_weight(c), meta(c.r, c.K), meta(c.N, c.r), meta(c.M, c.r), 2.0, c.p, seed, True, True)


def _dequantize(c: Case) -> None:
    from peft_kernels.ops.dequantize_4bit.triton import dequantize_4bit

    dequantize_4bit(*_weight(c), [c.N, c.K], c.dtype)


def _quantize(c: Case) -> None:
    from peft_kernels.ops.quantize_4bit.triton import quantize_4bit

    quantize_4bit(meta(c.N, c.K, dtype=c.dtype), 1, c.blocksize, True, 256)


def _stack(c: Case) -> list[list[Any]]:
    """Two projections like c, as gate and up, in the operator's lists."""
    n = c.N // 2
    seed, bias = meta(1, dtype=torch.int64), meta(n, dtype=c.dtype)
    one = (*_packed(n, c.K, c.blocksize), n, meta(c.r, c.K), meta(n, c.r), 2.0, bias, c.p, seed)
    return [[v, v] for v in one]


def _stacked_forward(c: Case) -> None:
    from peft_kernels.ops.lora_linear_stacked import triton as backend

    backend.forward(meta(c.M, c.K, dtype=c.dtype), *_stack(c))


def _stacked_backward(c: Case) -> None:
    from peft_kernels.ops.lora_linear_stacked import triton as backend

    lists = _stack(c)
    weights, a, b, scaling, p, seed = lists[:8], lists[9], lists[10], lists[11], lists[13], lists[14]
    dys, ss = ([meta(c.M, width, dtype=t) for _ in a] for width, t in ((c.N // 2, c.dtype), (c.r, f32)))
    backend.backward(meta(c.M, c.K, dtype=c.dtype), dys, *weights, a, b, ss, scaling, p, seed, True, [True, True])


def _adapters(c: Case, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    """(a, b) of a stack of `ADAPTERS` like c's, and what says where they are and which row has which."""
    i64, p = torch.int64, ADAPTERS * c.r
    plan = [meta(c.M, dtype=i64), meta(ADAPTERS, dtype=i64), meta(ADAPTERS, dtype=i64), meta(ADAPTERS), c.r]
    return [meta(p, c.K, dtype=dtype), meta(p, c.N, dtype=dtype)], plan


def _multi_forward(c: Case) -> None:
    from peft_kernels.ops.multi_lora_linear import triton as backend

    ab, plan = _adapters(c, c.dtype)
    seed, bias = meta(1, dtype=torch.int64), meta(c.N, dtype=c.dtype)
    backend.forward(meta(c.M, c.K, dtype=c.dtype), *_weight(c), c.N, *ab, *plan, bias, c.p, seed)


def _multi_backward(c: Case) -> None:
    from peft_kernels.ops.multi_lora_linear import triton as backend

    ab, plan = _adapters(c, f32)
    x, dy, seed = meta(c.M, c.K, dtype=c.dtype), meta(c.M, c.N, dtype=c.dtype), meta(1, dtype=torch.int64)
    backend.backward(dy, x, *_weight(c), *ab, meta(c.M, c.r), *plan, c.p, seed, True, True)


def _mixture(c: Case) -> list[Any]:
    """a, b and weights of `MIXED` adapters like c's."""
    return [meta(MIXED, c.r, c.K), meta(c.N, MIXED, c.r), meta(c.M, MIXED)]


def _mixture_forward(c: Case) -> None:
    from peft_kernels.ops.lora_mixture import triton as backend

    seed, bias = meta(1, dtype=torch.int64), meta(c.N, dtype=c.dtype)
    backend.forward(meta(c.M, c.K, dtype=c.dtype), *_weight(c), c.N, *_mixture(c), True, bias, c.p, seed)


def _mixture_backward(c: Case) -> None:
    from peft_kernels.ops.lora_mixture import triton as backend

    (a, b, mix), seed = _mixture(c), meta(1, dtype=torch.int64)
    x, dy = meta(c.M, c.K, dtype=c.dtype), meta(c.M, c.N, dtype=c.dtype)
    backend.backward(dy, x, *_weight(c), a, b, meta(c.M, MIXED, c.r), mix, True, c.p, seed, True, True, True)


def _grouped(c: Case) -> list[Any]:
    """`ADAPTERS` groups of rows with a weight and an adapter like c's each."""
    if c.dense:
        weight = [meta(ADAPTERS, c.N, c.K, dtype=c.dtype), None, None, None, None, 0, 64, 256]
    else:
        weight = [*_packed(ADAPTERS * c.N, c.K, c.blocksize)]
    return [*weight, meta(ADAPTERS + 1, dtype=torch.int64)]


def _grouped_forward(c: Case) -> None:
    from peft_kernels.ops.grouped_linear import triton as backend

    backend.forward(meta(c.M, c.K, dtype=c.dtype), *_grouped(c), c.N, meta(ADAPTERS, c.r, c.K),
                    meta(ADAPTERS, c.N, c.r), 1.0, meta(ADAPTERS, c.N, dtype=c.dtype))  # fmt: skip


def _update(c: Case) -> None:
    """q, k and v of a layer, each with an update of its own; x's type is the adapters'."""
    from peft_kernels.ops.lora_shrink import triton as backend

    groups = [meta(c.M, dtype=torch.int64), meta(c.M, dtype=torch.int32), meta(ADAPTERS + 2, dtype=torch.int32)]
    widths, parts = [c.N, c.N // 4, c.N // 4], 8 if c.M < 64 else 1
    a, b = ([meta(ADAPTERS, *shape, dtype=c.dtype) for shape in shapes] for shapes in (
        [(c.r, c.K)] * 3, [(n, c.r) for n in widths]
    ))  # fmt: skip
    s = backend.shrink(meta(c.M, c.K, dtype=c.dtype), a, *groups, 1.0, parts)
    backend.expand(meta(c.M, sum(widths), dtype=c.dtype), [*s], b, *groups, [0, c.N, c.N + widths[1]], True)


def _gated(c: Case) -> None:
    from peft_kernels.ops.gated import triton as backend

    gate, up, dh = (meta(c.M, c.N, dtype=c.dtype) for _ in range(3))
    backend.forward(gate, up, 0, 1.0, 0.0, 0.0)
    backend.backward(gate, up, dh, 0, 1.0, 0.0, 0.0, 0)


def _of_rows(c: Case, name: str, *args: Any) -> None:
    from peft_kernels.ops.norms.triton import BACKENDS

    x, dy, weight = meta(c.M, c.N, dtype=c.dtype), meta(c.M, c.N, dtype=c.dtype), meta(c.N, dtype=c.dtype)
    BACKENDS[name].fn(x, weight, *args)
    BACKENDS[f"{name}_backward"].fn(dy, x, weight, *(a for a in args if a is not None), True, name == "layer_norm")


def _rms_norm(c: Case) -> None:
    _of_rows(c, "rms_norm", 1e-5, 0.0)


def _layer_norm(c: Case) -> None:
    """With its weight trained."""
    _of_rows(c, "layer_norm", None, 1e-5)


def _attention(c: Case, p: float = 0.0) -> None:
    """Heads of N features, of the widest where N is more, in a row of M tokens; a quarter of them of keys."""
    from peft_kernels.ops.attention import triton as backend

    d = min(c.N, backend.MOST)
    heads = c.K // d
    q, k = (meta(1, c.M, h, d, dtype=c.dtype) for h in (heads, heads // 4))
    options = (0.125, False, True, 0, 0.0, p, meta(1, dtype=torch.int64))
    backend.forward(q, k, k, *[None] * 7, *options)
    backend.backward(q, q, k, k, q, meta(1, heads, c.M), *[None] * 6, *options)


def _dropped_attention(c: Case) -> None:
    _attention(c, c.p)


def _dora_forward(c: Case) -> None:
    from peft_kernels.ops.dora_linear import triton as backend

    seed, bias = meta(1, dtype=torch.int64), meta(c.N, dtype=c.dtype)
    backend.forward(meta(c.M, c.K, dtype=c.dtype), *_weight(c), c.N, meta(c.r, c.K), meta(c.N, c.r), meta(c.N), 2.0,
                    bias, c.p, seed, True)  # fmt: skip


def _dora_backward(c: Case) -> None:
    from peft_kernels.ops.dora_linear import triton as backend

    x, dy, seed = meta(c.M, c.K, dtype=c.dtype), meta(c.M, c.N, dtype=c.dtype), meta(1, dtype=torch.int64)
    backend.backward(dy, x, *_weight(c), meta(c.r, c.K), meta(c.N, c.r), meta(c.N), dy, meta(c.M, c.r), 2.0, c.p, seed,
                     True, True, True)  # fmt: skip


def _norm(c: Case) -> None:
    from peft_kernels.ops.dora_norm import triton as backend

    backend.dora_norm(*_weight(c), meta(c.r, c.K), meta(c.N, c.r), 2.0, None)


def _squares(c: Case) -> None:
    from peft_kernels.ops.dora_norm import triton as backend

    backend.squared_row_norms(*_weight(c), c.N, c.K)


def _butterfly(c: Case) -> None:
    from peft_kernels.ops.butterfly_rotate import triton as backend

    x, blocks = meta(c.M, c.K, dtype=c.dtype), meta(1, c.K // 32, 32, 32)
    backend.backward(x, x, blocks, False, True, True)


def _turned(c: Case) -> None:
    from peft_kernels.ops.butterfly_linear import triton as backend

    x, blocks, bias = meta(c.M, c.K, dtype=c.dtype), meta(1, c.K // 32, 32, 32), meta(c.N, dtype=c.dtype)
    backend.forward(x, blocks, *_weight(c), c.N, None, bias, False)


def _cayley(c: Case) -> None:
    from peft_kernels.ops.cayley import triton as backend

    q = meta(c.K // 32, 32, 32)
    backend.forward(q, 0)
    backend.backward(q, q, q, 5)


def _householder(c: Case) -> None:
    from peft_kernels.ops.householder_rotate import triton as backend

    x, u = meta(c.M, c.K, dtype=c.dtype), meta(c.r, c.K)
    backend.backward(x, x, u, u, meta(c.M, c.r), True, True)


def _pairs(c: Case) -> None:
    from peft_kernels.ops.pair_rotate import triton as backend

    x, columns = meta(c.M, c.K, dtype=c.dtype), meta(c.K)
    backend.backward(x, x, columns, columns, 32, True, True)


# By the name in the report, which is also the one in tuned/: the op, its kernel, and a call that launches it. A kernel
# of tuned/, or of an op's triton_kernels.py, that is missing here is an error (tests/test_static.py).
CALLS: dict[str, tuple[str, str, Callable[[Case], None]]] = {
    "project": ("lora_linear", "project_kernel", _forward),
    "forward": ("lora_linear", "forward_kernel", _forward),
    "outer": ("lora_linear", "outer_kernel", _backward),
    "backward": ("lora_linear", "backward_kernel", _backward),
    "reduce": ("lora_linear", "reduce_kernel", _forward),
    "decode": ("lora_linear", "decode_kernel", _forward),
    "stacked_forward": ("lora_linear_stacked", "stacked_forward_kernel", _stacked_forward),
    "stacked_backward": ("lora_linear_stacked", "stacked_backward_kernel", _stacked_backward),
    "plan": ("multi_lora_linear", "plan_kernel", _multi_forward),
    "multi_project": ("multi_lora_linear", "multi_project_kernel", _multi_forward),
    "multi_forward": ("multi_lora_linear", "multi_forward_kernel", _multi_forward),
    "multi_outer": ("multi_lora_linear", "multi_outer_kernel", _multi_backward),
    "multi_backward": ("multi_lora_linear", "multi_backward_kernel", _multi_backward),
    "weigh": ("lora_mixture", "weigh_kernel", _mixture_forward),
    "mixture_project": ("lora_linear", "project_kernel", _mixture_forward),
    "mixture_forward": ("lora_linear", "forward_kernel", _mixture_forward),
    "mixture_outer": ("lora_linear", "outer_kernel", _mixture_backward),
    "mixture_backward": ("lora_linear", "backward_kernel", _mixture_backward),
    "grouped": ("grouped_linear", "product_kernel", _grouped_forward),
    "shrink": ("lora_shrink", "shrink_kernel", _update),
    "expand": ("lora_shrink", "expand_kernel", _update),
    "dora_forward": ("lora_linear", "forward_kernel", _dora_forward),
    "gain": ("lora_linear", "gain_kernel", _dora_forward),
    "drop": ("dora_linear", "drop_kernel", _dora_forward),
    "scale": ("dora_linear", "scale_kernel", _dora_backward),
    "dora_norm": ("dora_norm", "norm_kernel", _norm),
    "squares": ("dora_norm", "norm_kernel", _squares),
    "rms_norm": ("norms", "norm_kernel", _rms_norm),
    "rms_norm_backward": ("norms", "norm_backward_kernel", _rms_norm),
    "layer_norm": ("norms", "norm_kernel", _layer_norm),
    "layer_norm_backward": ("norms", "norm_backward_kernel", _layer_norm),
    "layer_norm_sums": ("norms", "sums_kernel", _layer_norm),
    "attention": ("attention", "forward_kernel", _attention),
    "attention_queries": ("attention", "queries_kernel", _attention),
    "attention_keys": ("attention", "keys_kernel", _attention),
    "attention_dropout": ("attention", "forward_kernel", _dropped_attention),
    "attention_queries_dropout": ("attention", "queries_kernel", _dropped_attention),
    "attention_keys_dropout": ("attention", "keys_kernel", _dropped_attention),
    "gated": ("gated", "forward_kernel", _gated),
    "gated_backward": ("gated", "backward_kernel", _gated),
    "turned": ("lora_linear", "forward_kernel", _turned),
    "rotate": ("butterfly_rotate", "rotate_kernel", _butterfly),
    "rotate_gradient": ("butterfly_rotate", "gradient_kernel", _butterfly),
    "cayley": ("cayley", "cayley_kernel", _cayley),
    "cayley_backward": ("cayley", "cayley_backward_kernel", _cayley),
    "reflect": ("householder_rotate", "update_kernel", _householder),
    "reflect_gradient": ("householder_rotate", "gradient_kernel", _householder),
    "pairs": ("pair_rotate", "pair_kernel", _pairs),
    "pairs_gradient": ("pair_rotate", "pair_gradient_kernel", _pairs),
    "dequantize": ("dequantize_4bit", "dequantize_kernel", _dequantize),
    "quantize": ("quantize_4bit", "quantize_kernel", _quantize),
    "absmax": ("quantize_4bit", "absmax_kernel", _quantize),
}
