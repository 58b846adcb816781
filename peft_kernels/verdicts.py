"""Verdicts before trust: a kernel of a GPU serves once it has agreed with the reference there.

A kernel that no check has passed may be wrong on a machine that nobody tried: another compiler, another GPU. So the
first call of an operator that a backend would serve on a watched device is held back while a small call of the same
code path (`samples.like`) goes through the backend and through the reference, in its dtype and in float64. The verdict
is remembered for the process and in a file; a kernel that fails is refused with the reason, which `explain` and
`fastpeft doctor` show, and the next backend is asked. Each direction is an operator, with a verdict of its own.

A verdict is of a code path: the operator, the backend, the dtypes, the format of the weight, what is absent, the class
of the rows, what the other sizes are multiples of. It holds for one architecture and one build: Triton's version, that
of ptxas and the kernels' sources with the tuned tables; of a native library, the file itself.

Under CUDA graph capture and under torch.compile's tracing nothing can be checked: a kernel without a verdict does not
serve there, says so in a warning, and is checked by the next call outside. A forced backend is not checked: who forces
it has decided. `PEFT_KERNELS_VERIFY`: 1, the default; 0: no checks, every kernel serves; strict: a failure raises.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import code_paths, tuning_user
from .checks import arg_error, capturing

ENV = "PEFT_KERNELS_VERIFY"
FORMAT = 1
_OFF, _STRICT = "0", "strict"
_PACKAGE = Path(__file__).parent
_LIBRARIES = {"cuda": "cuda", "native": "cpu"}
_FEATURES = (256, 1024)  # of K: a sum that is not split over programs, and one that is where rows are few
_FEW_ROWS = 64  # up to which a layer's sums are split over programs; for more the first is enough

Key = tuple[str, str, int, tuple[Any, ...]]  # operator, backend, device, code path
_known: dict[Key, str | None] = {}  # why a code path is refused; None where it has passed
_waiting: dict[Key, str] = {}  # met where nothing could be checked
_files: dict[Path, dict[tuple[str, str], str | None]] = {}
_lock = threading.RLock()  # a kernel may call other operators


class VerdictError(RuntimeError):
    """A kernel failed its check, and `PEFT_KERNELS_VERIFY=strict`."""


def _mode_of(text: str) -> str:
    if text not in ("", _OFF, "1", _STRICT):
        raise arg_error(ENV, "the environment variable", "0, 1 or strict", repr(text))
    return text or "1"


def _watched_by(mode: str, devices: Iterable[str] = ("cuda",)) -> frozenset[str]:
    return frozenset() if mode == _OFF else frozenset(devices)


_mode = _mode_of(os.environ.get(ENV, ""))
watched = _watched_by(_mode)  # types of devices on which a kernel needs a verdict


@contextmanager
def watching(*devices: str, mode: str = "1") -> Iterator[None]:
    """Within, kernels on these types of devices need a verdict, and nothing is known but what files say; for tests."""
    global watched, _mode
    before = watched, _mode, dict(_known), dict(_waiting)
    watched, _mode = _watched_by(_mode_of(mode), devices), mode
    for store in (_known, _waiting, _files):
        store.clear()
    try:
        yield
    finally:
        watched, _mode = before[:2]
        for store, kept in ((_known, before[2]), (_waiting, before[3])):
            store.clear()
            store.update(kept)  # type: ignore[arg-type]
        _files.clear()


def refusal(op: Any, backend: Any, args: Sequence[Any]) -> str | None:
    """Why a backend may not serve a call of `op` on a watched device; None where its code path has passed.

    Checks it where nobody did. Raises VerdictError where it fails and `PEFT_KERNELS_VERIFY=strict`.
    """
    key = (op.name, backend.name, args[0].get_device(), code_paths.of(op, args))
    try:
        why = _known[key]
    except KeyError:
        why = _settle(op, backend, args, key)
    if why is not None and _mode == _STRICT and key in _known:
        raise VerdictError(f"{op.name}: backend {backend.name!r} {why} ({ENV}=strict)")
    return why


def seen(op: Any, backend: Any, args: Sequence[Any]) -> str | None:
    """As `refusal`, of what is known: nothing is checked."""
    key = (op.name, backend.name, args[0].get_device(), code_paths.of(op, args))
    if key not in _known and key not in _waiting:
        return _read(_file(backend.name, args[0].device)).get((op.name, code_paths.text(op, key[3])))
    return _known.get(key) or _waiting.get(key)


def kept() -> list[dict[str, Any]]:
    """Every row of every file of verdicts, with its "arch" and "made_by". What is not understood is left out."""
    found = []
    for file in sorted((tuning_user.cache_root() / "verdicts").glob("*.json")):
        data = _json(file)
        found += [{**row, "arch": data.get("arch"), "made_by": data.get("made_by"), "file": str(file)}
                  for row in data["rows"]]  # fmt: skip
    return found


# ---- checking -------------------------------------------------------------------------------------------------------


def _unable(device: torch.device) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile traces this call"
    with torch.cuda.device(device if device.type == "cuda" else -1):
        return "a CUDA graph is being captured" if capturing() else None


def _settle(op: Any, backend: Any, args: Sequence[Any], key: Key) -> str | None:
    """The verdict of a code path that this process has none of: a file's, or that of a check."""
    if not args[0].numel():
        return None  # nothing is launched
    device = args[0].device
    unable = _unable(device)
    if unable is not None:
        why = f"has no verdict on this GPU yet, and cannot be checked while {unable}: call it once before"
        if key not in _waiting:
            _waiting[key] = why
            warnings.warn(f"peft_kernels: {op.name}: backend {backend.name!r} {why}", stacklevel=2)
        return why
    with _lock:
        if key in _known:  # another thread was first
            return _known[key]
        file, path = _file(backend.name, device), code_paths.text(op, key[3])
        rows = _read(file)
        if (op.name, path) in rows:
            why = rows[op.name, path]
        else:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # errors of what was queued before are not this kernel's
            begun = time.perf_counter()
            try:
                why = check(op, backend, args)
            except torch.OutOfMemoryError as error:  # says nothing about the kernel
                return f"could not be checked: {error}"
            _write(file, device, backend.name, op.name, path, why, time.perf_counter() - begun)
        if why is not None:
            warnings.warn(f"peft_kernels: {op.name}: backend {backend.name!r} {why}", stacklevel=2)
        _known[key] = why
        _waiting.pop(key, None)
        return why


