"""`fastpeft serve` among honest and hostile clients, files that change under it, and processes that are killed.

SmolLM2 (`--quick`: a tiny random model) in float32, eight adapters of which four are resident, at most 128 open files.
Twelve honest clients ask for adapters and compare each answer with that of the adapter alone, made before by
transformers' `generate`. Two processes of hostile ones do what `chaos_clients.py` lists, at random, and are killed at
random; meanwhile adapters are replaced, cut, mended, linked to files elsewhere, removed. Everything that is drawn comes
from `--seed`; only when things meet does not. Afterwards no answer was wrong or lost, the probe of health was never
slow, nothing is left open, memory does not grow, and SIGHUP or SIGTERM ends the server while requests are half sent.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..measure import Stats
from ..results import Row
from .pool import write_adapters
from .serve import Clients, Server
from .serve_clients import PROMPTS
from .whole import model_folder

HONEST, HOSTILE, ADAPTERS, RESIDENT, FILES = 12, 3, 8, 4, 128
TOKENS = 12
LEAD = 1e-3  # of the likeliest logit over the next: a smaller one may be another's in another batch
SLOWEST = 2.0  # seconds for the probe of health
MINUTES = {"quick": 1.0, "full": 10.0}


@dataclass
class Seen:
    """The sights of the processes of clients, and the server's memory: (share of the time, MiB)."""

    honest: list[dict[str, Any]] = field(default_factory=list)
    hostile: list[dict[str, Any]] = field(default_factory=list)
    health: list[dict[str, Any]] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    killed: int = 0
    done: Counter[str] = field(default_factory=Counter)  # to files


class Files:
    """The folder of adapters, and what happens to it."""

    def __init__(self, folder: Path, root: Path, rng: random.Random, strength: float = 0.05) -> None:
        import torch
        from fastpeft.apps.training import models
        from safetensors.torch import load_file, save_file

        self.root, self.outside, self.rng = root / "adapters", root / "outside", rng
        self.root.mkdir()
        model = models.empty_model(models.Source(str(folder), "bench"), torch.float32)
        write_adapters(model, self.root, ADAPTERS, strength)
        self.config, self.tensors = "adapter_config.json", "adapter_model.safetensors"
        self.swapped = self.root / "swap"
        for name in ("swap", "huge", "cut"):
            shutil.copytree(self.root / "a0", self.root / name)
        shutil.copytree(self.root / "a0", self.outside)
        (self.root / "link").mkdir()
        for name in (self.config, self.tensors):
            (self.root / "link" / name).symlink_to(self.outside / name)
        huge = {k: torch.full_like(v, 3e38) for k, v in load_file(self.root / "a0" / self.tensors).items()}
        save_file(huge, self.root / "huge" / self.tensors)
        self.cut()

    def write(self, name: str, content: bytes) -> None:
        """The tensors of an adapter, replaced at once."""
        new = self.root / name / ".new"
        new.write_bytes(content)
        new.replace(self.root / name / self.tensors)

    def swap(self) -> None:
        self.write("swap", (self.root / self.rng.choice(["a0", "a1"]) / self.tensors).read_bytes())

    def cut(self) -> None:
        whole = (self.root / "a0" / self.tensors).read_bytes()
        self.write("cut", whole[: self.rng.randrange(len(whole))])

    def a_flipped_byte(self) -> None:
        content = bytearray((self.root / "a0" / self.tensors).read_bytes())
        content[self.rng.randrange(min(2000, len(content)))] ^= 1 << self.rng.randrange(8)
        self.write("cut", bytes(content))

    def remove(self) -> None:
        shutil.rmtree(self.root / "gone", ignore_errors=True)

    def drop_in(self) -> None:
        self.remove()
        shutil.copytree(self.root / "a1", self.root / "gone")

    def a_pipe(self) -> None:
        folder = self.root / "fifo"
        if not folder.exists():
            folder.mkdir()
            os.mkfifo(folder / self.tensors)
            os.mkfifo(folder / self.config)

    def change(self) -> str:
        name = self.rng.choice(["swap", "swap", "cut", "a_flipped_byte", "remove", "drop_in", "a_pipe"])
        getattr(self, name)()
        return name


