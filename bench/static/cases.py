"""Which launches are compiled: one for every row of `peft_kernels/tuned/`, and a few for what the rows do not name.

A case says what a user calls; the op's own host side turns it into launches (`triton_lib.host.compile_only`), so what
is compiled is what would run. Where a case stands for a row, that row is forced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

from peft_kernels import tuning
from peft_kernels.triton_lib import toolchain

from .calls import CALLS, ROWS, Case, bf16, f16, f32

MOST = 48  # specialisations of an architecture that CI compiles


def unavailable() -> str | None:
    """Why nothing can be compiled here."""
    from peft_kernels.triton_lib import host

    if find_spec("triton") is None:
        return "triton is not installed"
    return "TRITON_INTERPRET is set: Triton cannot compile in this process" if host.interpreting() else None


EXTRA = (
    Case("decode", M=4096), Case("reduce", M=1), Case("dequantize"), Case("quantize"), Case("absmax"),
    *(Case(kernel, M=8) for kernel in ("shrink", "expand")),
    Case("dora_forward", p=0.0), Case("gain", M=1), Case("drop"), Case("scale"),
    *map(Case, ("reflect", "pairs", "pairs_gradient")), *(Case(k, dtype=f32) for k in ("cayley", "cayley_backward")),
    *(Case(kernel, N=28672, K=4096) for kernel in ("stacked_forward", "stacked_backward")),
    Case("weigh"), Case("grouped", M=4096),
    Case("plan"), Case("multi_project", M=64, p=0.0), Case("multi_forward", M=64), Case("multi_outer", ds=True),
    Case("multi_backward", N=2048, K=2048, r=64, dtype=f16, p=0.0, blocksize=32),
    *(Case(kernel, N=14336) for kernel in ("gated", "gated_backward", "rms_norm", "rms_norm_backward")),
    Case("layer_norm_sums", N=4096),
    *(Case(kernel, N=64) for kernel in ("attention_queries", "attention_keys")),
)  # fmt: skip
# What differs little from these: where the limit leaves room, and in the whole report.
MORE = (
    *(Case(kernel, dtype=f16) for kernel in ("rotate", "reflect_gradient", "multi_outer")), Case("attention", N=64),
    *(Case(kernel, r=64, dtype=f16) for kernel in ("multi_forward", "multi_backward", "reflect", "reflect_gradient")),
    *(Case(kernel, N=128) for kernel in ("attention_queries", "attention_keys")), Case("dora_norm", r=64),
    *(Case(kernel, dtype=f32) for kernel in ("attention_queries", "attention_keys")),
    *(Case(f"attention{kernel}_dropout", N=128) for kernel in ("", "_queries", "_keys")),
    Case("forward", M=128, r=64, dtype=f16, p=0.0, dense=True),
    *(Case(kernel, r=64, dtype=f16, p=0.0) for kernel in ("forward", "backward", "project", "outer")),
    Case("outer", r=64, dtype=f16, p=0.0, ds=True), Case("backward", M=128, dense=True),
    Case("forward", M=128, dense=True), Case("squares"), Case("multi_forward", M=16),
    Case("backward", N=2048, K=2048, r=64, dtype=f16, p=0.0, blocksize=32), Case("multi_backward"),
    Case("multi_outer"), *(Case(f"mixture_{part}") for part in ("forward", "project", "outer", "backward")),
    *(Case(kernel, N=4096) for kernel in ("layer_norm", "layer_norm_backward")),
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
    return tuning._row_config((data := tuning.table(arch))["kernels"][kernel][number], data["programs"])


def cases(capability: int) -> list[Case]:
    """Every case of an architecture under the compilers that are here, what CI may leave out last.

    The core is what a launch takes without a search, but for tiles between a smaller and a larger one and small ones of
    the backward, and the largest of the large products, which have a budget of their own. Then come the backward for
    odd sizes, the products for float32, the tiles between, `MORE`, and last what else only a search may choose."""
    arch = tuning.nearest(capability)
    ranked: list[tuple[int, Case]] = []
    for kernel, rows in tuning.table(arch)["kernels"].items():
        if kernel not in CALLS:
            raise KeyError(f"tuned/{arch}.json has {kernel}: add the call that launches it to {__name__}.CALLS")
        found = []
        for number, row in enumerate(rows):
            if not tuning.compiles(row, toolchain.of(arch)):
                continue  # another stands for it
            case = _of_row(kernel, arch, number, row)
            if case is None:
                raise ValueError(f"tuned/{arch}.json, {kernel}, row {number}: no shape is served by it: {row}")
            found.append((row["BM"], case))
        for size, case in found:
            first = [s for s, c in found if c.first and (c.dtype, c.K) == (case.dtype, case.K)]
            # of project and outer the plain case stands for these
            odd = kernel in ("project", "outer") and (case.dtype is not bf16 or (kernel == "project" and case.M < ROWS))
            if not case.first:
                rank = 0 if kernel in ("forward", "backward") and size > max(first) else 4
            elif kernel == "turned":
                rank = 0 if size == min(first) else 1
            elif size < max(first) and (kernel == "backward" or size > min(first)):
                rank = 2
            else:
                # of float32 there is one kernel that works in it alone, the norm
                late = case.dtype is not bf16 if kernel == "backward" else case.dtype is f32 and kernel != "dora_norm"
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
