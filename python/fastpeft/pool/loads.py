"""Reading adapters on threads, ahead of their use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ..files.checks import Confined, rule_of
from .buffers import Staged
from .files import AdapterLoadError, Record, Registry, Signature, signature_of
from .prompts import Prompt

MAX_REASON = 1000  # characters: a reason may quote names of a file's choice, and is kept


class Load:
    """An adapter that is being read, or was and waits in CPU memory. waiters: who wants it in a slot. missed: whether
    it was counted as a miss."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.signature: Signature = signature_of(record.folder)
        self.future: Future[Staged | Prompt] = Future()
        self.waiters = 0
        self.missed = False

    @property
    def ready(self) -> bool:
        return self.future.done()


class Loads:
    """The loads under way, by name. `lock` is held by callers of everything but what runs on the threads."""

    def __init__(
        self, lock: threading.Condition, registry: Registry, read: Callable[[Confined], Staged | Prompt], threads: int,
        most: int,
    ) -> None:  # fmt: skip
        self._lock, self._registry, self._read_folder, self.most = lock, registry, read, most
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="fastpeft-pool")
        self._loads: dict[str, Load] = {}
        self.read = self.failures = 0
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._loads)

    @property
    def ready(self) -> int:
        """How many are in CPU memory."""
        return sum(load.ready for load in self._loads.values())

    def names(self) -> list[str]:
        return list(self._loads)

    def get(self, name: str) -> Load | None:
        return self._loads.get(name)

    def begin(self, name: str) -> Load:
        """The load of an adapter, begun if it is not under way. Raises AdapterLoadError for what cannot be read."""
        load = self._loads.get(name)
        if load is None:
            record = self._registry.get(name)
            record.check()
            load = self._loads[name] = Load(record)
            self._threads.submit(self._run, load)
        return load

    def begin_ahead(self, name: str) -> bool:
        """Begin a load that nobody waits for yet; False if there are too many that nobody waits for."""
        if name not in self._loads and len(self._idle()) >= self.most:
            self._registry.get(name)
            oldest = next((n for n in self._idle() if self._loads[n].ready), None)
            if oldest is None:
                return False
            del self._loads[oldest]
        self.begin(name)
        return True

    def _idle(self) -> list[str]:
        return [name for name, load in self._loads.items() if not load.waiters]

    def trim(self) -> None:
        """Drop the oldest of what was read and nobody waits for, down to `most`."""
        ready = [name for name in self._idle() if self._loads[name].ready]
        for name in ready[: max(0, len(ready) - self.most)]:
            del self._loads[name]

    def drop(self, name: str) -> None:
        self._loads.pop(name, None)

    def close(self) -> None:
        """Called without the lock: the threads end what they have begun."""
        with self._lock:
            for load in self._loads.values():
                load.future.cancel()
            self._loads.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, load: Load) -> None:
        """On a thread: read one adapter."""
        if not load.future.set_running_or_notify_cancel():
            return
        record = load.record
        begin = time.perf_counter()
        load.signature = signature_of(record.folder)
        try:
            staged = self._read_folder(record.folder)
        except Exception as error:  # whatever a file makes go wrong is its own adapter's
            reason = (str(error) or type(error).__name__)[:MAX_REASON]
            rule = rule_of(error)
            failed = AdapterLoadError(record.name, reason, rule)
            failed.__cause__ = error
            with self._lock:
                self.failures += 1
                record.failure = (load.signature, reason, rule)
                if self._loads.get(record.name) is load:
                    del self._loads[record.name]
            load.future.set_exception(failed)
            return
        with self._lock:  # who waits for the result sees it counted
            self.read += 1
            self.seconds += time.perf_counter() - begin
            load.future.set_result(staged)
            self.trim()
            self._lock.notify_all()
