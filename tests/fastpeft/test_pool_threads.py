"""AdapterPool under concurrent use."""

from __future__ import annotations

import gc
import random
import runpy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import AdapterLoadError, AdapterPool, PoolFull
from fastpeft.pool import files as pool_files

tools = runpy.run_path(str(Path(__file__).with_name("pool_tools.py")))
write, llama, logits, content, X = (tools[name] for name in ("write", "llama", "logits", "content", "X"))
SECONDS = 20.0  # what no test comes near unless something waits for ever


def marked(root: Path, count: int, ranks: tuple[int, ...] = (4,)) -> None:
    """Adapters `m1`, `m2` ... whose every element is their number."""
    for i in range(1, count + 1):
        write(root / f"m{i}", lambda shape, i=i: torch.full(shape, float(i)), r=ranks[i % len(ranks)])


def holds(pool: AdapterPool, slot: int, name: str) -> bool:
    """True if a slot holds this marked adapter, wholly and in every layer."""
    number = float(name[1:])
    parts = content(pool, slot)
    return len(parts) == len(pool.layers) and all((t == number).all() for a, b, _ in parts.values() for t in (a, b))


def together(*work: Callable[[], None]) -> None:
    """Run functions at once; the first error of any of them is raised here."""
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in work]
    for thread in threads:
        thread.start()
    end = time.monotonic() + SECONDS
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"


