"""Limits of fastpeft serve, over sockets: connections, deadlines, memory of bodies, what is refused unread, the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastpeft.apps.serve import bodies
from fastpeft.apps.serve.errors import ApiError, short
from fastpeft.apps.serve.limits import BodyLimits, ConnectionLimits
from fastpeft.apps.serve.metrics import Metrics
from fastpeft.apps.training.testing import make_tiny_model
from serve_tools import Running, running, until

# 0.1 MiB of all clients, 0.08 of each; everything late after half a second
BODIES = BodyLimits(max_body=0.05, body_timeout=0.5, body_memory=0.1, client_memory=0.08)
CONNECTIONS = ConnectionLimits(max_connections=8, header_bytes=2048, header_timeout=0.5, idle_timeout=0.5)
PATIENT = ConnectionLimits(max_connections=8, max_client_connections=6)
ASK = {"model": "base", "prompt": "hello", "max_tokens": 4, "temperature": 0}
Served = Callable[..., "Client"]


class Client(socket.socket):
    """A client's end of a connection."""

    def __init__(self, server: Running, *sent: bytes, own: str = "127.0.0.1", buffer: int | None = None) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        if buffer is not None:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.bind((own, 0))  # all of 127.0.0.0/8 is this machine
        self.settimeout(20)
        self.connect(("127.0.0.1", server.port))
        for part in sent:
            self.sendall(part)

    def rest(self) -> bytes:
        """All that comes until the server closes."""
        found = b""
        while part := self.recv(1 << 16):
            found += part
        return found

    def answer(self) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of the next answer."""
        found = b""
        while b"\r\n\r\n" not in found or not found.endswith(b"}"):
            found += self.recv(1 << 16) or pytest.fail(f"closed after {found!r}")
        head, _, body = found.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        pairs = [line.split(": ", 1) for line in lines]
        return int(first.split()[1]), {name.lower(): value for name, value in pairs}, json.loads(body)


def post(body: bytes, *headers: str, path: str = "/v1/completions", length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def half(sent: int, length: int) -> bytes:
    return post(b" " * sent, length=length)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("limits")
    make_tiny_model(root / "model")
    return root


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[Running]:
    with running(world, adapters=False, bodies=BODIES, connections=CONNECTIONS) as server:
        yield server


@pytest.fixture(scope="module")
def patient(world: Path) -> Iterator[Running]:
    """No deadlines within a test; 6 of 8 connections for one client."""
    with running(world, adapters=False, connections=PATIENT, grace=20) as server:
        yield server


def refused(server: Running, reason: str) -> float:
    return server.metric("fastpeft_refused_total", reason=reason)


def late(server: Running, reason: str) -> float:
    return server.metric("fastpeft_timed_out_total", reason=reason)


def asks(server: Running) -> int:
    """The status of an ordinary request over a connection of its own."""
    return httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json=ASK, timeout=20).status_code


def test_idle_connections_keep_nobody_out(patient: Running) -> None:
    before = refused(patient, "made_room")
    idle = [Client(patient, own=f"127.0.0.{2 + i % 4}") for i in range(20)]
    until(lambda: refused(patient, "made_room") == before + 12)
    # the one that asks is a ninth until another has gone
    until(lambda: patient.metric("fastpeft_open_connections") <= 8)
    assert asks(patient) == 200
    assert [one.answer()[0] for one in idle[:3]] == [408] * 3  # those that came first made room
    assert httpx.get(f"http://127.0.0.1:{patient.port}/health").status_code == 200
    for one in idle:
        one.close()


def test_the_client_with_most_connections_makes_room(patient: Running) -> None:
    quiet = Client(patient, half(1, 100), own="127.0.0.9")  # waits for longest, but alone
    crowd = [Client(patient, half(1, 100), own="127.0.0.8") for _ in range(6)]
    until(lambda: patient.metric("fastpeft_open_connections") >= 7)
    assert asks(patient) == 200
    others = [Client(patient, own="127.0.0.7") for _ in range(2)]
    assert crowd[0].answer()[2]["error"]["code"] == "made_room"
    quiet.settimeout(0.1)
    with pytest.raises(TimeoutError):
        quiet.recv(1)
    for one in (quiet, *crowd, *others):
        one.close()


def test_busy_connections_are_not_closed_and_others_are_told(patient: Running) -> None:
    until(lambda: patient.metric("fastpeft_open_connections") <= 1)  # the fixture's own client
    patient.client.close()
    patient.client = httpx.Client(base_url=patient.client.base_url, timeout=60)
    ask = post(json.dumps(ASK).encode(), "Connection: close")
    with patient.engine.manager.pause():
        busy = [Client(patient, ask, own=f"127.0.0.{6 + i // 6}") for i in range(8)]
        until(lambda: patient.engine.open == 8)
        for own, status, code in (("127.0.0.6", 429, "client_connections"), ("127.0.0.5", 503, "connections")):
            got, headers, body = Client(patient, own=own).answer()
            assert (got, body["error"]["code"], headers["retry-after"]) == (status, code, "1")
            assert refused(patient, code) == 1
    assert [one.answer()[0] for one in busy] == [200] * 8


def test_what_is_half_sent_idle_or_unread_is_closed(server: Running) -> None:
    names = ("header", "body", "idle", "unread", "rest")
    before = {name: late(server, name) for name in names}
    header, silent = Client(server, b"GET /health HT"), Client(server)
    body = Client(server, post(b"{", "Connection: close", length=100))
    idle = Client(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    unread = Client(server, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1500, buffer=4096)
    rest = Client(server, half(0, 100_000), b" " * 60_000)  # answered by 413, and never sent whole
    for one, code in ((header, "header_timeout"), (silent, "header_timeout"), (body, "body_timeout")):
        status, _, told = one.answer()
        assert (status, told["error"]["code"]) == (408, code)
    assert idle.rest().endswith(b'"open_requests":0}')
    assert b" 413 " in rest.rest()
    until(lambda: [name for name in names if late(server, name) == before[name]] == [])
    assert late(server, "header") == before["header"] + 2
    assert server.metric("fastpeft_requests_total", endpoint="completions", status="408", adapter="unknown") >= 1
    for one in (header, silent, body, idle, unread, rest):
        one.close()
    until(lambda: server.metric("fastpeft_open_connections") <= 1)


def test_a_header_that_drips_is_late_and_a_busy_client_is_not(server: Running) -> None:
    """The deadline is of the whole header; a connection with a request now and then has one for each."""
    slow, steady, end = Client(server), Client(server), time.monotonic() + 1.2
    ask, said = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", 0
    closed = False
    while time.monotonic() < end:
        time.sleep(0.1)
        steady.sendall(ask)
        said += b" 200 OK" in steady.recv(4096)
        try:
            slow.sendall(b"GET /"[said % 5 :][:1])
        except OSError:
            closed = True
    assert closed
    assert said > 5


def test_bodies_that_wait_make_room_for_new_ones(server: Running) -> None:
    before = {code: refused(server, code) for code in ("body_memory", "client_memory")}
    waiting = [Client(server, half(20_000, 40_000), own=f"127.0.0.{2 + i}") for i in range(5)]
    until(lambda: server.metric("fastpeft_body_bytes") >= 100_000)
    one = Client(server, half(20_000, 40_000), own="127.0.0.9")  # 120,000 bytes of 104,857
    status, headers, told = waiting[0].answer()
    assert (status, headers["retry-after"], told["error"]["code"]) == (503, "1", "body_memory")
    for each in (*waiting, one):
        each.close()
    until(lambda: server.metric("fastpeft_body_bytes") == 0)
    mine = [Client(server, half(20_000, 40_000)) for _ in range(5)]  # of one client, 83,886
    assert mine[0].answer()[0] == 429
    for each in mine:
        each.close()
    assert {code: refused(server, code) - n for code, n in before.items()} == {"body_memory": 1, "client_memory": 1}
    until(lambda: server.metric("fastpeft_body_bytes") == 0)
    assert asks(server) == 200


UNREAD: list[tuple[str, list[bytes], int, str]] = [
    ("by its length", [post(b"", "Connection: close", length=60_000)], 413, "too_large"),
    ("by its length, before 100-continue", [post(b"", "Expect: 100-continue", "Connection: close", length=60_000)],
     413, "too_large"),
    ("header", [b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 400], 431, "header_too_large"),
    ("far too long header", [b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 40_000], 431, "header_too_large"),
    ("whole header", [b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 400 + b"\r\n"], 431, "header_too_large"),
    ("first line", [b"GET /" + b"a" * 3000], 414, "uri_too_long"),
    ("no HTTP", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n"], 400, "bad_http"),
    ("tiny chunks", [b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                     + b"1\r\n \r\n" * 10_000], 413, "too_many_parts"),
    ("values", [post(b'{"prompt": [' + b"1," * 4000 + b"1]}", "Connection: close")], 413, "too_many_values"),
    ("bytes of a prompt", [post(json.dumps({**ASK, "prompt": "ab" * 10_000}).encode(), "Connection: close")], 400,
     "context_length_exceeded"),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "status", "code"), [case[1:] for case in UNREAD], ids=[case[0] for case in UNREAD])
def test_what_is_too_large_is_refused_with_its_reason(
    server: Running, sent: list[bytes], status: int, code: str
) -> None:
    before = refused(server, reason := {"context_length_exceeded": "prompt_bytes"}.get(code, code))
    one = Client(server)
    with contextlib.suppress(OSError):  # it is refused while it is sent
        for part in sent:
            one.sendall(part)
    got, _, body = one.answer()
    assert (got, body["error"]["code"]) == (status, code)
    assert refused(server, reason) == before + 1


def test_a_long_prompt_is_not_tokenized_to_be_refused(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    service = server.loaded.service
    assert service.longest == max(len(token.encode()) for token in service.tokenizer.get_vocab())
    sizes: list[int] = []
    encode = service.tokenizer
    monkeypatch.setattr(service, "tokenizer", lambda text, **given: sizes.append(len(text)) or encode(text, **given))
    most = service.engine.limits.max_length * service.longest
    for size, says in ((most, "tokens and max_tokens"), (most + 1, "tokens of this model have at most")):
        answer = server.post(**{**ASK, "prompt": "a" * size})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert says in answer.json()["error"]["message"].replace(f"{size} ", "")
    assert sizes == [most]


def test_a_prompt_is_not_kept_while_it_is_answered(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    tokenize = server.loaded.service.tokenize

    async def remember(asked: Any) -> list[int]:
        ids = await tokenize(asked)
        kept.append(asked)
        return ids

    monkeypatch.setattr(server.loaded.service, "tokenize", remember)
    chat = {"model": "base", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
    assert (asks(server), server.post("/v1/chat/completions", **chat).status_code) == (200, 200)
    assert (kept[0].prompt, kept[1].messages) == ("", [])


def test_large_bodies_are_decoded_beside_the_event_loop(patient: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()
    decode = bodies.decode

    def noted(*given: Any) -> object:
        threads.add(threading.current_thread().name.split("_")[0])
        return decode(*given)

    monkeypatch.setattr(bodies, "decode", noted)
    chat = json.dumps({"model": "base", "messages": [{"role": "user", "content": "ab"}] * 95_000}).encode()
    url, longest = f"http://127.0.0.1:{patient.port}", 0.0
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(httpx.post, f"{url}/v1/chat/completions", content=chat, timeout=60) for _ in range(5)]
        while not all(each.done() for each in asked):
            began = time.monotonic()
            assert patient.client.get("/health").status_code == 200
            longest = max(longest, time.monotonic() - began)
    assert [each.result().status_code for each in asked] == [413] * 5
    assert threads == {"fastpeft-decode"}
    assert longest < 1.5  # it was the time that all of them took


def test_work_for_a_client_that_is_gone_is_not_done() -> None:
    class Gone:
        async def is_disconnected(self) -> bool:
            return True

    some = bodies.Bodies(BODIES, 100, Metrics())
    with pytest.raises(ApiError) as caught:
        asyncio.run(some.beside(lambda: pytest.fail("done"), bodies._SMALL, Gone()))  # type: ignore[arg-type]
    assert caught.value.status == 499
    assert asyncio.run(some.beside(lambda: threading.current_thread().name, bodies._SMALL)).startswith("fastpeft-dec")
    some.close()


def test_values_are_counted_outside_of_strings() -> None:
    text = '"' + "{[,]}\\\\" * 20_000 + '\\"'  # far more than one slice, which cuts it anywhere
    assert bodies.decode(json.dumps([text, 1, 2]).encode(), 4) == [text, 1, 2]
    for many in ([1] * 6, [[]] * 5, [{}] * 5, [text, 1, 2, 3, 4, 5]):
        for pad in (0, 1, bodies._SMALL - 1):
            with pytest.raises(ApiError) as caught:
                bodies.decode(b" " * pad + json.dumps(many).encode(), 5)
            assert (caught.value.status, caught.value.code) == (413, "too_many_values")
    with pytest.raises(ApiError, match="objects"):
        bodies.decode(json.dumps([{}] * 10_001).encode(), 1 << 20)
    with pytest.raises(ApiError, match="an object has 129 fields"):
        bodies.decode(json.dumps({str(i): i for i in range(129)}).encode(), 1 << 20)


def test_a_deep_value_can_be_quoted() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert len(short(deep)) <= 100
    assert short("x" * 1000).startswith("'xxx")


HTTP: list[tuple[str, bytes, list[bytes]]] = [
    ("1.0", b"GET /health HTTP/1.0\r\n\r\n", [b"HTTP/1.1 200 OK"]),
    ("two, one behind the other", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 2, [b"HTTP/1.1 200 OK"] * 2),
    ("100-continue", post(json.dumps(ASK).encode(), "Expect: 100-continue"), [b"HTTP/1.1 100 ", b"HTTP/1.1 200 OK"]),
    ("chunks", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
     + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (json.dumps(ASK).encode()[:9],
                                                                  json.dumps(ASK).encode()[9:])) + b"0\r\n\r\n",
     [b"HTTP/1.1 200 OK"]),
    ("WebSocket", b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
     b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n", [b"HTTP/1.1 200 OK"]),
    ("HTTP/2 upgrade", b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
     b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", [b"HTTP/1.1 200 OK"]),
    ("CONNECT", b"CONNECT a:80 HTTP/1.1\r\nHost: x\r\n\r\n", [b"HTTP/1.1 404 "]),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "answers"), [case[1:] for case in HTTP], ids=[case[0] for case in HTTP])
def test_ways_to_speak_http(server: Running, sent: bytes, answers: list[bytes]) -> None:
    one, found = Client(server, sent), b""
    while found.count(b"HTTP/1.1 ") < len(answers) or not found.endswith(b"}"):
        found += one.recv(4096) or b"closed"
    for part, answer in zip(found.split(b"HTTP/1.1 ")[1:], answers, strict=True):
        assert (b"HTTP/1.1 " + part).startswith(answer)
    one.close()


def test_too_much_behind_a_request_that_runs_is_not_kept(patient: Running) -> None:
    with patient.engine.manager.pause():
        one = Client(patient)
        with contextlib.suppress(OSError):  # closed while it is sent
            one.sendall(post(json.dumps(ASK).encode()) + b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 50_000)
        until(lambda: refused(patient, "pipelined") == 1)
    until(patient.idle)
    one.close()


def test_at_its_end_a_server_waits_for_answers_alone(world: Path) -> None:
    with running(world, adapters=False, grace=20) as server:
        sent = (b"", b"GET /hea", half(1, 100), half(0, 10 << 20), b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        others = [Client(server, part) for part in sent]
        with server.engine.manager.pause():
            running_one = Client(server, post(json.dumps(ASK).encode()))
            until(lambda: server.engine.open == 1)
            server.server.handle_exit(signal.SIGHUP, None)
            server.server.handle_exit(signal.SIGHUP, None)  # once more does not hurry
            found = [other.rest() for other in others]  # while the answer is not there yet
            assert server.engine.open == 1
        status, _, body = running_one.answer()
        assert (status, body["usage"]["completion_tokens"]) == (200, 4)
        assert [part[9:12] for part in found] == [b"", b"", b"503", b"413", b"200"]
        assert not server.server.force_exit


def test_signals_that_end_a_server(patient: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP as SIGTERM, but not where nohup has it ignored."""
    server = patient.server
    before = signal.getsignal(signal.SIGHUP)
    for ignored in (True, False):
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        monkeypatch.setattr(server, "should_exit", False)
        asked: list[int] = []
        monkeypatch.setattr(server, "handle_exit", lambda number, frame, asked=asked: asked.append(number))
        try:
            with server.capture_signals():
                os.kill(os.getpid(), signal.SIGHUP)
        finally:
            signal.signal(signal.SIGHUP, before)
        assert asked == ([] if ignored else [signal.SIGHUP])
