"""fastpeft serve over HTTP: answers, streams, errors, pressure, clients that go away, and what is left afterwards."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serve_tools import ADAPTERS, PROMPTS, Alone, Running, corrupt, events, make_adapter, make_world, running, until

from peft_kernels.testing import assert_no_worse

NAMES: list[str | None] = [None, *ADAPTERS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def alone(world: Path) -> Alone:
    return Alone(world)


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[Running]:
    with running(world) as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        until(request.getfixturevalue("server").idle)


def together(work: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(len(work)) as threads:
        return [future.result() for future in [threads.submit(each) for each in work]]


def test_a_mixed_batch_answers_as_each_adapter_alone(server: Running, alone: Alone) -> None:
    # seven models, four slots: some wait for a slot until others are done
    asked = [(name, prompt) for prompt in PROMPTS[:2] for name in NAMES]
    before = server.metric("fastpeft_batch_requests_sum") / max(1, server.metric("fastpeft_batch_requests_count"))
    answers = together([lambda n=n, p=p: server.complete(n or "base", p, 12) for n, p in asked])
    for (name, prompt), answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert choice["text"] == alone.text(name, prompt, 12)
        ids = alone.ids(name, prompt, 12)
        ended = ids[-1] == alone.tokenizer.eos_token_id
        assert choice["finish_reason"] == ("stop" if ended else "length")
        assert answer.json()["usage"] == {
            "prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)
        }  # fmt: skip
    assert len({alone.ids(name, PROMPTS[0], 12) for name in NAMES}) == len(NAMES)
    assert server.metric("fastpeft_batch_requests_sum") > server.metric("fastpeft_batch_requests_count") > before


def logprobs_of(model: Any, sequence: torch.Tensor, last: int) -> torch.Tensor:
    with torch.no_grad():
        logprobs = torch.log_softmax(model(sequence).logits[0, -last - 1 : -1], -1)
    return logprobs.gather(1, sequence[0, -last:, None])[:, 0]


def test_chat_uses_the_template_and_counts_logprobs(server: Running, alone: Alone) -> None:
    body = {"model": "a1", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 6}
    answer = server.post("/v1/chat/completions", temperature=0, logprobs=True, **body).json()
    prompt = alone.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": alone.text("a1", prompt, 6)}
    told = answer["choices"][0]["logprobs"]["content"]
    ids = alone.ids("a1", prompt, 6)
    assert [entry["token"] for entry in told] == [alone.tokenizer.decode([i]) for i in ids]
    sequence = torch.tensor([alone.tokenizer(prompt)["input_ids"] + list(ids)])
    eager, exact = (logprobs_of(model, sequence, len(ids)) for model in (
        alone.model("a1"), copy.deepcopy(alone.model("a1")).double()
    ))  # fmt: skip
    assert_no_worse(torch.tensor([entry["logprob"] for entry in told]), eager, exact)


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_has_the_same_text(server: Running, chat: bool) -> None:
    body: dict[str, Any] = {"model": "a2", "temperature": 0, "max_tokens": 10}
    body |= {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hello"}
    path = f"/v1/{'chat/' if chat else ''}completions"
    whole = server.post(path, **body).json()
    response = server.post(path, stream=True, stream_options={"include_usage": True}, **body)
    assert response.headers["content-type"].startswith("text/event-stream")
    told = events(response)
    assert len({event["id"] for event in told}) == 1
    *parts, last, totals = told
    assert totals["choices"] == []
    assert totals["usage"] == whole["usage"]
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert all(event["choices"][0]["finish_reason"] is None and event["usage"] is None for event in parts)
    choices = [event["choices"][0] for event in [*parts, last]]
    text = "".join(c["delta"].get("content", "") if chat else c["text"] for c in choices)
    assert text == (whole["choices"][0]["message"]["content"] if chat else whole["choices"][0]["text"])
    assert len(parts) > 2


def test_a_seed_gives_the_same_answer_in_any_company(server: Running) -> None:
    ask = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    first = server.complete("a3", "hello", 16, **ask).json()["choices"][0]["text"]
    rest = [lambda s=s: server.complete("base", "other", 16, temperature=1.0, seed=s).json() for s in range(5)]
    answers = together([lambda: server.complete("a3", "hello", 16, **ask).json(), *rest])
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts[0] == first
    assert len(set(texts[1:])) == 5


def test_stop_strings_end_an_answer_before_them(server: Running, alone: Alone) -> None:
    prompt = "The sea."
    text = next(t for t in (alone.text(name, prompt, 24) for name in ADAPTERS) if t[3:5].isascii() and len(t) > 6)
    name = next(name for name in ADAPTERS if alone.text(name, prompt, 24) == text)
    stop = text[3:5]
    before = server.metric("fastpeft_cancelled_total")
    answer = server.complete(name, prompt, 24, stop=["nowhere to be seen", stop]).json()
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 24
    assert server.metric("fastpeft_cancelled_total") == before + 1  # the engine does not go on with it
    told = events(server.complete(name, prompt, 24, stop=stop, stream=True))
    assert "".join(event["choices"][0]["text"] for event in told) == text[: text.index(stop)]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 2}, "n", "one answer a request"),
    ({"tools": [{"type": "function"}]}, "tools", "no tools"),
    ({"presence_penalty": 0.5}, "presence_penalty", "penalties"),
    ({"logprobs": 3}, "logprobs", "logprobs=0 gives"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 100_000}, "max_tokens", "together they may be at most 256"),
    ({"prompt": ""}, "prompt", "no tokens"),
    ({"prompt": [5, 100_000]}, "prompt", "from 0 to"),
    ({"prompt": ["a", "b"]}, "prompt", "one a request, got 2"),
    ({"prompt": "y" * 300}, "max_tokens", "the prompt has 300 tokens"),
    ({"prompt": [5, "x"]}, "prompt", "valid integer"),
    ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
    ({"seed": "x"}, "seed", "valid integer"),
    ({"color": "red"}, "color", "knows no such field"),
]


@pytest.mark.parametrize(("change", "field", "says"), BAD)
def test_bad_requests_name_the_field(server: Running, change: dict[str, Any], field: str, says: str) -> None:
    response = server.post(**{"model": "base", "prompt": "hello", "max_tokens": 2, **change})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["type"]) == (field, "invalid_request_error")
    assert says in error["message"]


def test_other_errors_have_the_same_shape(server: Running) -> None:
    for response, status in (
        (server.complete("nope", "hello"), 404),
        (server.client.get("/v1/nothing"), 404),
        (server.client.get("/v1/completions"), 405),
        (server.client.post("/v1/completions", content=b"{"), 400),
        (server.client.post("/v1/completions", content=b"[1]"), 400),
        (server.client.post("/v1/completions", content=b" " * (5 << 20)), 413),
        (server.client.post("/v1/completions", content=b'{"model": "base", "prompt": "\\ud800"}'), 400),  # half of one
        (server.client.post("/v1/completions", content=b'{"model": "base", "prompt": "\xed\xa0\x80"}'), 400),
        (server.post("/v1/chat/completions", model="base", messages=[]), 400),
        (server.post("/v1/load_lora_adapter", lora_name="x", lora_path="a0"), 404),  # not allowed here
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert server.complete("nope", "hello").json()["error"]["code"] == "model_not_found"
    assert server.metric("fastpeft_requests_total", endpoint="completions", status="404", adapter="unknown") >= 2


def test_a_corrupt_adapter_fails_its_own_requests_until_it_is_mended(
    server: Running, world: Path, alone: Alone
) -> None:
    folder = corrupt(world, "broken")
    try:
        answers = together([
            *(lambda: server.complete("broken", "hello") for _ in range(3)),
            *(lambda n=n: server.complete(n, "hello") for n in ADAPTERS[:4]),
        ])  # fmt: skip
        for answer in answers[:3]:
            assert answer.status_code == 422
            assert answer.json()["error"]["code"] == "adapter_unusable"
        for name, answer in zip(ADAPTERS, answers[3:], strict=False):
            assert answer.json()["choices"][0]["text"] == alone.text(name, "hello", 8)
        assert "broken" in [entry["id"] for entry in server.client.get("/v1/models").json()["data"]]
        shutil.copy(world / "adapters" / "a0" / "adapter_model.safetensors", folder)
        mended = server.complete("broken", "hello")
        assert mended.json()["choices"][0]["text"] == alone.text("a0", "hello", 8)
    finally:
        shutil.rmtree(folder)


def test_an_adapter_that_is_dropped_in_is_found(server: Running, world: Path) -> None:
    make_adapter(world, "late", 9)
    try:
        until(lambda: server.complete("late", "hello").status_code == 200)
        entry = server.client.get("/v1/models/late").json()
        assert (entry["id"], entry["parent"], entry["object"]) == ("late", "base", "model")
    finally:
        shutil.rmtree(world / "adapters" / "late")


def test_too_many_requests_get_429(server: Running) -> None:
    limit = server.engine.limits.max_batch + server.engine.limits.max_queue
    with ThreadPoolExecutor(limit) as threads:
        with server.engine.manager.pause():
            waiting = [threads.submit(server.complete, name, "x", 4) for name in ADAPTERS[:4] * (limit // 4)]
            until(lambda: server.engine.open == limit)
            refused = server.complete("base", "x")
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert int(refused.headers["Retry-After"]) >= 1
            assert server.metric("fastpeft_queue_requests") == limit
            assert server.client.get("/health").json()["open_requests"] == limit
        assert [future.result().status_code for future in waiting] == [200] * limit
    assert server.metric("fastpeft_queue_requests") == 0


def test_a_request_that_takes_too_long_gets_504(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "limits", dataclasses.replace(server.engine.limits, timeout=0.3))
    with server.engine.manager.pause():
        late = server.complete("a0", "x")
        streamed = server.complete("a0", "x", stream=True)
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "timeout"
    assert [event["error"]["code"] for event in events(streamed)] == ["timeout"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_everything(server: Running, stream: bool) -> None:
    cancelled = server.metric("fastpeft_cancelled_total")
    body = {"model": "a1", "prompt": "hello", "max_tokens": 200, "stream": stream, "temperature": 0}
    with server.engine.manager.pause(), httpx.Client(base_url=server.client.base_url, timeout=0.5) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body).read()
        until(lambda: server.metric("fastpeft_cancelled_total") == cancelled + 1)
        assert server.pool is not None
        assert server.pool.stats().in_use == 1  # not before the loop has let go of it
    until(server.idle)
    gone = server.metric("fastpeft_requests_total", endpoint="completions", status="499", adapter="adapter")
    assert gone >= 1 + stream


def test_a_client_that_goes_away_while_it_sends_is_no_error(server: Running) -> None:
    before = server.metric("fastpeft_requests_total", endpoint="completions", status="499", adapter="unknown")
    with socket.create_connection((server.client.base_url.host, server.client.base_url.port or 0)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    until(lambda: server.metric("fastpeft_requests_total", endpoint="completions", status="499", adapter="unknown")
          == before + 1)  # fmt: skip


def test_waiting_for_a_slot_can_be_given_up(server: Running, alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.pool is not None
    leases = [server.pool.acquire(name) for name in ADAPTERS[:4]]
    try:
        assert server.complete("base", "hello").status_code == 200  # others do not wait with it
        assert server.complete("a0", "hello").status_code == 200
        with httpx.Client(base_url=server.client.base_url, timeout=0.5) as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json={"model": "a5", "prompt": "hello"})
        until(lambda: server.engine.open == 0)
        monkeypatch.setattr(server.engine, "limits", dataclasses.replace(server.engine.limits, timeout=0.3))
        late = server.complete("a4", "hello")
        assert late.status_code == 504
        assert "found no room" in late.json()["error"]["message"]
    finally:
        for lease in leases:
            lease.release()
    monkeypatch.undo()
    assert server.complete("a5", "hello").json()["choices"][0]["text"] == alone.text("a5", "hello", 8)


def test_a_failed_forward_fails_its_request_alone(
    server: Running, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of this, in company, is in test_serve_faults.py."""
    restarts = server.metric("fastpeft_engine_restarts_total")
    layer = server.engine.model.model.layers[0]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda *args, **kwargs: torch.zeros(2) @ torch.zeros(3))
        failed = server.complete("a0", "hello")
    assert failed.status_code == 500
    assert failed.json()["error"]["type"] == "server_error"
    assert server.client.get("/health").status_code == 200
    assert server.complete("a0", "hello").json()["choices"][0]["text"] == alone.text("a0", "hello", 8)
    assert server.metric("fastpeft_engine_restarts_total") == restarts


