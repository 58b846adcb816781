"""Connections of the HTTP server: how many, from whom, and for how long they may be half-sent, idle or unread.

uvicorn bounds requests, not connections: one that sends nothing, or half of a request, is open for ever and holds a
file. `Gate` knows all of them. Each is in a phase: it waits for us ("answer") or we wait for its client, and then it
has a deadline and may be closed to make room. The protocol is uvicorn's over h11, which comes with it, also where
httptools is installed: one parser, whose limits are known.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import json
import logging
import os
import resource
import sys
import time
from collections import Counter
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..training.errors import UserError
from .errors import ApiError, shutting_down
from .limits import ConnectionLimits
from .metrics import Metrics

logger = logging.getLogger("fastpeft.apps.serve")

_MOST = 1024  # connections, if nothing else is said and files allow it
_FILES = 32  # that the process may open after this: a GPU's, adapters being read, the event loop
_TICK = 0.1  # seconds between looks at the deadlines
_PARTS, _PART = 2048, 256  # parts of a body, and bytes for each one more: they cost the event loop time, also if empty
_AHEAD = 64 << 10  # bytes that a client may send behind a request that is not answered
_RETRY = 1  # seconds
_LINGER = 1.0  # seconds for a client to stop sending once an error has ended its connection


def places(limits: ConnectionLimits) -> tuple[int, int]:
    """(connections, connections accepted in one turn of the event loop) that the limit of open files has room for.
    Raises UserError."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 16
    room = 1 << 20 if files == resource.RLIM_INFINITY else files - used - _FILES
    # A quarter is for those that are closed but not gone: accepting, refusing and closing take some turns of the loop.
    most = room * 3 // 4
    asked = limits.max_connections
    if most < 4 or (asked is not None and asked > most):
        what = "a server" if asked is None or most < 4 else f"--max-connections {asked}"
        raise UserError(f"{files} open files are too few for {what}", f"raise `ulimit -n`; here is room for {most}")
    connections = min(_MOST, most) if asked is None else asked
    return connections, max(1, min(128, (room - most) // 4))


class Gate:
    """All connections of a server. most: how many there may be."""

    def __init__(self, limits: ConnectionLimits, most: int, metrics: Metrics) -> None:
        self.limits, self.most, self.metrics = limits, most, metrics
        self.open: dict[Connection, None] = {}
        self.ending = False
        self._of: Counter[str] = Counter()
        self._seconds = {
            "header": limits.header_timeout, "rest": limits.idle_timeout, "unread": limits.idle_timeout,
            "over": _LINGER,
        }  # fmt: skip  # a body's are the application's, an idle connection's uvicorn's
        metrics.watch("fastpeft_open_connections", "Connections that are open.", lambda: len(self.open))

    def protocol(self) -> Any:
        """A class, for uvicorn, of connections behind this gate."""
        return functools.partial(Connection, self)

    def enter(self, one: Connection) -> ApiError | None:
        """The reason for which a new connection has no place."""
        self.metrics.connections.inc()
        if self.ending:
            return self.refuse(shutting_down())
        self.open[one] = None
        self._of[one.address] += 1
        own = self.limits.max_client_connections
        if own is not None and self._of[one.address] > own and not self._make_room(one, one.address):
            text = f"{own} connections of this client are busy, which is all that one may have"
            return self.refuse(ApiError(429, text, "client_connections", retry_after=_RETRY))
        if len(self.open) > self.most and not self._make_room(one, None):
            text = f"all {self.most} connections are busy, which is all this server takes"
            return self.refuse(ApiError(503, text, "connections", retry_after=_RETRY))
        return None

    def leave(self, one: Connection) -> None:
        """One is closed; may be called twice."""
        if one in self.open:
            del self.open[one]
            self._of[one.address] -= 1
            if not self._of[one.address]:
                del self._of[one.address]

    def refuse(self, error: ApiError) -> ApiError:
        self.metrics.refused.labels(error.code or "").inc()
        return error

    def _make_room(self, new: Connection, address: str | None) -> bool:
        """Close the connection whose client was waited for longest, of the address that has most of them."""
        now = time.monotonic()
        waiting = [
            one for one in self.open
            if one is not new and address in (None, one.address) and one.look(now) != "answer"
        ]  # fmt: skip
        if not waiting:
            return False
        crowd, _ = Counter(one.address for one in waiting).most_common(1)[0]
        oldest = min((one for one in waiting if one.address == crowd), key=lambda one: one.since)
        error = ApiError(408, "others wait for this connection's place, and its request is not whole", "made_room")
        oldest.end(self.refuse(error))
        return True

    async def watch(self) -> None:
        """Close what is late, for ever."""
        while True:
            await asyncio.sleep(_TICK)
            now = time.monotonic()
            for one in list(self.open):
                seconds = self._seconds.get(one.look(now))
                if seconds is not None and now - one.since > seconds:
                    if one.phase != "over":
                        self.metrics.timed_out.labels(one.phase).inc()
                    one.end(ApiError(408, f"the request's header was not whole within {seconds:g} s", "header_timeout"))


class Connection(H11Protocol):
    """uvicorn's, with an address and a phase: "answer" (of the request that is whole), or what its client is waited
    for: "header", "body", "rest" (of a body that is answered already), "unread" (an answer that it does not read),
    "over" (an error has ended it), "idle". since: when that began, in seconds of the monotonic clock."""

    def __init__(self, gate: Gate, **given: Any) -> None:
        super().__init__(**given)
        self.gate, self.address = gate, ""
        self.conn = _Parser(h11.SERVER, gate.limits.header_bytes)
        self.phase, self.since = "header", time.monotonic()
        self._seen: object = None  # the request of that phase
        self._over = False  # answered, and what still comes is not read
        self._begun = True  # something of the next request is there, or it is the first

    def look(self, now: float) -> str:
        """The phase, and `since` with it."""
        phase = self._phase()
        if phase != self.phase or self.cycle is not self._seen:
            self.phase, self._seen, self.since = phase, self.cycle, now
        return phase

    def _phase(self) -> str:
        done = self.cycle is None or self.cycle.response_complete
        if self._over:
            return "over"
        if self.transport.is_closing() or self.flow.write_paused or (done and self.transport.get_write_buffer_size()):
            return "unread"
        if self.conn.their_state is h11.IDLE:
            return "header" if self._begun else "idle"
        if self.conn.their_state is h11.SEND_BODY:
            return "rest" if done else "body"
        return "answer"

    def end(self, error: ApiError) -> None:
        """Close now, with `error` for a request that is not whole."""
        if self.look(time.monotonic()) in ("header", "body"):
            self.answer(error)
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # to close would wait until it is read
        else:
            self.transport.close()
        self.gate.leave(self)

    def answer(self, error: ApiError) -> None:
        """Send an error in place of the application, for which the client is gone then. Nothing more is received."""
        self._over = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = json.dumps(error.body()).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            start = h11.Response(
                status_code=error.status, headers=list((headers | error.headers).items()),
                reason=HTTPStatus(error.status).phrase,
            )  # fmt: skip
            for event in (start, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")

    # uvicorn's hooks

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = _network(self.client[0] if self.client else "")
        refused = self.gate.enter(self)
        if refused is not None:
            self.end(refused)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gate.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        while data and not self._over:
            self._begun, size = True, len(data)
            if self.conn.their_state is h11.IDLE:
                # no more than a header may have: h11 looks at the size of one that is not whole yet alone
                size = max(1, self.gate.limits.header_bytes + 1 - len(self.conn.trailing_data[0]))
            super().data_received(data[:size])
            data = data[size:]
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) > _AHEAD:
            self.gate.refuse(ApiError(400, "", "pipelined"))
            self.transport.abort()  # an answer is on its way, so there is no place for an error

    def on_response_complete(self) -> None:
        self._begun = False
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        if self.look(time.monotonic()) == "idle":  # in other phases `watch` ends it
            self.gate.metrics.timed_out.labels("idle").inc()
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        # uvicorn calls it where it caught h11's error, and hands no more than a text on
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        error = ApiError(status, msg, "bad_http")
        if status == 431:
            most = self.gate.limits.header_bytes
            if b"\n" in self.conn.trailing_data[0]:
                error = ApiError(431, f"the header is larger than {most} bytes", "header_too_large")
            else:
                error = ApiError(414, f"the first line is longer than {most} bytes", "uri_too_long")
        elif status == 413:
            error = ApiError(413, "the body comes in too many small parts", "too_many_parts")
        self.answer(self.gate.refuse(error))
        # Closed while more is on its way, the client might never see the error.
        self.flow.resume_reading()
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()

    def shutdown(self) -> None:
        """The server is ending: what is half-sent ends now, what is being answered at its end."""
        if self.look(time.monotonic()) in ("body", "rest", "over"):
            self.end(shutting_down())
        else:
            super().shutdown()


class _Parser(h11.Connection):
    """h11's, which counts the parts of a body."""

    _parts = _bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._parts = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._parts += 1
            self._bytes += len(event.data)
            if self._parts > _PARTS + self._bytes // _PART:
                raise h11.RemoteProtocolError("too many parts", error_status_hint=413)
        return event


def _network(host: str) -> str:
    """The address, or for IPv6 its /64 network: one client has all of that."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:  # a socket of the file system has none
        return host
    return host if address.version == 4 else str(ipaddress.ip_network((int(address), 64), strict=False))
