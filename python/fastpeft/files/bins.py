"""Tensors of `.bin` files, which are pickles: they are read in a child process, and come out of it as safetensors.

The child reads with `weights_only=True`, under limits of memory and time, and writes a safetensors file that is checked
here as a stranger's. So what a file does to its reader (a crash, memory without end) stays in the child.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from .checks import AdapterFileError, Confined, name_of, open_regular
from .safetensors import read_header, read_tensors

ALLOW_ENV = "FASTPEFT_ALLOW_BIN"
SPARE_BYTES = 512 << 20  # what reading takes beside the file
_TIMES = 4  # the file, its tensors, their bytes in the other format, and whatever the allocators keep
_SECONDS, _BYTES_A_SECOND = 60, 20 << 20


def allowed() -> bool:
    """`FASTPEFT_ALLOW_BIN=1` allows `.bin` files to the whole process, which then keeps one child to read them."""
    return os.environ.get(ALLOW_ENV) == "1"


def read_bin(path: Path | Confined) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, read as `write_as_safetensors` does. Raises AdapterFileError."""
    with tempfile.TemporaryDirectory() as folder:
        write_as_safetensors(path, goal := Path(folder, "read.safetensors"))
        return read_tensors(read_header(goal))


def write_as_safetensors(path: Path | Confined, goal: Path) -> None:
    """Write the tensors of the `.bin` file `path` as the safetensors file `goal`, which is not checked yet.

    Raises AdapterFileError for what is no dictionary of dense tensors by name, holds more bytes than the file, or takes
    more memory (four times the file and 512 MiB) or time than reading has to.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        with _reader() as reader:
            problem = reader.read(file, size, goal)
    if problem:
        raise AdapterFileError(f"{path}: {problem}", f"{name_of(path)}: not read as a file of tensors only")


@contextmanager
def _reader() -> Iterator[_Reader]:
    """A child for one file; with `FASTPEFT_ALLOW_BIN=1` the one that is kept, which a thread at a time uses."""
    global _kept
    if not allowed():
        with _Reader() as reader:
            yield reader
        return
    with _lock:
        if _kept is None or _kept.owner != os.getpid() or _kept.process.poll() is not None:
            _kept = _Reader()  # the first, after a fork, or after a file that ended it
        yield _kept


class _Reader:
    """A child process that reads one `.bin` file after another; it ends with the process that made it."""

    def __init__(self) -> None:
        # What it imports is what this process would: the paths are handed on, and no working directory comes first.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"], cwd=Path(__file__).parents[2],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # bytes that it did not take
                pipe.close()  # type: ignore[union-attr]

    def read(self, file: BinaryIO, size: int, goal: Path) -> str:
        """Have a file of `size` bytes written to `goal`; what stood against it, or an empty text."""
        seconds = _SECONDS + size / _BYTES_A_SECOND
        stop = threading.Timer(seconds, self.process.kill)
        stop.start()
        sent, answer = self.process.stdin, b""
        assert sent is not None
        assert self.process.stdout is not None
        try:
            job = {"bytes": size, "goal": str(goal), "spare": _TIMES * size + SPARE_BYTES}
            sent.write(json.dumps(job).encode() + b"\n")
            shutil.copyfileobj(file, sent, 1 << 20)
            sent.flush()
            answer = self.process.stdout.readline()
        except OSError:
            answer = b""  # of a child that is gone
        finally:
            stop.cancel()
            if not answer:  # it would take the next file for the rest of this one, where an interrupt was the reason
                self.process.kill()
                code = self.process.wait()
        if answer:
            return str(json.loads(answer)["problem"])
        return f"the process that read it ended with code {code} (it may take {seconds:.0f} s and a bounded memory)"


_kept: _Reader | None = None
_lock = threading.Lock()


@atexit.register
def _end_kept() -> None:
    if _kept is not None and _kept.owner == os.getpid():
        _kept.__exit__()


# In the child


def serve() -> None:
    """Read jobs from stdin, each a line of json and a file's bytes, and answer each with a line, until stdin ends."""
    import torch  # noqa: F401 (before memory is counted)

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while line := sys.stdin.buffer.readline():
        job = json.loads(line)
        problem = _convert(io.BytesIO(sys.stdin.buffer.read(job["bytes"])), job)
        answers.write(json.dumps({"problem": problem}).encode() + b"\n")
        answers.flush()


def _convert(data: BinaryIO, job: dict[str, Any]) -> str:
    import torch
    from safetensors.torch import save_file

    try:
        with _memory_limit(job["spare"]):
            found = torch.load(data, map_location="cpu", weights_only=True)
            if problem := _problem(found, job["bytes"]):
                return problem
            # Copies, since safetensors refuses tensors that share memory.
            save_file({key: value.detach().clone().contiguous() for key, value in found.items()}, job["goal"])
    except Exception as error:  # the unpickler raises whatever the file makes it raise
        lines = str(error).splitlines() or [type(error).__name__]
        if isinstance(error, MemoryError) or "allocate memory" in lines[0]:
            return f"reading it takes more memory than {job['spare']} bytes"
        return f"not a file of tensors only ({lines[0][:200]})"
    return ""


def _problem(found: object, size: int) -> str:
    import torch

    if not isinstance(found, dict) or not all(
        isinstance(key, str) and type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        for key, value in found.items()
    ):
        return "expected a dictionary of tensors by name"
    if sum(tensor.numel() * tensor.element_size() for tensor in found.values()) > size:
        return f"its tensors claim more than the file's {size} bytes"
    return ""


@contextmanager
def _memory_limit(spare: int) -> Iterator[None]:
    """Let this process have `spare` bytes of address space beyond what it has now."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError):
        raise OSError("this system has no limit of memory to read it under; convert it on Linux") from None
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * os.sysconf("SC_PAGESIZE") + spare
    most = most if before[1] == resource.RLIM_INFINITY else min(most, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
