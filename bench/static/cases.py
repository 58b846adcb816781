"""Which launches are compiled: one for every row of `peft_kernels/tuned/`, and a few for what the rows do not name.

A case says what a user calls; the op's own host side turns it into launches (`triton_lib.host.compile_only`), so what
is compiled is what would run. Where a case stands for a row, that row is forced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.testing import random_quant_weight

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
_SHORT = {f32: "f32", f16: "f16", bf16: "bf16"}
ADAPTERS = 64  # in the stack of a case of multi_lora_linear
ROWS = 1024  # of x where a tuned row sets no limit; `run` has the vendor's matmul take over at twice as many
MOST = 40  # specialisations of an architecture that CI compiles


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
        drop = "" if self.p else " p=0"
        return f"{self.M} {self.K}x{self.N} r{self.r} {_SHORT[self.dtype]}{kind}{drop}"


def unavailable() -> str | None:
    """Why nothing can be compiled here."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from peft_kernels.triton_lib import host

    return "TRITON_INTERPRET is set: Triton cannot compile in this process" if host.interpreting() else None


def meta(*shape: int, dtype: torch.dtype = f32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@cache
def _packed(n: int, k: int, blocksize: int) -> tuple[Any, ...]:
    return tuple(random_quant_weight(n, k, blocksize=blocksize, nested=True).to("meta").flatten())


def _weight(c: Case) -> tuple[Any, ...]:
    if c.dense:
        return meta(c.N, c.K, dtype=c.dtype), None, None, None, None, 0, 64, 256
    return _packed(c.N, c.K, c.blocksize)


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


def _swiglu(c: Case) -> None:
    from peft_kernels.ops.swiglu import triton as backend

    gate, up, dh = (meta(c.M, c.N, dtype=c.dtype) for _ in range(3))
    backend.forward(gate, up)
    backend.backward(gate, up, dh)


def _rms_norm(c: Case) -> None:
    from peft_kernels.ops.rms_norm import triton as backend

    x, dy, weight = meta(c.M, c.N, dtype=c.dtype), meta(c.M, c.N, dtype=c.dtype), meta(c.N, dtype=c.dtype)
    backend.forward(x, weight, 1e-5)
    backend.backward(dy, x, weight, 1e-5)


def _attention(c: Case) -> None:
    """K / 64 heads of a row of M tokens, a quarter of them of keys."""
    from peft_kernels.ops.rotary_attention import triton as backend

    heads = c.K // 64
    q, k, angles = (meta(1, c.M, h, 64, dtype=c.dtype) for h in (heads, heads // 4, 1))
    backend.forward(q, k, k, angles[:, :, 0], angles[:, :, 0], None, 0.125)
    backend.backward(q, q, k, k, angles[:, :, 0], angles[:, :, 0], None, meta(1, heads, c.M), 0.125)


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
    "dora_forward": ("lora_linear", "forward_kernel", _dora_forward),
    "gain": ("lora_linear", "gain_kernel", _dora_forward),
    "drop": ("dora_linear", "drop_kernel", _dora_forward),
    "scale": ("dora_linear", "scale_kernel", _dora_backward),
    "dora_norm": ("dora_norm", "norm_kernel", _norm),
    "squares": ("dora_norm", "norm_kernel", _squares),
    "rms_norm": ("rms_norm", "rms_norm_kernel", _rms_norm),
    "rms_norm_backward": ("rms_norm", "rms_norm_backward_kernel", _rms_norm),
    "attention": ("rotary_attention", "forward_kernel", _attention),
    "attention_queries": ("rotary_attention", "queries_kernel", _attention),
    "attention_keys": ("rotary_attention", "keys_kernel", _attention),
    "swiglu": ("swiglu", "forward_kernel", _swiglu),
    "swiglu_backward": ("swiglu", "backward_kernel", _swiglu),
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
EXTRA = (
    Case("decode", M=4096), Case("reduce", M=1), Case("dequantize"), Case("quantize"), Case("absmax"),
    Case("dora_forward", p=0.0), Case("gain", M=1), Case("drop"), Case("scale"),
    *(Case(kernel) for kernel in ("rotate", "rotate_gradient", "reflect", "reflect_gradient")),
    *(Case(kernel) for kernel in ("pairs", "pairs_gradient")),
    *(Case(kernel, dtype=f32) for kernel in ("cayley", "cayley_backward")),
    *(Case(kernel, N=28672, K=4096) for kernel in ("stacked_forward", "stacked_backward")),
    Case("plan"), Case("multi_project", M=64, p=0.0), Case("multi_forward", M=64), Case("multi_outer", ds=True),
    Case("multi_backward", N=2048, K=2048, r=64, dtype=f16, p=0.0, blocksize=32),
    *(Case(kernel, N=14336) for kernel in ("swiglu", "swiglu_backward", "rms_norm", "rms_norm_backward")),
    *(Case(kernel) for kernel in ("attention", "attention_queries", "attention_keys")),
)  # fmt: skip
# What differs little from the above: where the limit leaves room, and in the whole report.
MORE = (
    *(Case(kernel, r=64) for kernel in ("reflect", "reflect_gradient")),
    Case("forward", M=128, r=64, dtype=f16, p=0.0, dense=True),
    *(Case(kernel, r=64, dtype=f16, p=0.0) for kernel in ("forward", "backward", "project", "outer")),
    Case("outer", r=64, dtype=f16, p=0.0, ds=True), Case("backward", M=128, dense=True),
    Case("forward", M=128, dense=True), Case("squares"), Case("multi_forward", M=16), Case("multi_forward"),
    Case("backward", N=2048, K=2048, r=64, dtype=f16, p=0.0, blocksize=32), Case("multi_backward"),
    Case("multi_outer"),
)  # fmt: skip
UNALIGNED = {"forward": 1056}  # features of each kernel's case: blocks straddle the rows; odd numbers elsewhere


def _of_row(kernel: str, arch: str, number: int, row: dict[str, Any]) -> Case | None:
    """A case that `row` serves; its first where there are several."""
    plain, bits = row.get("plain", True), row["bits"]
    width = 4096 if plain else UNALIGNED.get(kernel, 1001)
    n, k = (min(width, row.get(limit, width)) for limit in ("max_N", "max_K"))
    dtype = f32 if bits == 32 else bf16 if plain else f16
    case = Case(kernel, min(ROWS, row.get("max_M", ROWS)), n, k, min(16, row.get("max_r", 16)), dtype,
                blocksize=max(64, row.get("min_blocksize", 64)), row=number)  # fmt: skip
    served = tuning.rows(kernel, arch, tuning.Shape(case.M, n, k, case.r, bits, plain, case.blocksize))
    config = config_of(kernel, arch, number)
    return replace(case, first=served[0] == config) if config in served else None


def config_of(kernel: str, arch: str, number: int) -> tuning.Config:
    """The configuration of a row."""
    data = tuning.table(arch)
    return tuning._row_config(data["kernels"][kernel][number], data["programs"])


def cases(capability: int) -> list[Case]:
    """Every case of an architecture, what CI may leave out last.

    The core is what a launch takes without a search, but for tiles between a smaller and a larger one and small ones of
    the backward, and the largest tiles of the large products, which have a budget of their own. Then come the backward
    for odd sizes, the products for float32, the tiles between, `MORE`, and last what else only a search may choose.
    """
    arch = tuning.nearest(capability)
    ranked: list[tuple[int, Case]] = []
    for kernel, rows in tuning.table(arch)["kernels"].items():
        if kernel not in CALLS:
            raise KeyError(f"tuned/{arch}.json has {kernel}: add the call that launches it to {__name__}.CALLS")
        found = []
        for number, row in enumerate(rows):
            case = _of_row(kernel, arch, number, row)
            if case is None:
                raise ValueError(f"tuned/{arch}.json, {kernel}, row {number}: no shape is served by it: {row}")
            found.append((row["BM"], case))
        for size, case in found:
            first = [s for s, c in found if c.first and (c.dtype, c.K) == (case.dtype, case.K)]
            # of project and outer the plain case stands for these
            odd = kernel in ("project", "outer") and (case.dtype is not bf16 or (kernel == "project" and case.M < ROWS))
            if not case.first:
                rank = 0 if kernel == "forward" and size > max(first) else 4
            elif kernel == "turned":
                rank = 0 if size == min(first) else 1
            elif size < max(first) and (kernel == "backward" or size > min(first)):
                rank = 2
            else:
                late = case.dtype is not bf16 if kernel == "backward" else kernel == "forward" and case.dtype is f32
                rank = 1 if late else 3 if odd else 0
            if kernel != "outer":
                ranked.append((rank, case))
            else:  # of both launches of a row the one that does more is core, of those for other types one
                ranked += [(max(rank, 0 if case.dtype is of else 3), replace(case, ds=ds))
                           for ds, of in ((False, f32), (True, bf16 if case.dtype is bf16 else f16))]  # fmt: skip
    ranked += [(0, case) for case in EXTRA] + [(3, case) for case in MORE]
    return [replace(case, core=rank == 0) for rank, case in sorted(ranked, key=lambda pair: pair[0])]


@contextlib.contextmanager
def forced(case: Case, capability: int) -> Iterator[None]:
    """Within, the case's launches use its row."""
    if case.row is None:
        yield
        return
    values = asdict(config_of(case.kernel, tuning.nearest(capability), case.row))
    with tuning.override(case.kernel, **values):
        yield


def run(case: Case, capability: int) -> list[Any]:
    """The launches of the case's kernel, compiled for sm_<capability>."""
    from peft_kernels.triton_lib import host

    _, kernel, call = CALLS[case.kernel]

    def wanted(name: str, options: dict[str, Any]) -> bool:
        return name == kernel and options.get("WITH_DS", False) == case.ds

    whole = tuning.override("panels", from_M=2 * ROWS, from_M_backward=2 * ROWS)
    with host.compile_only(capability, wanted) as compiled, forced(case, capability), whole:
        call(case)
    if not compiled:
        raise RuntimeError(f"{case.kernel} ({case.title}, sm_{capability}): the call did not launch it")
    return list(compiled)