def right_answers(folder: Path, adapters: Path) -> list[dict[str, Any]]:
    """Requests and their right answers: each adapter alone, by transformers' `generate`."""
    import fastpeft
    import torch
    import transformers
    from fastpeft.apps.serve.text import Decoder
    from rich.progress import track

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts: dict[tuple[str, str], str] = {}
    for name in track(["base", *(f"a{i}" for i in range(ADAPTERS))], description="each adapter alone"):
        model = base if name == "base" else fastpeft.PeftModel.from_pretrained(base, str(adapters / name)).eval()
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            with torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, output_logits=True,
                                            return_dict_in_generate=True, pad_token_id=0)  # fmt: skip
            leads = [(best[0] - best[1]).item() for best in (z[0].topk(2).values for z in out.logits)]
            ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            decoder = Decoder(tokenizer)
            text = "".join(decoder.push(i) for i in ids if i != tokenizer.eos_token_id) + decoder.flush()
            if min(leads) > LEAD:
                texts[name, prompt] = text
        if name != "base":
            base = model.unload()
    different = {prompt: len({text for (_, p), text in texts.items() if p == prompt}) for prompt in PROMPTS}
    telling = [prompt for prompt, count in different.items() if count > ADAPTERS / 2]
    if len(telling) < 3:
        raise RuntimeError(f"the adapters' answers hardly differ, so that nothing would be seen: {different}")
    texts = {key: text for key, text in texts.items() if key[1] in telling}
    cases = [{"model": name, "prompt": prompt, "tokens": TOKENS, "texts": [text]}
             for (name, prompt), text in texts.items()]  # fmt: skip
    both = [prompt for prompt in PROMPTS if ("a0", prompt) in texts and ("a1", prompt) in texts]
    cases += [{"model": "swap", "prompt": p, "tokens": TOKENS, "texts": [texts["a0", p], texts["a1", p]]} for p in both]
    return cases


def addresses() -> bool:
    """True if a client can have an address of its own on this machine (Linux; elsewhere all are 127.0.0.1)."""
    try:
        with socket.socket() as sock:
            sock.bind(("127.0.1.1", 0))
    except OSError:
        return False
    return True


def under_load(server: Server, files: Files, cases: list[dict[str, Any]], seconds: float, seed: int) -> Seen:
    rng, seen = random.Random(seed), Seen()
    task = {"url": server.url, "seed": seed, "addresses": addresses(), "cases": cases, "idle": FILES}
    begin = time.monotonic()
    honest = Clients("chaos_clients", **task, role="honest", count=HONEST, first=1, seconds=seconds)
    hostile: list[tuple[Clients, float | None]] = []
    first = HONEST + 1
    ended: list[Clients] = []
    while honest.process.poll() is None:
        now = time.monotonic() - begin
        for clients, until in hostile:
            if until is not None and now > until and clients.process.poll() is None:
                clients.process.kill()
                seen.killed += 1
        ended += [clients for clients, _ in hostile if clients.process.poll() is not None]
        hostile = [(clients, until) for clients, until in hostile if clients.process.poll() is None]
        while len(hostile) < 2 and now < 0.9 * seconds:
            long = rng.uniform(5, 30)
            clients = Clients("chaos_clients", **{**task, "cases": []}, role="hostile", count=HOSTILE, first=first,
                              seconds=min(long, seconds - now))  # fmt: skip
            hostile.append((clients, now + rng.uniform(0.3, 1) * long if rng.random() < 0.5 else None))
            first += HOSTILE
        seen.done[files.change()] += 1
        seen.memory.append((now / seconds, server.memory()))
        time.sleep(0.5)
    for clients, _ in hostile:  # they may hold connections for long
        clients.process.kill()
        seen.killed += 1
    for clients in [honest, *ended, *(clients for clients, _ in hostile)]:
        clients.wait()
    seen.honest = [one for one in honest.seen if "health" not in one]
    seen.health = [one for one in honest.seen if "health" in one]
    seen.hostile = [one for clients in [*ended, *(clients for clients, _ in hostile)] for one in clients.seen]
    return seen


