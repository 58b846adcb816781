"""The pool itself: what is asked of it, from any thread."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.limits import BASE
from ..files.checks import Confined
from . import files
from .buffers import Buffers, Staged
from .files import Registry, Signature, signature_of
from .layers import Selector, unwrap, wrap
from .loads import Load, Loads
from .prompts import Prompt, Prompts
from .sizes import plan_sizes
from .slots import PoolStats, Resident, Slots

TIMEOUT = 30.0


class PoolFull(RuntimeError):
    """An adapter found no slot, or its file was not read, within the time allowed. Trying again later may succeed."""


class Lease(int):
    """The slot of an adapter, which stays there until `release`, as often as that is called; also a context manager.
    prompt: of an adapter that is one; its keys and values go before a row's own, and in the slot is no adapter."""

    name: str
    prompt: Prompt | None
    _pool: AdapterPool
    _resident: Resident
    _held: bool

    def __new__(cls, pool: AdapterPool, resident: Resident) -> Lease:
        lease = super().__new__(cls, resident.slot)
        lease._pool, lease._resident, lease._held, lease.name = pool, resident, True, resident.name
        lease.prompt = resident.prompt
        return lease

    def __bool__(self) -> bool:
        return True  # slot 0 is one, too

    def release(self) -> None:
        self._pool.release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class AdapterPool:
    """Serves the adapters of a directory on one base model, `max_resident` of them at a time: LoRAs, and prompts.

    model: the plain base model, changed in place: the linear layers that adapters target become `AdapterLayer`s (dense,
    NF4Linear or bitsandbytes 4-bit), everything is frozen and in eval mode. Without `assign` it computes as before.
    directory: of adapter folders, one per adapter, in PEFT's format; a folder's name is the adapter's. max_resident:
    slots; None: as many as byte_budget has room for. byte_budget: for the stacks of all layers together. dtype: of the
    stacks, by default that of each layer's arithmetic; float32 files are rounded to it. target_modules: as in
    LoraConfig; by default whatever the directory's adapters target. max_rank: the largest rank that is served; by
    default the largest of the directory's, up to 256, or 64. max_virtual_tokens: of a prompt (prompt tuning, P-tuning,
    prefix tuning, ...), for a caller that puts `Lease.prompt` before the rows' keys and values, as `fastpeft serve`
    does; None: the longest of the directory's, up to 2048, or 128; by default prompts are refused. loaders: threads
    that read files. max_staged: adapters that were read ahead and wait in CPU memory; by default max_resident.

    Memory: see `pool_sizes`. Raises ValueError for a model or sizes that cannot be served, with the numbers. One bad
    adapter is never an error here: it is an `AdapterLoadError` for who acquires it.
    """

    def __init__(
        self,
        model: nn.Module,
        directory: str | os.PathLike[str] | None = None,
        max_resident: int | None = 32,
        byte_budget: int | None = None,
        dtype: torch.dtype | None = None,
        target_modules: str | Sequence[str] | None = None,
        max_rank: int | None = None,
        loaders: int = 2,
        max_staged: int | None = None,
        max_virtual_tokens: int | None = 0,
    ) -> None:
        if directory is not None and not Path(directory).is_dir():
            raise FileNotFoundError(f"AdapterPool: directory {os.fspath(directory)!r} is no folder")
        self.model = model
        self.registry = Registry(None if directory is None else Path(directory))
        self.registry.update(self.registry.look())
        self._selector = Selector(model)
        sizes = plan_sizes(
            self._selector, self.registry, target_modules, max_resident, byte_budget, dtype, max_rank, loaders=loaders,
            max_staged=max_staged, max_virtual_tokens=max_virtual_tokens,
        )  # fmt: skip
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._buffers = Buffers(sizes.infos, sizes.slots, sizes.rows, sizes.max_rank, dtype, device)
        self._prompts, self._token_bytes = Prompts(model, sizes.max_virtual_tokens), sizes.token_bytes
        self.layers = wrap(self._selector, sizes.infos)  # nothing fails from here on
        model.requires_grad_(False).eval()
        self.max_resident = sizes.slots
        self._slots = Slots(self._buffers, sizes.slots, sizes.virtual_tokens)
        self._lock = threading.Condition()  # its waiters are told of every change
        most = sizes.slots if max_staged is None else max_staged
        self._loads = Loads(self._lock, self.registry, self._read, loaders, most)
        self._queue: deque[object] = deque()  # of who waits for a slot, in order of arrival
        self._hits = self._misses = 0
        self._assigned: Tensor | None = None
        self._closed = False

    # Names

    def names(self) -> list[str]:
        """The names of all adapters, readable or not."""
        with self._lock:
            return sorted(self.registry.records)

    def __contains__(self, name: object) -> bool:
        return name in self.registry.records

    def resident(self) -> list[str]:
        """The names of the adapters in slots, the one that was used longest ago first."""
        with self._lock:
            return [r.name for r in sorted(self._slots.current.values(), key=lambda r: r.used)]

    def add(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Make one more adapter known, wherever its folder is; links in it may not leave it, or the pool's directory if
        it lies there. Raises ValueError for a name that is bad or taken."""
        with self._lock:
            self.registry.add(name, folder)

    def remove(self, name: str) -> None:
        """Forget an adapter; who holds it keeps it until the lease ends. `rescan` finds it again while its folder is
        in the pool's directory."""
        with self._lock:
            self.registry.get(name)
            del self.registry.records[name]
            self._slots.pinned.discard(name)
            self._forget(name)

    def rescan(self) -> tuple[list[str], list[str], list[str]]:
        """Look at the directory and the files of what is in memory again. Returns names: (new, gone, changed).

        Who holds an adapter that is gone or was changed keeps it as it was; the next `acquire` reads the new files.
        """
        seen = self.registry.look()  # thousands of folders: without the lock
        with self._lock:
            new, gone = self.registry.update(seen)
            for name in gone:
                if name not in self.registry.records:
                    self._slots.pinned.discard(name)
                self._forget(name)
            held: dict[str, Signature] = {r.name: r.signature for r in self._slots.current.values()}
            loads = [load for load in map(self._loads.get, self._loads.names()) if load is not None]
            held |= {load.record.name: load.signature for load in loads}
            changed = [n for n, s in held.items() if signature_of(self.registry.records[n].folder) != s]
            for name in changed:
                self._forget(name)
            return new, gone, changed

    def _forget(self, name: str) -> None:
        self._loads.drop(name)
        self._slots.forget(name)
        self._lock.notify_all()

    # Slots

    def acquire(self, name: str, timeout: float | None = TIMEOUT) -> Lease:
        """The adapter's slot, which is its own until `release` (or the end of `with`): read and copied there if needed.

        timeout: seconds to wait for its file and for a slot that nobody uses (None: for ever). Raises PoolFull after
        that, AdapterLoadError if the adapter cannot be used, UnknownAdapterError if there is none.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        first = True
        while True:
            with self._lock:
                lease = self._hit(name, first)
                if lease is not None:
                    return lease
                load = self._begin(name, first)
                load.waiters += 1
                first = False
            try:
                staged = self._wait_read(load, deadline)
                lease = self._wait_slot(load, staged, deadline)
            finally:
                with self._lock:
                    load.waiters -= 1
                    self._loads.trim()
            if lease is not None:
                return lease  # None: its files were replaced meanwhile

    def try_acquire(self, name: str) -> Lease | None:
        """As `acquire` without waiting: None while its file is being read (which this starts) or no slot is free."""
        with self._lock:
            lease = self._hit(name, True)
            if lease is not None:
                return lease
            load = self._begin(name, True)
            if not load.ready or self._queue:
                return None
            return self._place(load, load.future.result())

    def release(self, lease: Lease) -> None:
        """End a lease. Its slot may then go to another adapter; call it after the last forward that uses it."""
        if not isinstance(lease, Lease) or lease._pool is not self:
            raise TypeError(f"release takes what this pool's acquire returned, got {lease!r}")
        with self._lock:
            if lease._held:
                lease._held = False
                if self._slots.let_go(lease._resident):
                    self._lock.notify_all()

    def prefetch(self, name: str) -> bool:
        """Let a thread read an adapter ahead of its `acquire`. False if there are too many already (max_staged).

        Raises AdapterLoadError for an adapter that is known to be unusable.
        """
        with self._lock:
            self._check_open()
            return name in self._slots.current or self._loads.begin_ahead(name)

    def pin(self, name: str, timeout: float | None = TIMEOUT) -> None:
        """Load an adapter and never evict it, until `unpin`. Raises as `acquire`."""
        with self.acquire(name, timeout), self._lock:
            self._slots.pinned.add(name)

    def unpin(self, name: str) -> None:
        with self._lock:
            self._slots.pinned.discard(name)
            self._lock.notify_all()

    @contextmanager
    def using(self, names: Sequence[str | None], timeout: float | None = TIMEOUT) -> Iterator[list[int]]:
        """Within this, the model computes row i (of x.shape[0]) with adapter names[i]; None or "__base__": the base.

        Yields the slots. Raises as `acquire`, and then holds nothing. No other thread may `assign` meanwhile.
        """
        leases: dict[str, Lease] = {}
        try:
            for name in names:
                if name is not None and name != BASE and name not in leases:
                    leases[name] = self.acquire(name, timeout)
                    if leases[name].prompt is not None:
                        why = "which no layer has: put the keys and values of its lease's `prompt` before the row's"
                        raise ValueError(f"adapter {name!r} is a prompt, {why}")
            slots = [-1 if name is None or name == BASE else int(leases[name]) for name in names]
            self.assign(torch.tensor(slots, dtype=torch.int64, device=self._buffers.device))
            yield slots
        finally:
            self.assign(None)
            for lease in leases.values():
                lease.release()

    def assign(self, slots: Tensor | None) -> None:
        """The slot of each row of x.shape[0], or of each token of x flattened, in the next forwards; -1 is the base.

        slots: int64 on the model's device. It is kept, not copied: a graph that was recorded with it sees what is
        written into it later. None: the base for all. Slots must be held by leases until the forward has ended.
        """
        if slots is self._assigned:
            return
        if slots is not None and (slots.dtype != torch.int64 or slots.dim() != 1):
            raise ValueError(f"assign: slots must be int64 [rows], got {slots.dtype} {list(slots.shape)}")
        if slots is not None and slots.device != self._buffers.device:
            raise ValueError(f"assign: slots must be on {self._buffers.device}, got {slots.device}")
        try:
            for name, layer in self.layers.items():
                layer.set_row_stack(None if slots is None else self._buffers.stacks[name], slots)
        except BaseException:  # a layer that somebody changed: not some layers with adapters, others without
            for layer in self.layers.values():
                layer.set_row_stack(None, None)
            self._assigned = None
            raise
        self._assigned = slots

    def close(self) -> None:
        """Take the pool out of the model, which is then the plain one, and stop its threads. Leases become void."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.notify_all()
        self._loads.close()
        self.assign(None)
        unwrap(self._selector.sites, self.layers)

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def stats(self) -> PoolStats:
        with self._lock:
            slots, loads = self._slots, self._loads
            return PoolStats(
                adapters=len(self.registry.records), max_resident=self.max_resident, resident=len(slots.current),
                in_use=sum(r.refs > 0 for r in slots), pinned=len(slots.pinned), hits=self._hits, misses=self._misses,
                evictions=slots.evictions, loads=loads.read, failures=loads.failures,
                in_flight=len(loads) - loads.ready, staged=loads.ready, waiting=len(self._queue),
                load_seconds=loads.seconds, rows=slots.blocks.rows, rows_taken=slots.blocks.taken,
                row_bytes=self._buffers.row_bytes, virtual_tokens=slots.tokens,
                virtual_tokens_taken=slots.tokens_taken,
                nbytes=self._buffers.nbytes + slots.tokens_taken * self._token_bytes,
            )  # fmt: skip

    # Within the lock

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this AdapterPool was closed")

    def _hit(self, name: str, count: bool) -> Lease | None:
        self._check_open()
        resident = self._slots.current.get(name)
        if resident is None:
            return None
        self._hits += count
        self._slots.hold(resident)
        return Lease(self, resident)

    def _begin(self, name: str, count: bool) -> Load:
        load = self._loads.begin(name)
        self._misses += count and not load.missed  # once for each time that it is read, however often it is tried
        load.missed = True
        return load

    def _place(self, load: Load, staged: Staged | Prompt) -> Lease | None:
        resident = self._slots.place(load.record.name, load.signature, staged)
        if resident is None:
            return None
        self._loads.drop(resident.name)
        self._slots.hold(resident)
        return Lease(self, resident)

    # Outside of it

    def _read(self, folder: Confined) -> Staged | Prompt:
        return files.read(folder, self._selector, self._buffers, self._prompts)

    def _wait_read(self, load: Load, deadline: float | None) -> Staged | Prompt:
        try:
            return load.future.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            raise PoolFull(f"adapter {load.record.name!r} was still being read when the time was up") from None
        except CancelledError:
            raise RuntimeError("this AdapterPool was closed") from None

    def _wait_slot(self, load: Load, staged: Staged | Prompt, deadline: float | None) -> Lease | None:
        """A lease once a slot is free for it; None if the load is no longer the adapter's."""
        name = load.record.name
        ticket = object()
        with self._lock:
            self._queue.append(ticket)
            try:
                while True:
                    lease = self._hit(name, False)  # who waited for the same adapter may have been first
                    if lease is not None or self._loads.get(name) is not load:
                        return lease
                    # In order of arrival, so that small adapters do not for ever take the rows a large one waits for.
                    if self._queue[0] is ticket:
                        lease = self._place(load, staged)
                        if lease is not None:
                            return lease
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        raise PoolFull(f"adapter {name!r} found no room: {self._slots.why_full()}")
                    self._lock.wait(left)
            finally:
                self._queue.remove(ticket)
                self._lock.notify_all()
