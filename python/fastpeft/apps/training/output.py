"""A run's output folders: made, checked, and held so that no second run writes into them."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import UserError

LOCK_NAME = ".fastpeft-training.lock"
OWNER_NAME = ".fastpeft-training.json"
METRICS_NAME, CURVE_NAME, ADAPTER_NAME = "metrics.jsonl", "loss.png", "adapter"
WRITTEN = "|".join((r"checkpoint-\d+", *map(re.escape, (ADAPTER_NAME, METRICS_NAME, CURVE_NAME, OWNER_NAME))))

_held: dict[str, tuple[int, int]] = {}  # folder -> process and thread that hold it


@contextmanager
def held(config: TrainConfig) -> Iterator[None]:
    """Make the folders that a run writes (its own, each adapter's), hold them against a second run, and remove what
    killed runs left half-written in them. Within it, an error for want of room says what to do about it.

    The lock is the system's, on a file in each folder: it holds against other processes, threads and hosts (where the
    file system is shared with its locks), and one that a dead process left holds nothing. Where a file system has no
    locks, filelock keeps one by host and process. A thread may hold again what it holds. Raises UserError, which names
    the output, for a folder that is held, or that cannot be made or written; nothing in it was changed then.
    """
    from ... import WriteError, remove_leftovers

    with ExitStack() as stack:
        for root in dict.fromkeys([Path(config.output), *(Path(one.output) for one in config.each().values())]):
            with _named(root):
                _make(root)
                release = _take(root)
            stack.callback(release)
            remove_leftovers(root, WRITTEN)
        try:
            yield
        except WriteError as error:
            fix = "mend that; `--resume` then goes on from the newest checkpoint, which is whole"
            raise UserError(f"output: {error}", fix) from error


@contextmanager
def _named(root: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        fix = "choose a folder that can be written"
        raise UserError(f"output: {root} cannot be written ({_reason(error)})", fix) from error


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"


def _make(root: Path) -> None:
    if root.is_symlink() and not root.exists():
        raise UserError(f"output: {root} is a link that leads nowhere, or in a circle", "choose a folder")
    if root.exists() and not root.is_dir():
        raise UserError(f"output: {root} is a file", "choose a folder")
    root.mkdir(parents=True, exist_ok=True)
    for name, is_folder in ((ADAPTER_NAME, True), (METRICS_NAME, False), (CURVE_NAME, False)):
        path = root / name
        if os.path.lexists(path) and (not path.exists() or path.is_dir() != is_folder):
            expected, found = ("folder", "file") if is_folder else ("file", "folder")
            raise UserError(f"output: {path} is a {found}, a {expected} is to be written there", "move it away")


def _take(root: Path) -> Any:
    """Hold a folder; returns the function that lets it go."""
    from filelock import FileLock, Timeout

    key, me = os.path.realpath(root), (os.getpid(), threading.get_ident())
    holder = _held.get(key)
    if holder == me:
        return lambda: None
    if holder is not None and holder[0] == me[0]:
        raise _in_use(root)
    lock = FileLock(root / LOCK_NAME)
    for _ in range(20):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if os.path.lexists(root / LOCK_NAME):
                raise _in_use(root) from None
        else:
            if os.path.lexists(root / LOCK_NAME):
                break
            lock.release()
        time.sleep(0.01)  # whoever held it has removed it this moment
    else:  # as in /proc
        raise FileNotFoundError(errno.ENOENT, "no file can be made there")
    _held[key] = me

    def release() -> None:
        del _held[key]
        for name in (OWNER_NAME, LOCK_NAME):  # the lock's file while it is held: filelock takes none that was removed
            with suppress(OSError):
                (root / name).unlink(missing_ok=True)
        lock.release()

    try:
        _write_owner(root)
    except BaseException:
        release()
        raise
    return release


def _write_owner(root: Path) -> None:
    from ... import atomic_file

    owner = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    with atomic_file(root / OWNER_NAME) as temporary:
        temporary.write_text(json.dumps(owner) + "\n", encoding="utf-8")


def _in_use(root: Path) -> UserError:
    return UserError(
        f"output: {root} is in use by another training run, {_owner(root)}",
        "wait until it ends, end it, or choose another output",
    )


def _owner(root: Path) -> str:
    """A phrase on who holds a folder. Who has just taken it may not have written its name yet."""
    for _ in range(20):
        with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
            found = json.loads((root / OWNER_NAME).read_text(encoding="utf-8")[:4096])
            pid, host, since = (found[key] for key in ("pid", "host", "since"))
            return f"process {pid!s:.20} on {host!s:.255} since {since!s:.40}"
        time.sleep(0.05)
    return "which did not say who it is"
