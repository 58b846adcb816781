"""The process of `fastpeft serve`: load, listen, answer until a signal, end in order."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn

from ...pool import AdapterPool
from ..training import models
from ..training.errors import UserError
from ..training.gguf_base import names_gguf
from ..training.inference import end_tokens
from .adapters import Adapters
from .api import Service
from .connections import Gate, places
from .engine import Engine
from .limits import BodyLimits, ConnectionLimits, Limits
from .metrics import Metrics

Say = Callable[[str], None]
# Batches come in all sizes, and for each, on a CPU in bfloat16, torch and oneDNN keep a compiled product with every
# shape of weight, 1024 of them: a gigabyte after some minutes. 128 are enough for the sizes of now, and one that is
# missing costs a millisecond. Read at the first product.
_ONEDNN_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
_STORED = {"nf4": "NF4", "gguf": "as it lies"}
_CACHED = 512  # tokens of the cache for each request of a batch, if nothing else is said
_BACKLOG = 2048  # connections that the system keeps until they are accepted
_SPARE = 4  # connections beside those of requests, for /health and the like
_SHARE = 0.25  # of the machine's memory that the cache takes at most then


@dataclass(frozen=True)
class Options:
    """Options of `fastpeft serve`. cache_tokens: None for what fits. grace: seconds for open requests at the end.
    rescan: seconds after which the directory is looked through again."""

    model: str
    adapters: Path | None = None
    nf4: bool = False
    name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    max_resident: int = 32
    max_rank: int | None = None
    max_virtual_tokens: int | None = None
    target_modules: list[str] | None = None
    max_length: int | None = None
    cache_tokens: int | None = None
    limits: Limits = field(default_factory=Limits)
    bodies: BodyLimits = field(default_factory=BodyLimits)
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    grace: int = 30
    rescan: float = 10.0
    by_request: bool = False
    access_log: bool = False
    cache_quantized: bool = False
    quantize_embeddings: bool = False


@dataclass
class Loaded:
    """A server's parts before it listens."""

    service: Service
    note: str
    name: str
    pool: AdapterPool | None

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()


def load(options: Options, say: Say) -> Loaded:
    """The model, the pool and the application. Raises UserError."""
    for name in _ONEDNN_CACHES:
        os.environ.setdefault(name, "128")
    if options.by_request and options.adapters is None:
        raise UserError("--allow-runtime-adapters needs a directory of adapters", "give --adapters DIR")
    if options.bodies.max_body > min(options.bodies.client_memory, options.bodies.body_memory):
        raise UserError("--max-body is more than --client-memory or --body-memory", "lower it or raise those")
    storage = "nf4" if options.nf4 else "gguf" if names_gguf(options.model) else "none"
    source = models.resolve(options.model, storage)
    device = models.pick_device(options.device)
    dtype = models.pick_dtype(options.dtype, device)
    say(f"loading {source.note}{', quantising it to NF4' if options.nf4 else ''}")
    tokenizer = models.load_tokenizer(source)
    if options.cache_quantized and not options.nf4:
        raise UserError("--cache-quantized, and the base is not quantised", "give --nf4 as well")
    if options.quantize_embeddings and not options.nf4:
        raise UserError("--quantize-embeddings, and the base is not quantised", "give --nf4 as well")
    how = {"quantize_embeddings": options.quantize_embeddings}
    model = models.load_base(source, dtype, device, storage, how, cache=options.cache_quantized, say=say)
    pool = None if options.adapters is None else _pool(model, options, say)
    for why in models.speed_up(model):
        say(f"layers: {why}")
    limits = _limits(model, device, dtype, options)
    engine = Engine(model, pool, end_tokens(model, tokenizer), limits, Metrics())
    name = options.name or _name_of(options.model)
    if pool is not None and name in pool:
        say(f"warning: adapter {name!r} has the base model's name and cannot be asked for; see --served-model-name")
    adapters = Adapters(engine, name, options.adapters, options.by_request, options.rescan)
    note = f"{source.note}, {_STORED.get(storage, 'dense')}, {str(dtype).removeprefix('torch.')} on {device}"
    return Loaded(Service(engine, tokenizer, adapters, options.bodies), note, name, pool)


def _name_of(model: str) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _pool(model: Any, options: Options, say: Say) -> AdapterPool:
    directory = options.adapters
    assert directory is not None
    if not directory.is_dir():
        raise UserError(f"--adapters {directory} is no folder", "give the folder that holds the adapters' folders")
    targets: Any = options.target_modules
    if targets is None and not any(directory.glob("*/adapter_config.json")):
        say(f"{directory} holds no adapter yet: all linear layers are made ready for some")
        targets = "all-linear"
    say(f"preparing {options.max_resident} slots for the adapters of {directory}")
    pool = AdapterPool(
        model, directory, options.max_resident, target_modules=targets, max_rank=options.max_rank, loaders=2,
        max_virtual_tokens=options.max_virtual_tokens,
    )  # fmt: skip
    if not pool.layers:
        say("they are prompts alone: no layer is made ready for LoRA; --target-modules does that")
    return pool


