"""`fastpeft serve` under load: 64 clients at once for two minutes on SmolLM2 and 64 adapters, 32 of them resident.

Each client asks, waits for the answer and asks again: an adapter by Zipf's law, sometimes the base, an unknown adapter
(404) or a corrupt one (422); half of the answers are streams. After a quarter of the time corrupt adapter folders are
dropped in; at half of it 16 of the clients are killed in the middle of their requests. Afterwards every request has
ended with the right status, nothing is open, no slot is held, memory has stopped growing, and SIGTERM ends the server
with exit code 0. The clients run on the same cores as the server.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from ..machine import ROOT
from ..measure import Stats
from ..results import Row
from .pool import write_adapters
from .whole import model_folder

CLIENTS, KILLED, ADAPTERS, RESIDENT = 64, 16, 64, 32
CORRUPT = ["cut", "empty", "no-json", "wrong-shape"]


class Server:
    """The server's process. Raises RuntimeError with its errors if it does not start.

    options: those of `fastpeft serve`, True for a switch. files: how many it may have open.
    """

    def __init__(
        self, folder: Path, adapters: Path, threads: int, options: dict[str, object], files: int | None = None
    ) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value)) if word != "True"]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115

        def limited() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, also by those that it starts
            if files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastpeft", "serve", str(folder), "--adapters", str(adapters), "--port", "0",
             "--served-model-name", "base", "--json", *words],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=self.errors, env=environment, preexec_fn=limited,
        )  # fmt: skip
        assert self.process.stdout is not None
        told = ""
        for line in self.process.stdout:
            told += line
            if line == "}\n":
                break
        else:
            raise RuntimeError(f"the server did not start: {self.said()}")
        self.url: str = json.loads(told)["url"]
        self.base: str = json.loads(told)["base"]

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-2000:]

    def memory(self) -> float:
        """Resident MiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] != "#"}

    def end(self, by: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(by)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Clients:
    """A process of clients, `bench/suites/MODULE.py`. `seen` has what they wrote, also when it was killed."""

    def __init__(self, module: str, **task: Any) -> None:
        command = [sys.executable, "-m", f"bench.suites.{module}", json.dumps(task)]
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
        self.seen: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # the last of a killed process may be cut
                self.seen.append(json.loads(line))

    def wait(self) -> int:
        code = self.process.wait()
        self._reader.join()
        return code


def drop_in(root: Path) -> None:
    """Folders that look like adapters and are none."""
    config, tensors = (root / "a0" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    for name in CORRUPT:
        folder = root / f".{name}"  # not looked at before it is whole
        folder.mkdir()
        (folder / config.name).write_bytes(config.read_bytes() if name != "no-json" else b'{"peft_type": "LORA"')
        whole = tensors.read_bytes()
        (folder / tensors.name).write_bytes({"cut": whole[:-1000], "empty": b""}.get(name, whole))
        if name == "wrong-shape":
            content = json.loads(config.read_text())
            (folder / config.name).write_text(json.dumps({**content, "r": content["r"] + 1}))
        folder.rename(root / name)


def under_load(server: Server, root: Path, seconds: float) -> tuple[Clients, Clients, list[tuple[float, float]]]:
    """The load: those that stay, those that are killed, and (seconds, MiB) of the server."""
    task = {"url": server.url, "seconds": seconds, "adapters": ADAPTERS, "corrupt": CORRUPT, "after": seconds / 4 + 1}
    begin = time.monotonic()
    stay = Clients("serve_clients", **task, count=CLIENTS - KILLED, seed=0)
    killed = Clients("serve_clients", **task, count=KILLED, seed=1000)
    memory = []
    dropped = False
    while stay.process.poll() is None:
        now = time.monotonic() - begin
        if not dropped and now > seconds / 4:
            dropped = True
            drop_in(root)
        if killed.process.poll() is None and now > seconds / 2:
            killed.process.kill()
        memory.append((now, server.memory()))
        time.sleep(0.5)
    stay.wait()
    killed.wait()
    return stay, killed, memory


def rows(args: argparse.Namespace) -> Iterator[Row]:
    import torch
    from fastpeft.apps.training import models

    seconds = 20.0 if args.quick else 120.0
    folder = model_folder(args)
    with tempfile.TemporaryDirectory(prefix="fastpeft-serve-") as name:
        root = Path(name)
        write_adapters(models.empty_model(models.Source(str(folder), "bench"), torch.float32), root, ADAPTERS)
        server = Server(folder, root, args.threads, {"max-resident": RESIDENT, "max-batch": CLIENTS})
        try:
            begin = time.monotonic()
            stay, killed, memory = under_load(server, root, seconds)
            took = time.monotonic() - begin
            time.sleep(3)  # what the killed ones left is given up within one step
            metrics, base = server.metrics(), server.base
        finally:
            code = server.end()
    yield verdict(args, stay.seen, killed.seen, memory, metrics, took, code, base)


def verdict(
    args: argparse.Namespace, stay: list[dict[str, Any]], killed: list[dict[str, Any]],
    memory: list[tuple[float, float]], metrics: dict[str, float], took: float, code: int, base: str,
) -> Row:  # fmt: skip
    right = {"nobody": 404, **dict.fromkeys(CORRUPT, 422)}
    seen = stay + killed
    lost = [one for one in seen if one["status"] is None]
    wrong = [one for one in seen if one["status"] not in (None, right.get(one["model"], 200))]
    statuses = Counter(one["status"] for one in seen)
    counted: Counter[str] = Counter()
    for key, value in metrics.items():
        if key.startswith("fastpeft_requests_total{"):
            counted[key.split('status="')[1].split('"')[0]] += int(value)
    # what the server says it answered and the clients saw; a killed client may not have written its last
    agree = all(0 <= counted[str(s)] - n <= KILLED for s, n in statuses.items() if s is not None)
    left = {k: metrics[f"fastpeft_{k}"] for k in ("open_requests", "queue_requests", "pool_in_use")}
    end = memory[-1][0]
    late = [mib for at, mib in memory if at > 0.75 * end]
    half = [mib for at, mib in memory if 0.5 * end < at <= 0.75 * end]
    growth = max(late) - max(half)
    made = sum(v for k, v in metrics.items() if k.startswith("fastpeft_generated_tokens_total{"))
    ok = [one for one in seen if one["status"] == 200]
    row = Row(f"{CLIENTS} clients, {took:.0f} s", {"suite": "serve", "clients": CLIENTS, "adapters": ADAPTERS,
              "resident": RESIDENT, "seconds": round(took), "threads": args.threads, "model": base})  # fmt: skip
    row.stats = {
        "answer": Stats([one["seconds"] for one in ok]),
        "first token of a stream": Stats([one["first"] for one in ok if one["first"] is not None]),
        "refusal": Stats([one["seconds"] for one in seen if one["status"] in (404, 422)]),
    }
    row.extra = {
        "p95 s": {name: f"{stats.at(0.95):.2f}" for name, stats in row.stats.items() if stats.samples},
        "p99 s": {name: f"{stats.at(0.99):.2f}" for name, stats in row.stats.items() if stats.samples},
    }

    def say(what: str, met: bool) -> None:
        row.notes.append(f"{what}: {'met' if met else 'MISSED'}")

    row.notes.append(
        f"{base}: {len(ok) / took:.1f} answers/s, {made / took:.0f} tokens/s in batches of "
        f"{metrics['fastpeft_batch_requests_sum'] / max(1, metrics['fastpeft_batch_requests_count']):.1f} requests; "
        f"{int(metrics['fastpeft_pool_hits_total'])} hits, {int(metrics['fastpeft_pool_misses_total'])} misses, "
        f"{int(metrics['fastpeft_pool_evictions_total'])} evictions of adapters"
    )
    told = ", ".join(f"{n} x {s}" for s, n in sorted(statuses.items(), key=str))
    say(f"answers by status: {told}; {len(wrong)} with another than is right", not wrong and bool(ok))
    say(f"{len(lost)} requests were lost", not lost)
    say(f"the server counted {dict(sorted(counted.items()))} (499: clients that were killed)", agree)
    gone = int(metrics["fastpeft_cancelled_total"])
    say(f"{gone} requests of killed clients were taken out of the batch", gone > 0 and counted["499"] >= gone)
    say(f"left open afterwards: {left}", not any(left.values()))
    at = f"{memory[0][1]:.0f} MiB at first, {half[-1]:.0f} at three quarters, {late[-1]:.0f} at the end"
    grown = f"the largest of the last quarter is {growth:+.1f} MiB over the one before"
    say(f"resident memory {at}; {grown}", growth < 0.02 * half[-1])
    say(f"exit code {code} after SIGTERM", code == 0)
    row.notes += [f"lost: {why}" for why in {one["lost"] for one in lost}]
    row.notes += [f"wrong: {one}" for one in wrong[:5]]
    return row