def check(op: Any, backend: Any, args: Sequence[Any]) -> str | None:
    """Why `backend` is wrong about small calls like the one with `args`; None where it agrees with the reference."""
    from .samples import like

    many = args[0].shape[0] > _FEW_ROWS if args[0].dim() > 1 else False
    device = args[0].device
    with torch.no_grad(), torch.device("cpu"), torch.autocast(device.type, enabled=False):
        for features in _FEATURES[:1] if many or "weight" not in op.operands.names else _FEATURES:
            small = like(op.operands.names, op.sizes, args, features)
            why = backend.reason(small)
            if why is not None:
                return f"does not serve the small call that would check it: {why}"
            try:
                got = results(op, backend.fn, small)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                return f"failed its check: it raised {type(error).__name__}: {str(error)[:300]}"
            eager, exact = (results(op, op.reference, each) for each in (small, promoted(op, small)))
            if len(got) != len(eager):
                return f"failed its check: {len(got)} results, the reference has {len(eager)}"
            for i, three in enumerate(zip(got, eager, exact, strict=True)):
                if (text := _differs(*three)) is not None:
                    return f"failed its check: result {i} is wrong, {text}"
    return None


def results(op: Any, fn: Callable[..., Any], args: Sequence[Any]) -> list[Tensor]:
    """Values that a call writes into its arguments, which are left alone here, then those that it returns."""
    own = [v.clone() if i in op.operands.written else v for i, v in enumerate(args)]
    out = fn(*own)
    returned = [] if out is None else [out] if isinstance(out, Tensor) else [*out]
    return [*(own[i] for i in op.operands.written), *returned]