def _limits(model: Any, device: torch.device, dtype: torch.dtype, options: Options) -> Limits:
    """options.limits, with a cache and a length that this model and machine have."""
    config, asked = model.config.get_text_config(), options.limits
    longest = int(getattr(config, "max_position_embeddings", asked.max_length))
    length = min(asked.max_length, longest) if options.max_length is None else options.max_length
    if length > longest:
        raise UserError(f"--max-length {length} is more than the model's {longest} positions", "lower it")
    cache = options.cache_tokens
    if cache is None and device.type == "cpu":  # on a GPU transformers takes what is free
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * heads * width * dtype.itemsize
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        cache = max(length, min(_CACHED * asked.max_batch, int(_SHARE * memory) // per_token))
    if cache is not None and cache < length:
        raise UserError(f"--cache-tokens {cache} is less than one request's {length}", "raise it or lower --max-length")
    return Limits(length, asked.max_batch, asked.max_queue, asked.batch_tokens, asked.page, cache, asked.timeout)


class Server(uvicorn.Server):
    """uvicorn's, behind a `Gate`. It tells when it is ready, and ends with exit code 0 after a signal.

    places: connections that there may be, and that are accepted in one turn of the event loop."""

    def __init__(
        self, loaded: Loaded, options: Options, places: tuple[int, int], ready: Callable[[], None], say: Say
    ) -> None:
        self._engine, self._ready, self._say = loaded.service.engine, ready, say
        most, at_once = places
        self.gate = Gate(options.connections, most, loaded.service.metrics)
        super().__init__(uvicorn.Config(
            loaded.service.app(), log_config=uvicorn.config.LOGGING_CONFIG if options.access_log else None,
            # below an error, uvicorn logs what any client can cause; metrics count that
            log_level="info" if options.access_log else "error", access_log=options.access_log,
            timeout_graceful_shutdown=options.grace, lifespan="on", http=self.gate.protocol(), ws="none",
            h11_max_incomplete_event_size=options.connections.header_bytes, backlog=at_once,
            timeout_keep_alive=options.connections.idle_timeout,  # type: ignore[arg-type]
        ))  # fmt: skip

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or []:
            sock.listen(_BACKLOG)  # asyncio has one number for the queue and for how many it accepts at once
        self._watching = asyncio.ensure_future(self.gate.watch())
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.gate.ending = True
        await super().shutdown(sockets)
        self._watching.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it is to be ignored
            handled.append(signal.SIGHUP)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield  # uvicorn would raise the signal once more here, and the process end as if it was killed
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:  # asked twice; SIGHUP comes with a SIGTERM where a terminal or a session ends
            self.force_exit = self.force_exit or sig != signal.SIGHUP
            return
        self._engine.draining = True
        self.should_exit = True
        self._say(f"{signal.Signals(sig).name}: no new requests; {self._engine.open} open ones may end")


def listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG
        )
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror or error}", "choose another --port"
        ) from error


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _fitting(options: Options, connections: int, say: Say) -> Options:
    """options, with no more requests at once than connections leave room for."""
    limits, most = options.limits, max(1, connections - _SPARE)
    if limits.max_batch + limits.max_queue <= most:
        return options
    say(f"warning: {connections} connections have room for {most} requests at once; see --max-connections, ulimit -n")
    batch = min(limits.max_batch, most)
    return dataclasses.replace(
        options, limits=dataclasses.replace(limits, max_batch=batch, max_queue=most - batch)
    )


def serve(options: Options, say: Say, ready: Callable[[dict[str, Any]], None]) -> None:
    """Run until SIGTERM or SIGINT. say: lines for people; ready: called once, with where and what."""
    with contextlib.closing(listen(options.host, options.port)) as sock:
        room = places(options.connections)
        loaded = load(_fitting(options, room[0], say), say)
        gc.collect()
        gc.freeze()  # what is there now stays; to look through it again would stop every thread for some 0.2 s
        host = f"[{options.host}]" if ":" in options.host else options.host
        url = f"http://{host}:{sock.getsockname()[1]}"
        names = loaded.service.adapters.names()
        if not is_loopback(options.host):
            say(f"warning: whoever reaches {url} can use this server: it asks for no password and speaks no TLS")
        described = {
            "url": url, "pid": os.getpid(), "model": loaded.name, "base": loaded.note, "adapters": len(names),
            "max_length": loaded.service.engine.limits.max_length,
        }  # fmt: skip
        server = Server(loaded, options, room, lambda: ready(described), say)
        try:
            server.run(sockets=[sock])
        finally:
            loaded.close()
    say("ended")