class Gate:
    """Reading stops at a gate until it is opened. passed: the adapters whose reading began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.passed: list[str] = []
        read = pool_files.read

        def slow(folder: Path, *args: Any) -> Any:
            self.passed.append(Path(folder).name)
            assert self.open.wait(SECONDS)
            return read(folder, *args)

        monkeypatch.setattr(pool_files, "read", slow)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.001)


# --- many threads -----------------------------------------------------------------------------------------------------


def test_threads_that_acquire_and_release_see_their_own_adapters_only(tmp_path: Path) -> None:
    """Readers, evictions, larger adapters, prefetching, rescans and a model that runs, all at once."""
    marked(tmp_path, 12, ranks=(4, 4, 12, 4, 30))
    pool = AdapterPool(llama(), tmp_path, max_resident=5, max_staged=3)
    names = pool.names()
    stop = threading.Event()
    served = [0] * 4

    def client(seed: int) -> None:
        r = random.Random(seed)
        for _ in range(120):
            name = r.choice(names)
            if r.random() < 0.3:
                pool.prefetch(r.choice(names))
            lease = pool.acquire(name, timeout=SECONDS) if r.random() < 0.7 else pool.try_acquire(name)
            if lease is None:
                continue
            with lease:
                assert lease.name == name
                assert holds(pool, lease, name)
                if r.random() < 0.2:
                    time.sleep(0.002)
                    assert holds(pool, lease, name)
            served[seed] += 1

    def model() -> None:
        expected: dict[str, torch.Tensor] = {}
        r = random.Random(9)
        while not stop.is_set():
            name = r.choice(names)
            with pool.using([name, None], timeout=SECONDS):
                y = logits(pool.model, X[:2])
            assert torch.equal(y, expected.setdefault(name, y))

    def clients() -> None:
        try:
            together(*(lambda seed=seed: client(seed) for seed in range(4)))
        finally:
            stop.set()

    def rescans() -> None:
        while not stop.is_set():
            assert pool.rescan() == ([], [], [])
            time.sleep(0.01)

    together(clients, model, rescans)
    until(lambda: pool.stats().in_flight == 0)  # the last of what was prefetched, which nobody waits for
    stats = pool.stats()
    assert min(served) > 60
    assert stats.evictions > 20
    assert stats.in_use == stats.waiting == stats.in_flight == 0
    assert stats.failures == 0
    assert stats.staged <= 3
    assert stats.rows_taken == sum(r.size for r in pool._slots)
    assert all(holds(pool, r.slot, r.name) for r in pool._slots)


def test_what_was_evicted_leaves_nothing_behind(tmp_path: Path) -> None:
    marked(tmp_path, 10)
    write(tmp_path / "bad", 0, use_dora=True)
    pool = AdapterPool(llama(), tmp_path, max_resident=3, target_modules=["q_proj", "v_proj"])

    def lap() -> tuple[int, int]:
        for i in range(1, 11):
            pool.prefetch(f"m{i % 10 + 1}")
            with pool.using([f"m{i}"]):
                pass
            with pytest.raises(AdapterLoadError):
                pool.acquire("bad")
        while pool.stats().staged or pool.stats().in_flight:
            for name in pool._loads.names():
                pool.acquire(name, timeout=SECONDS).release()
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()), threading.active_count()

    lap()
    before = lap()
    for _ in range(3):
        after = lap()
    assert after == before
    assert pool.stats().evictions > 40


def test_an_adapter_that_many_want_is_read_once(tmp_path: Path, gate: Gate) -> None:
    marked(tmp_path, 2)
    pool = AdapterPool(llama(), tmp_path, max_resident=2)
    slots: list[int] = []
    threads = [lambda: slots.append(int(pool.acquire("m1", timeout=SECONDS))) for _ in range(8)]
    opener = threading.Timer(0.05, gate.open.set)
    opener.start()
    together(*threads)
    assert gate.passed == ["m1"]
    assert len(slots) == 8
    assert len(set(slots)) == 1
    assert (pool.stats().misses, pool.stats().loads, pool.stats().in_use) == (1, 1, 1)


def test_reading_does_not_hold_up_what_is_there(tmp_path: Path, gate: Gate) -> None:
    """Loading overlaps with computing: while a file is read, forwards run and hits are served."""
    marked(tmp_path, 3)
    pool = AdapterPool(llama(), tmp_path, max_resident=2)
    gate.open.set()
    pool.acquire("m1").release()
    gate.open.clear()
    assert pool.prefetch("m2")
    assert pool.prefetch("m2")
    assert pool.prefetch("m1")
    until(lambda: gate.passed == ["m1", "m2"])
    with pool.using(["m1"] * 3):
        assert logits(pool.model).isfinite().all()
    assert pool.try_acquire("m2") is None
    with pytest.raises(PoolFull, match="still being read"):
        pool.acquire("m2", timeout=0.01)
    assert (pool.stats().in_flight, pool.stats().staged) == (1, 0)
    gate.open.set()
    until(lambda: pool.stats().staged == 1)
    lease = pool.try_acquire("m2")
    assert lease is not None
    assert holds(pool, lease, "m2")
    assert gate.passed == ["m1", "m2"]
    assert pool.stats().misses == 2  # a miss is one, however often it is tried


def test_reading_ahead_is_bounded(tmp_path: Path, gate: Gate) -> None:
    marked(tmp_path, 6)
    pool = AdapterPool(llama(), tmp_path, max_resident=1, max_staged=2, loaders=1)
    assert [pool.prefetch(f"m{i}") for i in range(1, 5)] == [True, True, False, False]
    gate.open.set()
    until(lambda: pool.stats().staged == 2)
    assert pool.prefetch("m5")  # the oldest that is ready makes room
    until(lambda: pool.stats().staged == 2 and not pool.stats().in_flight)
    assert set(pool._loads.names()) == {"m2", "m5"}
    pool.acquire("m2").release()
    assert gate.passed == ["m1", "m2", "m5"]


def test_who_waits_for_a_slot_gets_it_in_order(tmp_path: Path) -> None:
    marked(tmp_path, 4)
    pool = AdapterPool(llama(), tmp_path, max_resident=1)
    first = pool.acquire("m1")
    order: list[str] = []

    def wait(name: str) -> None:
        with pool.acquire(name, timeout=SECONDS) as slot:
            order.append(name)
            assert holds(pool, slot, name)

    def start() -> None:
        for i, name in enumerate(("m3", "m2", "m4"), start=1):
            threading.Thread(target=wait, args=(name,), daemon=True).start()
            until(lambda i=i: pool.stats().waiting == i)
        assert pool.try_acquire("m2") is None
        first.release()
        until(lambda: len(order) == 3)

    together(start)
    assert order == ["m3", "m2", "m4"]


def test_a_large_adapter_is_not_starved_by_small_ones(tmp_path: Path) -> None:
    marked(tmp_path, 7)
    write(tmp_path / "large", 0, r=32)
    row = AdapterPool(llama(), tmp_path).stats().row_bytes
    pool = AdapterPool(llama(), tmp_path, max_resident=4, byte_budget=36 * row + 2000)
    assert pool.stats().rows == 32
    small = [pool.acquire(f"m{i}") for i in range(1, 5)]
    done = threading.Event()

    def large() -> None:
        with pool.acquire("large", timeout=SECONDS):
            done.set()

    def others() -> None:
        until(lambda: pool.stats().waiting == 1)
        for lease in small[:3]:
            lease.release()
        with pytest.raises(PoolFull):  # there are rows for it, but the large one was first
            pool.acquire("m5", timeout=0.05)
        assert not done.is_set()
        small[3].release()
        assert done.wait(SECONDS)
        pool.acquire("m5", timeout=SECONDS).release()

    together(large, others)


def test_a_removed_adapter_fails_who_waits_for_it(tmp_path: Path, gate: Gate) -> None:
    marked(tmp_path, 2)
    pool = AdapterPool(llama(), tmp_path, max_resident=2)

    def waits() -> None:
        with pytest.raises(AdapterLoadError, match="there is no adapter"):
            pool.acquire("m1", timeout=SECONDS)

    def removes() -> None:
        until(lambda: gate.passed == ["m1"])
        pool.remove("m1")
        gate.open.set()

    together(waits, removes)
    assert pool.stats().resident == pool.stats().in_use == pool.stats().staged == 0


def test_a_changed_adapter_is_read_again_for_who_waits_for_it(tmp_path: Path, gate: Gate) -> None:
    marked(tmp_path, 2)
    pool = AdapterPool(llama(), tmp_path, max_resident=2, loaders=2)

    def waits() -> None:
        with pool.acquire("m1", timeout=SECONDS) as slot:
            assert all((a == 7).all() for a, _, _ in content(pool, slot).values())

    def changes() -> None:
        until(lambda: gate.passed == ["m1"])
        write(tmp_path / "m1", lambda shape: torch.full(shape, 7.0), r=3)
        assert pool.rescan()[2] == ["m1"]
        gate.open.set()

    together(waits, changes)


def test_closing_ends_the_waiting(tmp_path: Path, gate: Gate) -> None:
    marked(tmp_path, 4)
    pool = AdapterPool(llama(), tmp_path, max_resident=1, loaders=1)
    gate.open.set()
    held = pool.acquire("m1")
    gate.open.clear()
    ended: list[str] = []

    def waits(name: str) -> None:
        with pytest.raises(RuntimeError, match="closed"):
            pool.acquire(name, timeout=SECONDS)
        ended.append(name)

    def closes() -> None:
        until(lambda: pool.stats().in_flight == 2)
        threading.Timer(0.05, gate.open.set).start()
        pool.close()
        held.release()

    together(lambda: waits("m2"), lambda: waits("m3"), closes)
    assert sorted(ended) == ["m2", "m3"]


def test_an_error_that_nobody_expected_fails_its_adapter_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked(tmp_path, 2)
    pool = AdapterPool(llama(), tmp_path)
    read = pool_files.read

    def odd(folder: Path, *args: Any) -> Any:
        if Path(folder).name == "m1":
            raise MemoryError
        return read(folder, *args)

    monkeypatch.setattr(pool_files, "read", odd)
    with pytest.raises(AdapterLoadError, match="adapter 'm1': MemoryError"):
        pool.acquire("m1")
    pool.acquire("m2").release()


def test_a_copy_that_fails_leaves_a_free_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked(tmp_path, 2)
    pool = AdapterPool(llama(), tmp_path, max_resident=1)
    write_buffers = pool._buffers.write
    monkeypatch.setattr(pool._buffers, "write", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        pool.acquire("m1")
    monkeypatch.setattr(pool._buffers, "write", write_buffers)
    assert pool.stats().rows_taken == 0
    assert holds(pool, pool.acquire("m2"), "m2")
