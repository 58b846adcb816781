"""Clients of the suite chaos, in processes of their own so that they can be killed; argv[1]: `main`'s arguments, JSON.

Honest ones ask and compare each answer with the one that they were told is right. Hostile ones do what an attacker, a
broken program or a bad line does, and say which statuses they got. Each has an address of its own (127.0.x.y) where the
system lets it. What they saw goes to stdout, a JSON object for each request the moment it has ended.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

REFUSED = frozenset({400, 404, 408, 413, 414, 422, 429, 431, 503})  # the hostile client's own fault, or a limit
Fault = Callable[["Hostile"], Awaitable[int | None]]
FAULTS: dict[str, tuple[Fault, frozenset[int]]] = {}  # by name: what it does, and the statuses it may get


def fault(*statuses: int) -> Callable[[Fault], Fault]:
    """Announce a fault. statuses: what it may get beside what refuses it, no answer included."""

    def announce(do: Fault) -> Fault:
        FAULTS[do.__name__] = do, REFUSED | {*statuses}
        return do

    return announce


def address(number: int) -> str:
    return f"127.0.{1 + number // 200}.{1 + number % 200}"


class Hostile:
    """One hostile client: where the server is, its random numbers and its address."""

    def __init__(self, task: dict[str, Any], number: int) -> None:
        self.rng = random.Random(task["seed"] * 1000 + number)
        self.task, self.local = task, address(number) if task["addresses"] else None
        url = httpx.URL(task["url"])
        self.host, self.port = url.host, url.port
        transport = httpx.AsyncHTTPTransport(local_address=self.local)
        self.http = httpx.AsyncClient(base_url=task["url"], timeout=600, transport=transport)

    async def post(self, path: str = "/v1/completions", **body: Any) -> int:
        """The status of a request whose answer is read. None among the fields takes one out."""
        content = {"model": "base", "prompt": "The sea", "max_tokens": 4, **body}
        response = await self.http.post(path, json={k: v for k, v in content.items() if v is not None})
        return response.status_code

    async def send(self, content: bytes) -> int:
        header = {"content-type": "application/json"}
        response = await self.http.post("/v1/completions", content=content, headers=header)
        return response.status_code

    async def socket(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        local = None if self.local is None else (self.local, 0)
        return await asyncio.open_connection(self.host, self.port, local_addr=local)

    async def raw(self, content: bytes, hold: float, unread: float = 0.0) -> int | None:
        """Bytes on a connection that then says nothing more; the status of an answer within `hold` seconds, if any.
        unread: seconds for which nothing is read."""
        reader, writer = await self.socket()
        try:
            writer.write(content)
            await writer.drain()
            await asyncio.sleep(unread)
            line = await asyncio.wait_for(reader.readline(), hold)
            return int(line.split()[1]) if line.startswith(b"HTTP/1.") else None
        except TimeoutError:
            return None
        finally:
            writer.close()


@fault(200)
async def hardly_any_temperature(me: Hostile) -> int:
    return await me.post(temperature=me.rng.choice([1e-45, 1e-40, 1e-38, 1e-20]), model=me.rng.choice(["base", "a0"]))


@fault(200)
async def other_extremes(me: Hostile) -> int:
    change = me.rng.choice([
        {"top_p": 1e-300}, {"top_p": 1e-7}, {"seed": 2**63 - 1}, {"seed": -(2**63)}, {"temperature": 2.0},
        {"max_tokens": 1}, {"stop": ["\u0000"]}, {"logprobs": 0}, {"stream_options": {"include_usage": True}},
    ])  # fmt: skip
    return await me.post(**{"temperature": 1.0, **change})


@fault(200, 500)
async def weights_that_overflow(me: Hostile) -> int:
    return await me.post(model="huge", temperature=me.rng.choice([0, 1.0]), stream=me.rng.random() < 0.5)


@fault(200)
async def many_stop_strings(me: Hostile) -> int:
    return await me.post(stop=["a" * 1000 + "b"] * 4, max_tokens=16, temperature=1.0)


@fault()
async def wrong_fields(me: Hostile) -> int:
    return await me.post(**me.rng.choice([
        {"temperature": "hot"}, {"max_tokens": -1}, {"max_tokens": 10**30}, {"prompt": {}}, {"prompt": [10**18]},
        {"prompt": ["a", 1]}, {"stop": [1]}, {"model": 7}, {"n": 2}, {"nobody": 1}, {"top_p": 0}, {"seed": 0.5},
        {"prompt": []}, {"prompt": ""}, {"stop": ["a"] * 17},
    ]))  # fmt: skip


@fault()
async def bad_json(me: Hostile) -> int:
    return await me.send(me.rng.choice([
        b"", b"{", b"[" * 200_000, b'{"model": NaN}', b'{"prompt": "\\ud800", "model": "base"}', b"\xff\xfe{}",
        b'{"model": "base", "prompt": ' + b"9" * 5000 + b"}", b"null", b"[]", b'"' + b"a" * 100_000 + b'"',
    ]))  # fmt: skip


@fault()
async def large_chat(me: Hostile) -> int:
    messages = [{"role": "user", "content": "ab"}] * me.rng.choice([2_000, 95_000])
    return await me.post("/v1/chat/completions", prompt=None, messages=messages)


@fault()
async def large_prompt(me: Hostile) -> int:
    return await me.post(prompt="word " * me.rng.choice([100_000, 800_000, 2_000_000]))


@fault()
async def unknown_names(me: Hostile) -> int:
    names = ["nobody", "../model", "a0/../a0", "\u0000", ".", "a" * 5000, "ａ0", "link", "cut", "empty", "fifo"]
    return await me.post(model=me.rng.choice(names))


@fault()
async def half_a_header(me: Hostile) -> int | None:
    return await me.raw(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le", me.rng.uniform(0.5, 15))


@fault()
async def half_a_body(me: Hostile) -> int | None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n"
    return await me.raw(head + b"{" + b" " * me.rng.choice([10, 500_000]), me.rng.uniform(0.5, 15))


@fault(200)
async def other_protocols(me: Hostile) -> int | None:
    return await me.raw(me.rng.choice([
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET /health HTTP/1.0\r\n\r\n", b"\x00" * 1000,
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 20, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ]), 3)  # fmt: skip


@fault(405)
async def other_methods(me: Hostile) -> int:
    response = await me.http.request(me.rng.choice(["GET", "PUT", "DELETE", "PATCH"]), "/v1/completions")
    return response.status_code


@fault()
async def idle_connections(me: Hostile) -> None:
    """Many connections at once that say nothing."""
    opened = []
    try:
        for _ in range(me.task["idle"]):
            try:
                opened.append(await asyncio.wait_for(me.socket(), 2))
            except (OSError, TimeoutError):
                break  # refused, or not taken: as it may be
        await asyncio.sleep(me.rng.uniform(0.5, 10))
    finally:
        for _, writer in opened:
            writer.close()


@fault(200)
async def slow_reader(me: Hostile) -> int | None:
    body = json.dumps({"model": "a1", "prompt": "The sea", "max_tokens": 64, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return await me.raw(head + body, 60, unread=me.rng.uniform(0.5, 10))


@fault(200)
async def gone_in_the_middle(me: Hostile) -> int:
    body = {"model": me.rng.choice(["base", "a0", "a2"]), "prompt": "The sea", "max_tokens": 64, "stream": True}
    async with me.http.stream("POST", "/v1/completions", json=body) as response:
        await asyncio.sleep(me.rng.uniform(0, 0.5))
        return response.status_code


@fault(200)
async def adapters_by_request(me: Hostile) -> int:
    name = me.rng.choice(["r0", "r1"])
    path = me.rng.choice(["a0", "a1", "../adapters/a0", "/etc", "link", "cut", "huge", "."])
    if me.rng.random() < 0.5:
        return (await me.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})).status_code
    if me.rng.random() < 0.5:
        return (await me.http.post("/v1/unload_lora_adapter", json={"lora_name": name})).status_code
    return await me.post(model=name)


async def hostile(task: dict[str, Any], number: int, until: float) -> None:
    me = Hostile(task, number)
    while time.monotonic() < until:
        name = me.rng.choice(list(FAULTS))
        do, right = FAULTS[name]
        done: dict[str, Any] = {"fault": name, "status": None}
        try:
            done["status"] = await do(me)
        except (OSError, httpx.HTTPError) as error:  # the server may close what it takes for hostile
            done["closed"] = type(error).__name__
        print(json.dumps({**done, "right": done["status"] is None or done["status"] in right}), flush=True)


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, str]:
    """The status and text of a request; a stream has to end as one."""
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if not body["stream"] or response.status_code != 200:
            content = await response.aread()
            text = json.loads(content)["choices"][0]["text"] if response.status_code == 200 else content.decode()
            return response.status_code, text
        text, ended = "", False
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "choices" not in event:
                    return 500, line
                text += event["choices"][0]["text"]
        return (200, text) if ended else (0, f"a stream that broke off after {text!r}")


async def honest(task: dict[str, Any], number: int, until: float) -> None:
    rng = random.Random(task["seed"] * 1000 + number)
    transport = httpx.AsyncHTTPTransport(local_address=address(number) if task["addresses"] else None)
    async with httpx.AsyncClient(base_url=task["url"], timeout=600, transport=transport) as http:
        while time.monotonic() < until:
            case = rng.choice(task["cases"])
            body = {"model": case["model"], "prompt": case["prompt"], "max_tokens": case["tokens"], "temperature": 0,
                    "stream": rng.random() < 0.5}  # fmt: skip
            begin = time.monotonic()
            done: dict[str, Any] = {"model": case["model"]}
            try:
                status, text = await ask(http, body)
                done |= {"status": status, "same": status == 200 and text in case["texts"]}
                if not done["same"]:
                    done |= {"text": text[:500], "expected": case["texts"], "prompt": case["prompt"]}
            except (OSError, httpx.HTTPError) as error:
                done |= {"status": None, "same": False, "text": repr(error)}
            print(json.dumps({**done, "seconds": time.monotonic() - begin}), flush=True)


async def health(task: dict[str, Any], until: float) -> None:
    """A probe with a connection of its own each time."""
    transport = httpx.AsyncHTTPTransport(local_address=address(0) if task["addresses"] else None)
    async with httpx.AsyncClient(
        base_url=task["url"], timeout=60, transport=transport, limits=httpx.Limits(max_keepalive_connections=0)
    ) as http:
        while time.monotonic() < until:
            begin = time.monotonic()
            try:
                status: int | None = (await http.get("/health")).status_code
            except (OSError, httpx.HTTPError):
                status = None
            print(json.dumps({"health": status, "seconds": time.monotonic() - begin}), flush=True)
            await asyncio.sleep(0.5)


async def main(task: dict[str, Any]) -> None:
    until = time.monotonic() + task["seconds"]
    each = {"honest": honest, "hostile": hostile}[task["role"]]
    work = [each(task, task["first"] + i, until) for i in range(task["count"])]
    if task["role"] == "honest":
        work.append(health(task, until))
    await asyncio.gather(*work)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
