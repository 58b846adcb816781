"""The Ray Serve application: its arguments, and on one machine with one replica the server's answers through Ray."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_tools import Alone, events, make_world

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'ray[serve]'")

from fastpeft.apps.serve import ray_deployment
from fastpeft.apps.serve.limits import BodyLimits, Limits
from fastpeft.apps.serve.run import listen
from fastpeft.apps.training.errors import UserError


def test_arguments_are_the_servers_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As values of a config file or as text of a command line; paths do not depend on where a replica works."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    values = {"model": "model", "adapters": "here", "nf4": True, "max_batch": 8, "max_body": 1.5,
              "target_modules": ["q_proj", "v_proj"]}  # fmt: skip
    text = {"model": "model", "adapters": "here", "nf4": "true", "max_batch": "8", "max_body": "1.5",
            "target_modules": "q_proj,v_proj"}  # fmt: skip
    options = ray_deployment.read_options(values)
    assert options == ray_deployment.read_options(text)
    assert options.model == str(tmp_path / "model")
    assert options.adapters == tmp_path / "here"
    assert options.limits == Limits(max_batch=8)
    assert options.bodies == BodyLimits(max_body=1.5)
    assert options.nf4
    assert options.target_modules == ["q_proj", "v_proj"]
    assert ray_deployment.read_options({"model": "smollm2"}).model == "smollm2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "model is missing"),
        ({"model": "m", "port": 80, "by_request": True}, "unknown: by_request, port"),
        ({"model": "m", "max_batch": "many"}, "max_batch"),
        ({"model": "m", "limits": {}, "header_timeout": 1}, "unknown: header_timeout, limits"),
    ],
)
def test_wrong_arguments_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ray_deployment.app(given)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def client(world: Path) -> Iterator[httpx.Client]:
    import ray
    from ray import serve

    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    given = {"name": "base", "dtype": "float32", "max_resident": 4, "max_rank": 8, "cache_tokens": 4096,
             "max_length": 256, "max_batch": 4, "max_queue": 4, "batch_tokens": 64, "page": 16}  # fmt: skip
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    try:
        with contextlib.closing(listen("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(ray_deployment.app({"model": str(world / "model"), "adapters": str(world / "adapters"), **given}))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.slow
def test_answers_through_ray_are_the_adapters(client: httpx.Client, world: Path) -> None:
    alone = Alone(world)
    assert client.get("/health").json()["status"] == "ok"
    for name in ("base", "a0", "a1"):
        want = alone.text(None if name == "base" else name, "hello", 6)
        body = {"model": name, "prompt": "hello", "max_tokens": 6, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == want
        stream = events(client.post("/v1/completions", json={**body, "stream": True}))
        assert "".join(event["choices"][0]["text"] for event in stream) == want
    assert client.post("/v1/completions", json={"model": "nobody", "prompt": "x"}).status_code == 404


@pytest.mark.slow
def test_more_than_the_queue_holds_is_the_servers_429(client: httpx.Client) -> None:
    from concurrent.futures import ThreadPoolExecutor

    body = {"model": "a0", "prompt": "hello", "max_tokens": 100, "temperature": 0}
    with ThreadPoolExecutor(30) as threads:
        answers = list(threads.map(lambda _: client.post("/v1/completions", json=body), range(30)))
    found = {answer.status_code for answer in answers}
    assert found == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"]
