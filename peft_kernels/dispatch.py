"""Everything about choosing: `Op`, `Backend`, `use_backend`, `explain`.

torch sees one operator per `Op` (`torch.ops.peft_kernels.<name>`); which backend serves a call is decided inside it,
so a compiled graph neither breaks on the choice nor freezes it. Backends are tried in the order of `ORDER`; the
reference comes last and takes everything. A backend that was **forced** and cannot serve raises with its reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import verdicts
from .checks import PLAIN, Operands, arg_error, in_memory
from .formats import FORMATS, NUMBERS

NAMESPACE = "peft_kernels"
ENV = "PEFT_KERNELS_BACKEND"
ORDER = ("cuda", "triton", "native", "reference")
# which backends serve unasked where; others are not even imported, so that a CPU never pays for triton
_SERVING: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton"), "cpu": ("native",)}
FOUR_BIT = frozenset({0, 1, 2})  # numbers of formats: a dense weight, NF4, FP4
INT4 = FORMATS["int4"].number
ALL_FORMATS = FOUR_BIT | frozenset(NUMBERS)
FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})

# types of arguments that torch's dispatcher passes on as they are
_PLAIN_ARGUMENTS = PLAIN | {int, float, bool, type(None)}

# by names of this module: the way through torch's modules takes longer than what they do
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active
_profiled, _compiling = torch._C._autograd._profiler_enabled, torch.compiler.is_compiling
_tracing = torch._C._get_tracing_state  # of torch.jit.trace
_autocast = torch.is_autocast_enabled

_library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]  # torch's is not annotated
_ops: dict[str, Op] = {}


class BackendUnavailable(RuntimeError):
    """A forced backend cannot serve this call; the text says why."""


@lru_cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def forward_mode() -> bool:
    """True if forward-mode derivatives are being taken (`torch.func.jvp`, `dual_level`).

    A raw operator would drop them without a word; an `autograd.Function` that has none refuses by its name, so public
    functions go through theirs then.
    """
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _type_of(t: Tensor) -> str:
    return "cpu" if t.is_cpu else t.device.type  # the second takes twice as long


def dispatch_observed() -> bool:
    """True if something would see an operator that torch dispatches: a compiler, trace, mode, transform or profiler."""
    return bool(
        _compiling() or forward_ad._current_level >= 0 or _modes() or _transforms() or _profiled() or _tracing()
    )


def servable(*tensors: Tensor) -> bool:
    """True of tensors in a CPU's memory where nothing watches or changes torch's operators: a kernel that is called
    straight sees what it would see through torch."""
    if dispatch_observed() or _autocast("cpu") or not PLAIN.issuperset(map(type, tensors)):
        return False
    for t in tensors:  # noqa: SIM110  # a generator takes as long as the checks
        if not (t.is_cpu and in_memory(t)):
            return False
    return True


@dataclass(frozen=True)
class Backend:
    """One implementation of one op.

    fn takes the op's positional arguments. devices: types it serves unasked; forced_devices: types it serves only when
    forced (Triton's interpreter on CPU tensors). dtypes: of the op's first tensor. min_capability: least CUDA compute
    capability. package: a module that must be importable. available(): a reason why it can serve nothing at all here.
    when(*args): a reason why it cannot serve these arguments; None where it can. formats: numbers of those of weights
    (`formats.NUMBERS`) that it reads.
    """

    name: str
    fn: Callable[..., Any]
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype] = FLOATS
    forced_devices: frozenset[str] = frozenset()
    min_capability: tuple[int, int] | None = None
    package: str | None = None
    available: Callable[[], str | None] | None = None
    when: Callable[..., str | None] | None = None
    formats: frozenset[int] = FOUR_BIT

    def reason(self, args: tuple[Any, ...], forced: bool = False) -> str | None:
        """Why this backend cannot serve `args`; None where it can."""
        first: Tensor = args[0]
        device = _type_of(first)
        if device not in self.devices and not (forced and device in self.forced_devices):
            only = " unless forced" if device in self.forced_devices else ""
            return f"does not serve {device} tensors{only}"
        if first.dtype not in self.dtypes:
            return f"does not serve {first.dtype}"
        if self.package is not None and not _installed(self.package):
            return f"needs the package {self.package}, which is not installed"
        if self.available is not None and (why := self.available()) is not None:
            return why
        if self.min_capability is not None and device == "cuda":
            have = torch.cuda.get_device_capability(first.device)
            if have < self.min_capability:
                return f"needs compute capability {self.min_capability}, this GPU has {have}"
        return None if self.when is None else self.when(*args)


@dataclass
class Op:
    """An operator: schema, check, fake, reference, and the backends found beside it.

    schema: `(Tensor x, ...) -> ...` without the name. check(*args) raises on bad input and runs in the op and in the
    fake. fake(*args) returns empty outputs. reference(*args) is plain torch, takes every dtype and device, and is the
    oracle of the tests. folder: the package whose modules `native`, `triton` and `cuda` define `BACKENDS`.
    flops(*args): multiplications and additions of its products, as torch's FLOP counter counts them (`bench/flops.py`).
    sizes: of its arguments, as `samples.py` reads them: small calls are made by it, for kernels to be checked with.
    """

    name: str
    schema: str
    check: Callable[..., None]
    fake: Callable[..., Any]
    reference: Callable[..., Any]
    folder: str
    flops: Callable[..., int] | None = None
    sizes: str = ""
    _loaded: dict[str, Backend | str] = field(default_factory=dict)
    operands: Operands = field(init=False)

    def __post_init__(self) -> None:
        _library.define(self.name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._call, "CompositeExplicitAutograd")

        def fake(*args: Any) -> Any:
            self.operands.check(args, memory=False)
            self.check(*args)
            return self.fake(*args)

        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)
        self.op: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self.operands = Operands(self.name, self.op._schema)  # type: ignore[attr-defined]
        self._format_at = self.operands.names.index("quant_type") if "quant_type" in self.operands.names else None
        _ops[self.name] = self

    def sample(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Any]:
        """Arguments of a small call, x and what is like it in `dtype`, over an NF4 weight with nested scales."""
        from .samples import call

        return call(self.op._schema, self.sizes, dtype, device)  # type: ignore[attr-defined]

    def load(self, name: str) -> Backend | str:
        """The backend `name`, or the reason why there is none. Imports its module on first use."""
        found = self._loaded.get(name)
        if found is None:
            found = self._loaded[name] = self._import(name)
        return found

    def _import(self, name: str) -> Backend | str:
        if name == "reference":
            return Backend("reference", self.reference, frozenset(), when=None)
        module = f"{self.folder}.{name}"
        if name not in ORDER or importlib.util.find_spec(module) is None:
            return f"{self.name} has no {name} backend"
        try:
            backends: dict[str, Backend] = importlib.import_module(module).BACKENDS
        except ImportError as e:  # an optional package is absent or broken: a reason, not a failure
            return f"cannot be imported here: {e}"
        return backends.get(self.name, f"{self.name} has no {name} backend")

    def __call__(self, *args: Any) -> Any:
        """`self.op(*args)`; without torch's dispatcher, which takes longer than a token through a small layer, where
        nothing between could see or change the call: plain tensors, eager mode, no transform, mode or profiler."""
        if dispatch_observed() or not _PLAIN_ARGUMENTS.issuperset(map(type, args)):
            return self.op(*args)
        return self._call(*args)

    def examine(self, args: tuple[Any, ...]) -> None:
        """Raise ValueError or TypeError on bad arguments: what every op asks of them, then what this one does."""
        self.operands.check(args)
        self.check(*args)

    def _call(self, *args: Any) -> Any:
        if torch.is_grad_enabled() and self.operands.record(args):
            raise RuntimeError(
                f"{self.name}: the raw operator records no gradients; call peft_kernels.{self.name} instead. It has no "
                "gradients under torch.func.vmap: apply vmap inside of what is differentiated, or batch the rows of x."
            )
        self.examine(args)
        fn = self.choose(args).fn
        device = _type_of(args[0])
        if torch.is_autocast_enabled(device):
            # the public functions have done the casts; inside, autocast would silently change the numerics
            with torch.autocast(device, enabled=False):
                return fn(*args)
        return fn(*args)

    def refusal(self, backend: Backend, args: tuple[Any, ...], forced: bool = False) -> str | None:
        """Why a backend cannot serve `args`; None where it can."""
        at = self._format_at
        if at is not None:
            of = args[at]  # a list of them in operators of lists
            if of not in backend.formats if type(of) is int else not backend.formats.issuperset(of):
                number = of if type(of) is int else next(n for n in of if n not in backend.formats)
                return f"does not read weights in {NUMBERS[number].name}"
        return backend.reason(args, forced)

    def resolve(self, *args: Any) -> Callable[..., Any]:
        """The function that computes the operator for `args`, which it checks, and for others of their shapes, dtypes
        and devices while `forced_backends()` is the same object: a caller with hundreds of equal calls a step asks
        once."""
        self.examine(args)
        return self.choose(args).fn

    @property
    def forced(self) -> str | None:
        """The backend that is forced for this operator now."""
        return _forced.get(self.name, _forced.get("*")) if _forced else None

    def choose(self, args: tuple[Any, ...]) -> Backend:
        """The backend that serves `args`. Raises BackendUnavailable when the forced one cannot."""
        forced = self.forced
        if forced is not None:
            backend = self.load(forced)
            if forced == "reference":
                assert isinstance(backend, Backend)
                return backend
            why = backend if isinstance(backend, str) else self.refusal(backend, args, forced=True)
            if why is not None:
                raise BackendUnavailable(
                    f"{self.name}: backend {forced!r} was forced and cannot serve this call: {why}"
                )
            assert isinstance(backend, Backend)
            return backend
        device = _type_of(args[0])
        for name in _SERVING.get(device, ()):
            backend = self.load(name)
            if not isinstance(backend, Backend) or self.refusal(backend, args) is not None:
                continue
            if device not in verdicts.watched or verdicts.refusal(self, backend, args) is None:
                return backend
        backend = self.load("reference")
        assert isinstance(backend, Backend)
        return backend

    def explain(self, *args: Any) -> dict[str, str]:
        """For each backend why it cannot serve `args`; "chosen" for the one that does, "able" for those after it."""
        self.examine(args)
        forced = self.forced
        report: dict[str, str] = {}
        chosen = False
        for name in ORDER:
            backend = self.load(name)
            why = backend if isinstance(backend, str) else None
            if isinstance(backend, Backend) and name != "reference":
                why = self.refusal(backend, args, forced=forced == name)
                if why is None and forced is None and args[0].device.type in verdicts.watched:
                    why = verdicts.seen(self, backend, args)
            if why is None and forced is not None and forced != name:
                why = f"{forced!r} is forced"
            if why is None:
                why, chosen = ("able" if chosen else "chosen"), True
            report[name] = why
        return report


def ops() -> dict[str, Op]:
    """Every op by name."""
    return dict(_ops)


def explain(op: str, *args: Any) -> dict[str, str]:
    """`Op.explain` by name; an unknown name lists those that exist."""
    if op not in _ops:
        raise arg_error("explain", "op", f"one of {sorted(_ops)}", repr(op))
    return _ops[op].explain(*args)


def _parse(text: str) -> dict[str, str]:
    """`reference` or `dora_norm=triton,lora_linear=native` -> {"*": ...} or {op: backend}."""
    forced: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, _, name = part.rpartition("=")
        if name not in ORDER:
            raise arg_error(ENV, "a backend", f"one of {ORDER}", repr(name))
        forced[op or "*"] = name
    return forced


def _known(source: str, names: Iterable[str]) -> None:
    for op in names:
        if op not in _ops:
            raise arg_error(source, "op", f"one of {sorted(_ops)}", repr(op))


def check_environment() -> None:
    """Raise on an op in PEFT_KERNELS_BACKEND that does not exist: it would force nothing, silently."""
    _known(ENV, (op for op in _parse(os.environ.get(ENV, "")) if op != "*"))


_forced: dict[str, str] = _parse(os.environ.get(ENV, ""))


def forced_backends() -> dict[str, str]:
    """The backends that are forced now, by op; a new object after each change."""
    return _forced


_lock = threading.Lock()


@contextmanager
def use_backend(backend: str | None = None, /, **per_op: str) -> Iterator[None]:
    """Force a backend for all ops (`use_backend("native")`) or for some (`use_backend(lora_linear="triton")`).

    Process-wide, not per thread, because a backward runs on other threads. A forced backend that cannot serve a call
    raises `BackendUnavailable`. `use_backend(None)` lifts what is forced outside.
    """
    global _forced
    if per_op or backend is not None:
        new = _parse(",".join(([backend] if backend else []) + [f"{op}={name}" for op, name in per_op.items()]))
        _known("use_backend", per_op)
    else:
        new = {}
    with _lock:
        before = _forced
        _forced = {**(before if per_op and backend is None else {}), **new}
    try:
        yield
    finally:
        with _lock:
            _forced = before
