"""Bodies of requests: received within bounds of time and memory, and decoded beside the event loop.

What is small is decoded at once, which takes about a millisecond. The rest waits its turn for a few threads; more of
them would not be quicker under one interpreter lock, and the event loop would wait longer for that lock.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from .errors import ApiError, bad
from .limits import BodyLimits
from .metrics import Metrics

T = TypeVar("T")

_SMALL = 16 << 10  # bytes
_THREADS = 2
_FIELDS = 128  # of a JSON object; each unknown one is an error of its own
_OBJECTS = 10_000  # of JSON: messages and parts of them; the lock is held while they are validated, 7 us for each
_RETRY = 1  # seconds


@dataclass(eq=False)
class _Body:
    """One that is being received, or waits to be decoded. refused: it had to make room."""

    client: str
    content: bytearray = field(default_factory=bytearray)
    whole: bool = False
    task: asyncio.Task[None] | None = None
    refused: ApiError | None = None


class Bodies:
    """All bodies of a server. most_values: values, lists and objects that the JSON of one may hold."""

    def __init__(self, limits: BodyLimits, most_values: int, metrics: Metrics) -> None:
        self.limits, self.most_values, self.metrics = limits, most_values, metrics
        self.bytes = 0
        self._of: Counter[str] = Counter()
        self._open: dict[_Body, None] = {}  # oldest first
        self._turn = asyncio.Semaphore(_THREADS)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="fastpeft-decode")
        metrics.watch("fastpeft_body_bytes", "Of bodies that are received or wait to be decoded.", lambda: self.bytes)

    async def read(self, request: Request, then: Callable[[object], T]) -> T:
        """`then` of the JSON value in a request's body, on a thread if it is large. Raises ApiError."""
        said = request.headers.get("content-length", "")
        if said.isdecimal() and (len(said) > 18 or int(said) > self._max_body):
            raise self._too_large()
        body = _Body(request.client.host if request.client else "")
        self._open[body] = None
        try:
            await self._receive(request, body)
            size = len(body.content)
            return await self.beside(lambda: then(decode(body.content, self.most_values)), size, request)
        except ApiError as error:
            if error.code == "too_many_values":
                self.metrics.refused.labels(error.code).inc()
            raise
        finally:
            del self._open[body]
            self._release(body)

    async def beside(self, work: Callable[[], T], size: int, request: Request | None = None) -> T:
        """The result of `work` on `size` bytes; on a thread if they are many, unless the client is gone by then."""
        if size < _SMALL:
            return work()
        async with self._turn:
            if request is not None and await request.is_disconnected():
                raise went_away()
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _receive(self, request: Request, body: _Body) -> None:
        task = body.task = asyncio.ensure_future(self._collect(request, body))
        try:
            done, _ = await asyncio.wait({task}, timeout=self.limits.body_timeout)
            if body.refused is not None:
                raise body.refused
            if not done:
                self.metrics.timed_out.labels("body").inc()
                raise ApiError(408, f"the body was not whole within {self.limits.body_timeout:g} s", "body_timeout")
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _collect(self, request: Request, body: _Body) -> None:
        try:
            async for part in request.stream():
                self._take(body, part)
        except ClientDisconnect:
            raise went_away() from None
        body.whole = True

    def _take(self, body: _Body, part: bytes) -> None:
        body.content += part
        self.bytes += len(part)
        self._of[body.client] += len(part)
        if len(body.content) > self._max_body:
            raise self._too_large()
        while True:
            if self._of[body.client] > self.limits.client_memory * (1 << 20):
                code, why, status, client = "client_memory", "this client's bodies take", 429, body.client
            elif self.bytes > self.limits.body_memory * (1 << 20):
                code, why, status, client = "body_memory", "all clients' bodies take", 503, None
            else:
                return
            self.metrics.refused.labels(code).inc()
            error = ApiError(status, f"{why} too much memory; try again", code, retry_after=_RETRY)
            # One that has been on its way for long makes room: it is more likely a client that never ends it.
            waiting = (each for each in self._open if not each.whole and each.refused is None)
            oldest = next(each for each in waiting if client is None or each.client == client)
            oldest.refused = error
            if oldest is body:
                raise error
            self._release(oldest)
            assert oldest.task is not None
            oldest.task.cancel()

    def _release(self, body: _Body) -> None:
        self.bytes -= len(body.content)
        self._of[body.client] -= len(body.content)
        if not self._of[body.client]:
            del self._of[body.client]
        body.content = bytearray()

    @property
    def _max_body(self) -> int:
        return int(self.limits.max_body * (1 << 20))

    def _too_large(self) -> ApiError:
        self.metrics.refused.labels("too_large").inc()
        return ApiError(413, f"the body is larger than {self.limits.max_body:g} MiB", "too_large")


def went_away() -> ApiError:
    """For a client that went away; nobody receives it. 499 is what nginx counts it as."""
    return ApiError(499, "the client went away")


def decode(content: bytes | bytearray, most_values: int) -> object:
    """The JSON value in `content`. Raises ApiError."""
    if _too_many(content, most_values):
        most = f"{most_values} values or {_OBJECTS} objects"
        raise ApiError(413, f"the body holds more than {most}, which no request of this server has", "too_many_values")
    try:
        text = content.decode("utf-8-sig")
        found: object = json.loads(text, object_pairs_hook=_object)
        if "\\u" in text:  # halves of characters, which no tokenizer takes, are a UnicodeEncodeError here
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not JSON: {error}") from None


def _too_many(content: bytes | bytearray, most: int) -> bool:
    """JSON with more than `most` values, lists and objects, or more than `_OBJECTS` objects. They are counted before
    any is made: each takes up to a hundred times the memory of its two bytes."""

    def count(part: bytes | bytearray) -> tuple[int, int]:
        objects = part.count(b"{")
        return part.count(b",") + part.count(b"[") + objects, objects

    values, objects = count(content)
    if values <= most and objects <= _OBJECTS:
        return False
    # what is in strings does not count: every other part between quotes, once escapes are out
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    values = objects = 0
    text = False
    for start in range(0, len(plain), _SMALL):
        parts = plain[start : start + _SMALL].split(b'"')
        more = count(b"".join(parts[text::2]))
        values, objects = values + more[0], objects + more[1]
        if values > most or objects > _OBJECTS:
            return True
        text ^= len(parts) % 2 == 0
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _FIELDS:
        raise ValueError(f"an object has {len(pairs)} fields, more than {_FIELDS}")
    return dict(pairs)