def test_metrics_are_prometheus_text(server: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    server.complete("a0", "hello")
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert {
        "fastpeft_requests_total", "fastpeft_prompt_tokens_total", "fastpeft_generated_tokens_total",
        "fastpeft_queue_requests", "fastpeft_open_requests", "fastpeft_batch_requests_sum", "fastpeft_pool_hits_total",
        "fastpeft_time_to_first_token_seconds_count", "fastpeft_request_seconds_count", "fastpeft_pool_misses_total",
        "fastpeft_pool_evictions_total", "fastpeft_pool_resident", "fastpeft_cancelled_total",
    } <= values.keys()  # fmt: skip
    assert values["fastpeft_pool_resident"] <= 4


def test_adapters_by_request(world: Path, alone: Alone, tmp_path: Path) -> None:
    inner = world / "adapters" / "more" / "one"
    shutil.copytree(world / "adapters" / "a4", inner)
    shutil.copytree(world / "adapters" / "a4", tmp_path / "outside")
    (world / "adapters" / "link").symlink_to(tmp_path / "outside")
    corrupt(world, "more/bad")
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    try:
        with running(world, by_request=True) as server:
            for path, status in (
                (str(tmp_path / "outside"), 400), ("../adapters/../..", 400), ("link", 400), (".", 400),
                ("more/none", 404), ("more/bad", 422), ("more/\0", 400), ("x" * 5000, 400),
            ):  # fmt: skip
                assert server.post(load, lora_name="mine", lora_path=path).status_code == status, path
                assert server.complete("mine", "hello").status_code == 404
            assert server.post(load, lora_name="base", lora_path="more/one").status_code == 400
            assert server.post(load, lora_name="a0", lora_path="more/one").status_code == 400  # taken
            assert server.post(load, lora_name="mine", lora_path="more/one").status_code == 200
            assert server.complete("mine", "hello").json()["choices"][0]["text"] == alone.text("a4", "hello", 8)
            broken = {"lora_name": "a0", "lora_path": "more/bad"}
            for name in ("mine", "a0"):
                assert server.post(unload, lora_name=name).status_code == 200
                assert server.complete(name, "hello").status_code == 404
                assert server.post(unload, lora_name=name).status_code == 404
            assert server.post(load, **broken).status_code == 422
            assert server.client.post(load, json={**broken, "lora_path": "more/none"}).status_code == 404
            asyncio.run(server.loaded.service.adapters.look())
            assert server.complete("a0", "hello").status_code == 404  # as before the loads that failed
            assert server.post(load, lora_name="a0", lora_path=str(world / "adapters" / "a0")).status_code == 200
            assert server.complete("a0", "hello").json()["choices"][0]["text"] == alone.text("a0", "hello", 8)
            shutil.copytree(world / "adapters" / "a4", world / "adapters" / "mine")  # another one of that name
            assert server.complete("mine", "hello").json()["choices"][0]["text"] == alone.text("a4", "hello", 8)
            until(server.idle)
    finally:
        for name in ("more", "mine"):
            shutil.rmtree(world / "adapters" / name, ignore_errors=True)
        (world / "adapters" / "link").unlink()


def test_a_base_in_four_bits(world: Path) -> None:
    alone = Alone(world, nf4=True)
    with running(world, nf4=True) as server:
        answers = together([lambda n=n: server.complete(n or "base", "hello") for n in NAMES[:4]])
        for name, answer in zip(NAMES, answers, strict=False):
            assert answer.json()["choices"][0]["text"] == alone.text(name, "hello", 8)


def test_a_server_without_adapters(world: Path, alone: Alone) -> None:
    with running(world, adapters=False) as server:
        assert server.complete("base", "hello").json()["choices"][0]["text"] == alone.text(None, "hello", 8)
        assert server.complete("a0", "hello").status_code == 404
        assert [entry["id"] for entry in server.client.get("/v1/models").json()["data"]] == ["base"]
