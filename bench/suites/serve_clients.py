"""Clients of the suite serve, in a process of their own so that some can be killed; argv[1]: `main`'s arguments, JSON.

Each asks, waits for the whole answer and asks again, until the time is up. What they saw goes to stdout, a JSON object
for each request the moment it has ended. A request ends with a status, or is lost: an answer that broke off.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import httpx

PROMPTS = ["What does the os module of Python do?", "Explain a list comprehension.", "Hello, who are you?",
           "Write one line about the sea.", "Name three colours.", "How is bread made?"]  # fmt: skip
TOKENS = (8, 16, 32)
CORRUPT, UNKNOWN = 0.04, 0.04  # shares of requests for adapters that cannot be used, or are none


def choose(rng: random.Random, adapters: int, corrupt: list[str]) -> str:
    """The base, an adapter by Zipf's law, a corrupt one or an unknown one."""
    kind = rng.random()
    if kind < CORRUPT and corrupt:
        return rng.choice(corrupt)
    if kind < CORRUPT + UNKNOWN:
        return "nobody"
    if kind > 0.9:
        return "base"
    return f"a{rng.choices(range(adapters), [1 / (i + 1) for i in range(adapters)])[0]}"


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """One request: its status, or None with a reason; seconds to the first token and to the end."""
    begin = time.monotonic()
    first = None
    done: dict[str, Any] = {"model": body["model"], "stream": body["stream"]}
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            done["status"] = response.status_code
            text, ended, end = "", False, None
            if body["stream"] and response.status_code == 200:
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        ended = True
                    elif line.startswith("data: "):
                        first = first or time.monotonic()
                        event = json.loads(line[6:])
                        text += event["choices"][0]["text"] if "choices" in event else ""
                        end = event["choices"][0]["finish_reason"] if "choices" in event else "error"
            else:
                content = json.loads(await response.aread())
                ended = True
                if response.status_code == 200:
                    text, end = content["choices"][0]["text"], content["choices"][0]["finish_reason"]
            if not ended or (response.status_code == 200 and end not in ("stop", "length")):
                done |= {"status": None, "lost": f"ended with {end}"}
    except httpx.HTTPError as error:
        done |= {"status": None, "lost": repr(error)}
    return {**done, "seconds": time.monotonic() - begin, "first": None if first is None else first - begin}


async def client(url: str, until: float, seed: int, adapters: int, corrupt: list[str], corrupt_from: float) -> None:
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        while time.monotonic() < until:
            usable = corrupt if time.monotonic() > corrupt_from else []
            body = {
                "model": choose(rng, adapters, usable), "prompt": rng.choice(PROMPTS), "max_tokens": rng.choice(TOKENS),
                "temperature": rng.choice([0, 0.8]), "stream": rng.random() < 0.5,
            }  # fmt: skip
            print(json.dumps(await ask(http, body)), flush=True)


async def main(
    url: str, count: int, seconds: float, seed: int, adapters: int, corrupt: list[str], after: float
) -> None:
    now = time.monotonic()
    await asyncio.gather(*(
        client(url, now + seconds, seed + i, adapters, corrupt, now + after) for i in range(count)
    ))  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