def end_half_sent(server: Server, by: signal.Signals) -> tuple[int, float]:
    """The exit code, and the seconds it took, while requests are half sent and others say nothing."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    with_more = [socket.create_connection((host, int(port))) for _ in range(20)]
    try:
        for i, sock in enumerate(with_more):
            sock.sendall([b"", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{", b"GET /hea"][i % 3])
        begin = time.monotonic()
        return server.end(by), time.monotonic() - begin
    finally:
        for sock in with_more:
            sock.close()


def rows(args: argparse.Namespace) -> Iterator[Row]:
    minutes = args.minutes or MINUTES["quick" if args.quick else "full"]
    with tempfile.TemporaryDirectory(prefix="fastpeft-chaos-") as name:
        yield run(Path(name), None if args.quick else model_folder(args), minutes, args.seed, args.threads)


def run(root: Path, folder: Path | None, minutes: float, seed: int, threads: int) -> Row:
    """The suite, in an empty folder. folder: the model's; None for a tiny random one."""
    from fastpeft.apps.training.testing import make_tiny_model

    rng = random.Random(seed)
    strength = 0.1 if folder else 1.0  # a tiny model's few features need more for other answers
    folder = folder or make_tiny_model(root / "model")
    files = Files(folder, root, rng, strength)
    cases = right_answers(folder, files.root)
    options = {"max-resident": RESIDENT, "max-batch": 16, "timeout": 60, "grace": 20, "rescan": 1, "dtype": "float32",
               "max-rank": 4, "target-modules": "q_proj,v_proj"}  # fmt: skip
    server = Server(folder, files.root, threads, {**options, "allow-runtime-adapters": True}, files=FILES)
    by = rng.choice([signal.SIGHUP, signal.SIGTERM])
    code: int | None = None
    try:
        open_before = _open_files(server)
        seen = under_load(server, files, cases, 60 * minutes, seed)
        left = _left(server, open_before)
        metrics = server.metrics()
        code, took = end_half_sent(server, by)
    finally:
        if code is None:
            server.end()
    row = Row(f"chaos, {minutes:g} minutes, seed {seed}", {"suite": "chaos", "minutes": minutes, "seed": seed,
              "model": folder.name, "threads": threads, "honest": HONEST, "hostile": 2 * HOSTILE})  # fmt: skip
    judge(row, seen, metrics, left)
    say(row, f"exit code {code} {took:.1f} s after {by.name}, requests half sent", code == 0 and took < 10)
    return row


def _open_files(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def _left(server: Server, open_before: int) -> dict[str, float]:
    """Things open when all clients are gone; they have some seconds to close."""
    names = ("open_requests", "queue_requests", "pool_in_use")
    for _ in range(20):
        metrics = server.metrics()
        left = {name: metrics[f"fastpeft_{name}"] for name in names}
        left["files more than before"] = max(0, _open_files(server) - open_before - 2)  # the metrics' own connection
        if not any(left.values()):
            break
        time.sleep(0.5)
    return left


def say(row: Row, what: str, met: bool) -> None:
    row.notes.append(f"{what}: {'met' if met else 'MISSED'}")
    row.missed |= not met


def judge(row: Row, seen: Seen, metrics: dict[str, float], left: dict[str, float]) -> None:
    wrong = [one for one in seen.honest if not one["same"]]
    lost = [one for one in wrong if one["status"] is None]
    row.stats = {"honest answer": Stats([one["seconds"] for one in seen.honest if one["same"]]),
                 "probe of health": Stats([one["seconds"] for one in seen.health])}  # fmt: skip
    say(row, f"{len(seen.honest)} answers to honest clients: {len(wrong)} wrong, {len(lost)} of them lost",
        bool(seen.honest) and not wrong)  # fmt: skip
    bad = [one for one in seen.hostile if not one["right"]]
    by_fault: dict[str, Counter[str]] = {}
    for one in seen.hostile:
        by_fault.setdefault(one["fault"], Counter())[str(one["status"] or one.get("closed", "held"))] += 1
    for name, statuses in sorted(by_fault.items()):
        row.notes.append(f"{name}: " + ", ".join(f"{n} x {status}" for status, n in sorted(statuses.items())))
    say(row, f"{len(seen.hostile)} faults, {len(bad)} with another status than is right; {seen.killed} processes "
        f"killed; files: {dict(seen.done)}", bool(seen.hostile) and not bad)  # fmt: skip
    slowest = max((one["seconds"] for one in seen.health), default=0.0)
    failed = sum(one["health"] != 200 for one in seen.health)
    say(row, f"{len(seen.health)} probes of health: the slowest {slowest:.2f} s, {failed} not 200",
        bool(seen.health) and not failed and slowest < SLOWEST)  # fmt: skip
    restarts = metrics["fastpeft_engine_restarts_total"]
    say(row, f"{restarts:.0f} restarts of the engine", not restarts)
    say(row, f"left open afterwards: {left}", not any(left.values()))
    early, late = (statistics.mean([mib for at, mib in seen.memory if low <= at <= high] or [0])
                   for low, high in ((0.3, 0.5), (0.8, 1.0)))  # fmt: skip
    say(row, f"resident memory {early:.0f} MiB from 0.3 to 0.5 of the time, {late:.0f} in the last fifth",
        0 < late <= 1.03 * early)  # fmt: skip
    row.notes += [f"wrong: {json.dumps(one)}" for one in [*wrong[:5], *bad[:10]]]
