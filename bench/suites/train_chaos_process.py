"""A `fastpeft train` in a process of its own, forked from one that has imported everything, and what it said."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

# What a run imports, in the process that runs are forked from; that one computes nothing, and has no threads to lose.
_IMPORTED = [
    "fastpeft.apps.cli.app", "fastpeft.apps.cli.commands", "fastpeft.apps.training.loop", "fastpeft.apps.training.plot",
    "matplotlib.backends.backend_agg", "transformers.models.llama.modeling_llama",
]  # fmt: skip


def _train(words: Sequence[str], limit: int | None, said: Connection) -> NoReturn:
    import torch
    from fastpeft.apps.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # layers of this size only wait for a second one
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)
    said.close()
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.write(1, b"begun\n")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv[:] = ["fastpeft", "train", *words]
    code = 0
    try:
        main()
    except KeyboardInterrupt:  # before the command has begun; Python would end so
        code = 130
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Run:
    """A running `fastpeft train`. limit: bytes that a file may have."""

    def __init__(self, context: Any, words: Sequence[str], limit: int | None = None) -> None:
        mine, its = context.Pipe(duplex=False)
        self.process = context.Process(target=_train, args=(list(words), limit, its), daemon=True)
        self.process.start()
        its.close()
        self._text = b""
        self._reader = threading.Thread(target=self._read, args=(mine,), daemon=True)
        self._reader.start()
        while not self._text and self.running():
            time.sleep(0.0005)
        self.begin = time.monotonic()

    def _read(self, mine: Connection) -> None:
        while block := os.read(mine.fileno(), 1 << 16):
            self._text += block
        mine.close()

    @property
    def text(self) -> str:
        return self._text.decode(errors="replace")

    def running(self) -> bool:
        return bool(self.process.is_alive())

    def kill(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it may have ended
            os.kill(self.process.pid, number)

    def end(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if it did not end in time, and was killed."""
        self.process.join(seconds)
        if self.running():
            self.process.kill()
            self.process.join()
            return None
        self._reader.join(10)
        self.seconds = time.monotonic() - self.begin
        return int(self.process.exitcode)


def make_context() -> Any:
    """The way to make processes, each of which would otherwise import for seconds before it trains for one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context
