"""One case: a sound call held against float64, or a hostile one, which must fail clearly or give the same as torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_kernels import BackendUnavailable, dispatch, native, use_backend
from peft_kernels.checks import in_memory
from peft_kernels.verdicts import promoted

from .draws import F64, Draw
from .hostile import spoil
from .memory import Guarded
from .operands import EXACT, MAKERS

# Terms of the size of the arguments may cancel in these: dropout under a gain, W + b a, the mean taken from a gradient.
CANCELLING = {"dora_linear", "dora_linear_normed", "rms_norm_backward", "layer_norm", "layer_norm_backward",
              "attention_backward"}
BY_INDEX = ("multi_lora", "lora_shrink", "lora_expand")
TOO_SMALL = 1e-23  # the product of a large value and of one that is lost as a subnormal
CLEAR = (ValueError, TypeError, RuntimeError)  # NativeError, BackendUnavailable and torch's own are RuntimeErrors


@dataclass
class Case:
    """A call of a raw operator. what: how it was made, for messages. hostile: it may be refused."""

    op: str
    args: list[Any]
    backend: str
    level: str
    hostile: str | None
    seed: int

    @property
    def what(self) -> str:
        spoilt = f", {self.hostile}" if self.hostile else ""
        return f"seed {self.seed}: {self.op} on {self.backend} at {self.level}{spoilt}: {describe(self.args)}"


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        strides = value.stride() if value.layout is torch.strided else value.layout
        return f"{kind}{[*value.shape]} by {strides} at {value.device.type}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(describe, value)) + "]"
    return str(value)


def make(seed: int, place: Guarded | None, backend: str = "native", only: tuple[str, ...] = ()) -> Case:
    """The case of a seed: which operator, with which operands."""
    d = Draw(seed, place)
    names = sorted(set(dispatch.ops()) & set(only or dispatch.ops()))
    op, hostile = d.one(names), d.maybe(0.35)
    level = d.one(native.levels()) if backend == "native" and native.available() is None else ""
    # Triton's kernels multiply by zeros where others leave out, so there a NaN may spread to what it has no part in
    d.calm = hostile or backend == "triton"
    args, spoilt = MAKERS[op](d), None
    if hostile:
        spoilt = spoil(d, op, args)
    return Case(op, args, backend, level, spoilt, seed)


def run(case: Case) -> str | None:
    """Run it: a text of a failure, or None."""
    op, kept = dispatch.ops()[case.op], snapshot(case.args)
    with torch.no_grad(), use_backend(**{case.op: case.backend}):
        if case.level:
            native.set_level(case.level)
        got = _outcome(op, op.op, case.args)
    if isinstance(got, BackendUnavailable):
        return None
    if not unchanged(kept):
        return "it wrote to its arguments"
    with torch.no_grad(), use_backend(**{case.op: "reference"}):
        eager = _outcome(op, op.op, case.args)
        if isinstance(got, BaseException) or isinstance(eager, BaseException):
            if case.backend == "triton" and isinstance(eager, ValueError) and case.op.startswith(BY_INDEX):
                return None  # a GPU does not look at indices
            return _both_refuse(got, eager, case.hostile)
        exact = eager if case.op in EXACT else _outcome(op, op.reference, promoted(op, case.args))
    if isinstance(exact, BaseException):
        return f"the reference in float64: {exact!r}"
    for i, (a, e, x) in enumerate(zip(flat(got), flat(eager), flat(exact), strict=True)):
        if case.op == "dora_linear_normed" and i == 3:  # the gain of an infinite norm, which may be NaN
            a, e, x = (t.masked_fill(~flat(eager)[4].isfinite(), 0.0) for t in (a, e, x))
        why = differs(a, e, x, case.op in EXACT, bool(case.hostile) or case.op in CANCELLING)
        if why:
            return f"result {i}: {why}"
    return None


def _outcome(op: dispatch.Op, fn: Any, args: list[Any]) -> Any:
    """The results, then what it wrote into arguments that are its to write to, which are put back; or an exception."""
    own = [args[i] for i in op.operands.written]
    kept = [(t, t.clone()) for t in own if isinstance(t, Tensor) and readable(t)]
    try:
        results = fn(*args)
        return results if not kept else [*(t.clone() for t, _ in kept), *([] if results is None else flat(results))]
    except Exception as e:
        return e
    finally:
        for t, before in kept:
            t.copy_(before)


def _both_refuse(got: Any, eager: Any, hostile: str | None) -> str | None:
    for name, e in (("the backend", got), ("the reference", eager)):
        if isinstance(e, Exception) and (not isinstance(e, CLEAR) or isinstance(e, NotImplementedError) or not str(e)):
            return f"{name} raised {e!r}"
    if not hostile:
        return f"a sound call was refused: {got if isinstance(got, Exception) else eager!r}"
    if isinstance(got, Exception) != isinstance(eager, Exception):
        return f"one refuses what the other takes: {got!r:.300}, the reference: {eager!r:.300}"
    return None


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [*results]


def snapshot(args: list[Any]) -> list[tuple[Tensor, Tensor]]:
    found = [t for value in args for t in (value if isinstance(value, list) else [value])]
    return [(t, t.clone()) for t in found if isinstance(t, Tensor) and readable(t)]


def readable(t: Tensor) -> bool:
    return t.layout is torch.strided and t.device.type == "cpu" and in_memory(t)


def bytes_of(t: Tensor) -> Tensor:
    return t.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def unchanged(kept: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(bytes_of(t), bytes_of(copy)) for t, copy in kept if t.numel())


def differs(
    actual: Tensor, eager: Tensor, exact: Tensor, bits: bool, roughly: bool = False, terms: float = 0.0
) -> str | None:
    """Why a result is wrong: where float64 and eager code in the same dtype have finite values, it is as near as eager
    code is, by the largest of them; where both have none, it has none. Subnormals may be lost. roughly: to 1 %, of
    arguments at which everything cancels. terms: of the sums behind them the largest, with all terms absolute."""
    if actual.shape != eager.shape or actual.dtype != eager.dtype:
        return f"{actual.dtype} {tuple(actual.shape)}, expected {eager.dtype} {tuple(eager.shape)}"
    if not actual.numel() or actual.is_meta:
        return None
    if bits:
        pair = [t.masked_fill(t.isnan(), float("nan")) if t.is_floating_point() else t for t in (actual, eager)]
        return None if torch.equal(*map(bytes_of, pair)) else "other bits"
    info = torch.finfo(actual.dtype)
    a, e, x = (t.to(F64) for t in (actual, eager, exact))
    x = x.masked_fill(x.abs() > info.max, float("inf"))
    none = ~x.isfinite() & ~e.isfinite()
    if (none & a.isfinite()).any():
        return f"finite where {x[none & a.isfinite()][0]} belongs"
    most = (0.5 if actual.dtype is torch.float16 else 1e-6) * info.max  # beyond, a part of a float32 sum may be more
    sure = x.isfinite() & e.isfinite() & (x.abs() < most)
    if not sure.any():
        return None
    x, e, a = x[sure], e[sure], a[sure]
    if not a.isfinite().all():
        return f"{a[~a.isfinite()][0]} where {x[~a.isfinite()][0]} belongs"
    allowed = 4 * (e - x).abs().max() + 256 * info.eps * max(float(x.abs().max()), terms)
    allowed = allowed + max(4 * info.tiny * info.eps, TOO_SMALL) + (1e-2 * (1 + x.abs().max()) if roughly else 0.0)
    error = (a - x).abs()
    if (error > allowed).any():
        i = int(error.argmax())
        return f"{a[i]:.8g}, eager {e[i]:.8g}, exact {x[i]:.8g}; allowed {allowed:.3g}"
    return None
