"""Processes that compute together: a script once for each rank, with what they said if one fails."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def rendezvous() -> dict[str, str]:
    """The environment in which two processes find each other, as launchers set it; `run_ranks` adds the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def beside_python() -> dict[str, str]:
    """PATH with the programs of this Python's environment first: DeepSpeed looks for ninja."""
    return {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def run_ranks(
    script: Path, folder: Path, *arguments: str, own: Mapping[str, str] | None = None, count: int = 2,
    timeout: int = 900,
) -> None:  # fmt: skip
    """`script RANK FOLDER ARGUMENTS...` once for each rank, at the same time. own: of the environment.

    timeout: seconds, many times what they take on two idle cores; who has not ended by then says where it stands.
    """
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "tests" / "tools")))
    common = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **(own or {})}
    logs = [folder / f"log{rank}" for rank in range(count)]
    started = []
    for rank, log in enumerate(logs):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in common else {}
        with log.open("w") as file:
            command = [sys.executable, str(script), str(rank), str(folder), *arguments]
            started.append(subprocess.Popen(command, env={**common, **ranks}, stdout=file, stderr=file))
    try:
        codes = [process.wait(timeout=timeout) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)  # upon which faulthandler writes the stacks
        for process, log in zip(started, logs, strict=True):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
            print(log.read_text()[-4000:])
    assert codes == [0] * count
