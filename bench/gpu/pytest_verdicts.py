"""A plugin of pytest: for each test what became of it, and which kernels it called, in OUT/tests.jsonl at once.

`-p bench.gpu.pytest_verdicts` with PEFT_KERNELS_GPU_RUN=OUT. A test that ends the process, or does not end, is known by
the line that is missing; one after which the device is lost ends its process itself, so that it costs no other test.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_kernels import dispatch

from . import faults, files
from .verdicts import DONE, ENV, GRACE_S, LIMIT_ENV, PART, key_of
from .worker import STICKY, reason


class Recorder:
    def __init__(self, out: Path, limit: float) -> None:
        self.out, self.path, self.limit = out, out / f"{PART}.jsonl", limit
        settings = files.settings(out)
        self.marks = files.marks(settings)
        self.faults = faults.Faults.parse(settings.get("faults") or "")
        self.test, self.keys = "", set[str]()
        self.outcome: dict[str, Any] = {}
        self.broken: str | None = None  # of a fake device

    def write(self, line: dict[str, Any], sync: bool = True) -> None:
        files.append(self.path, {**line, **self.marks}, sync)

    # ---- the kernels that a test calls ----
    def watch(self) -> None:
        """Note each backend that an op chooses while a test runs; in a fake run, spoil what is planted."""
        choose = dispatch.Op.choose

        def chosen(op: dispatch.Op, args: tuple[Any, ...]) -> dispatch.Backend:
            backend = choose(op, args)
            if self.test and backend.name != "reference":
                key = key_of(op.name, backend.name, args)
                if key not in self.keys:
                    self.keys.add(key)
                    # also of a test that ends the process the kernels are known
                    self.write({"test": self.test, "key": key}, sync=False)
            if (op.name, backend.name) in self.faults.wrong:
                return spoiled(backend)
            return backend

        dispatch.Op.choose = chosen  # type: ignore[method-assign]

    # ---- the tests ----
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        try:
            done = set((self.out / DONE).read_text().split("\n"))
        except FileNotFoundError:
            return
        left = [item for item in items if item.nodeid in done]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item.nodeid not in done]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
            self.write({"title": report.nodeid, "outcome": "failed", "why": last_line(report.longreprtext), "keys": []})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.test, self.keys = item.nodeid, set()
        self.outcome = {"outcome": "passed"}
        self.write({"title": self.test, "begin": files.now()}, sync=False)
        timer = threading.Timer(self.limit, self.too_long)
        timer.daemon = True
        timer.start()
        faulthandler.dump_traceback_later(self.limit + GRACE_S, exit=True)  # where no thread of Python runs
        try:
            fault = self.faults.of(self.out, PART, self.test)
            faults.come(fault, self.path, self)
            result = yield
        except RuntimeError as e:
            if self.broken is None:
                raise
            self.outcome, result = {"outcome": "failed", "why": reason(e)}, True
        else:
            if fault == "fail":
                self.outcome = {"outcome": "failed", "why": "a failure (planted)"}
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()
        lost = self.lost()
        if lost is not None:
            self.outcome = {"outcome": "failed", "why": f"the device was lost: {lost}"}
        self.write({"title": self.test, "keys": sorted(self.keys), **self.outcome})
        self.test = ""
        if lost is not None:
            leave(STICKY)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self.test or report.nodeid != self.test:
            return  # in xdist's controller: its workers have written it
        if report.failed and self.outcome["outcome"] != "failed":
            self.outcome = {"outcome": "failed", "why": last_line(report.longreprtext), "when": report.when}
        elif report.skipped and self.outcome["outcome"] == "passed":
            self.outcome = {"outcome": "skipped", "why": last_line(report.longreprtext)}

    def too_long(self) -> None:
        line = {"title": self.test, "keys": sorted(self.keys), "outcome": "failed", "failed": True,
                "absent": f"did not finish in {self.limit:g} s"}  # fmt: skip
        self.write(line)
        faulthandler.dump_traceback(all_threads=True)
        leave(1)

    def lost(self) -> str | None:
        """An error that the device tells after a test; None where it is well."""
        if self.broken is not None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
            return self.broken
        try:
            torch.cuda.synchronize()
        except Exception as e:
            return reason(e)
        return None


def spoiled(backend: dispatch.Backend) -> dispatch.Backend:
    """A backend whose first result is off by an eighth."""

    def fn(*args: Any) -> Any:
        result = backend.fn(*args)
        first = result[0] if isinstance(result, (tuple, list)) else result
        if torch.is_tensor(first) and first.is_floating_point():
            first.mul_(1.125).add_(0.125)
        return result

    return dispatch.Backend(backend.name, fn, backend.devices)


def last_line(text: str) -> str:
    """The line of a failure that says what was wrong: the first that pytest marks, else the last."""
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (marked or [line for line in text.splitlines() if line.strip()] or ["no message"])[0 if marked else -1][:400]


def leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def pytest_configure(config: pytest.Config) -> None:
    out = os.environ.get(ENV)
    if not out:
        raise pytest.UsageError(f"the plugin writes into the folder that {ENV} names, and it is not set")
    recorder = Recorder(Path(out), float(os.environ.get(LIMIT_ENV, "240")))
    recorder.watch()
    config.pluginmanager.register(recorder, "peft-kernels-verdicts")