def promoted(op: Any, args: Sequence[Any]) -> list[Any]:
    """The same call in float64."""
    from .samples import FIXED

    def up(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [up(name, v) for v in value]
        if value is None or (isinstance(value, torch.dtype) and name == "dtype"):
            return value and torch.float64
        fixed = name in FIXED or (name == "scaling" and isinstance(value, Tensor))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() and not fixed else value

    return [up(name, value) for name, value in zip(op.operands.names, args, strict=True)]


def _differs(actual: Tensor, eager: Tensor, exact: Tensor) -> str | None:
    """Why a result is wrong: it is as near to float64 as eager code is, by the largest error that this makes, or to 256
    steps of float32 of the largest value, which sums of products on tensor cores stay within. Integers are equal."""
    if actual.shape != eager.shape or actual.dtype != eager.dtype:
        return f"{actual.dtype} {tuple(actual.shape)} where {eager.dtype} {tuple(eager.shape)} belongs"
    if not actual.numel():
        return None
    if not actual.is_floating_point():
        return None if torch.equal(actual, eager) else f"{int((actual != eager).sum())} of {actual.numel()} differ"
    a, e, x = (t.double() for t in (actual, eager, exact))
    eps = max(torch.finfo(actual.dtype).eps, torch.finfo(torch.float32).eps)
    allowed = 4 * (e - x).abs().max() + 256 * torch.finfo(torch.float32).eps * x.abs().max() + 2 * eps * x.abs()
    error = (a - x).abs()
    bad = ~(error <= allowed)  # written so that a NaN is bad
    if not bool(bad.any()):
        return None
    i = int(torch.where(bad, error.nan_to_num(float("inf")), 0.0).argmax())
    values = (float(t.reshape(-1)[i]) for t in (a, x))
    return "{} of {} elements, one is {:.6g} where {:.6g} belongs".format(int(bad.sum()), bad.numel(), *values)


# ---- files ----------------------------------------------------------------------------------------------------------


def _arch(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else device.type


def _digest(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0".encode() + file.read_bytes())
    return total.hexdigest()[:12]


@cache
def _made_by(backend: str, arch: str) -> str:
    """The build that a backend's machine code comes from, in words. Asked once a process."""
    if backend in _LIBRARIES:
        library = _PACKAGE / "lib" / f"libpeft_kernels_{_LIBRARIES[backend]}.so"
        return f"library {_digest([library] if library.is_file() else [])}"
    sources = [*_PACKAGE.glob("triton_lib/*.py"), *_PACKAGE.glob("ops/*/triton*.py"), *_PACKAGE.glob("tuned/*.json")]
    table = tuning_user.path(arch)
    sources = sorted(sources) + ([table] if table.is_file() else [])
    return f"{compilers(arch)}, sources {_digest(sources)}"


def compilers(arch: str) -> str:
    """Versions of Triton and of the ptxas that it assembles an architecture, "sm_90", with."""
    from .triton_lib import toolchain

    found = toolchain.of(arch if arch.startswith("sm_") else "sm_80")
    triton, ptxas = (".".join(map(str, numbers)) or "none" for numbers in (found.triton, found.ptxas))
    return f"Triton {triton}, ptxas {ptxas}"


def _file(backend: str, device: torch.device) -> Path:
    arch = _arch(device)
    build = hashlib.sha256(_made_by(backend, arch).encode()).hexdigest()[:12]
    return tuning_user.cache_root() / "verdicts" / f"{arch}-{backend}-{build}.json"


def _json(file: Path) -> dict[str, Any]:
    """A file's content; no rows where there is no file, or none that can be read. Rows of another form are left out."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        rows = [r for r in data["rows"] if isinstance(r, dict) and {"op", "path", "why"} <= set(r)]
    except (OSError, ValueError, KeyError, TypeError):
        return {"rows": []}
    return {**data, "rows": rows}


def _read(file: Path) -> dict[tuple[str, str], str | None]:
    if file not in _files:
        _files[file] = {(str(r["op"]), str(r["path"])): r["why"] for r in _json(file)["rows"]}
    return _files[file]


def _write(
    file: Path, device: torch.device, backend: str, op: str, path: str, why: str | None, seconds: float
) -> None:
    """Add a row; the file is replaced whole. Where it cannot be written the verdict is this process's alone."""
    row = {"op": op, "backend": backend, "path": path, "why": why, "ms": round(1e3 * seconds, 1)}
    _read(file)[op, path] = why
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        others = [r for r in _json(file)["rows"] if (r["op"], r["path"]) != (op, path)]  # of other processes, too
        arch = _arch(device)
        data = {"format": FORMAT, "arch": arch, "made_by": _made_by(backend, arch), "rows": [*others, row]}
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump(data, out, indent=1)
            os.replace(temporary, file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        warnings.warn(f"peft_kernels: verdicts cannot be kept in {file.parent}: {error}", stacklevel=2)
