"""The parts of fastpeft serve: attention, sampling, text, and the process with its signals."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from fastpeft.apps.cli.app import app
from fastpeft.apps.serve import api, attention, schemas
from fastpeft.apps.serve.sampling import Sampling, draw, logprobs
from fastpeft.apps.serve.text import Decoder, Stops
from fastpeft.apps.training.testing import make_byte_tokenizer
from forms import matrix
from pydantic import ValidationError
from serve_tools import events, make_world
from torch import Tensor
from typer.testing import CliRunner

from peft_kernels.testing import assert_no_worse, assert_same_bits


class Cache:
    """Stands where transformers' paged cache does: gives the keys and values of all requests, one behind the other."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.held = keys, values

    def update(self, **given: Any) -> tuple[Tensor, Tensor]:
        return self.held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cached", [True, False], ids=["by-attention", "by-the-layer"])  # before and since 5.24
def test_attention_sees_its_own_request_alone(
    dtype: torch.dtype, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [(1, 9), (5, 5), (1, 1), (3, 12), (1, 8), (1, 130), (7, 7), (1, 2)]  # queries, keys
    heads, groups, d = 6, 2, 16
    step = attention.plan([q for q, _ in lengths], [k for _, k in lengths])
    assert len(step.prompts) == 3
    assert sum(len(group.rows) for group in step.decoding) == 5
    for group in step.decoding:  # little padding
        assert group.keys.shape[1] < 2 * group.keep.sum(-1).min() + 16
    query = torch.randn(1, heads, sum(q for q, _ in lengths), d).to(dtype)
    keys, values = (torch.randn(1, groups, sum(k for _, k in lengths), d).to(dtype) for _ in range(2))
    module = SimpleNamespace(layer_idx=0)
    monkeypatch.setattr(attention.current, "step", step)
    given = (query, query, Cache(keys, values)) if cached else (keys, values, None)
    out, _ = attention.paged_attention(module, query, *given[:2], None, cache=given[2])

    def one_by_one(kind: torch.dtype) -> Tensor:
        results = []
        at = start = 0
        for q, k in lengths:
            mine = query[:, :, at : at + q].to(kind)
            own = (t[:, :, start : start + k].to(kind).repeat_interleave(heads // groups, 1) for t in (keys, values))
            keep = torch.ones(q, k, dtype=torch.bool).tril(k - q)
            results.append(torch.nn.functional.scaled_dot_product_attention(mine, *own, attn_mask=keep))
            at, start = at + q, start + k
        return torch.cat(results, 2).transpose(1, 2)

    exact = one_by_one(torch.float64)
    assert_no_worse(out, one_by_one(dtype), exact, exact.abs().amax().expand(exact.shape))


def test_attention_outside_of_a_batch_says_so() -> None:
    with pytest.raises(ValueError, match="continuous batching alone"):
        attention.paged_attention(None, torch.zeros(1), torch.zeros(1), torch.zeros(1), None)


def test_tokens_are_drawn_by_their_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50) * 2
    n = 4096
    uniform = (torch.arange(n) + 0.5) / n  # a grid: the share of each token is its probability, to one step of it
    for row in logits:
        p = torch.softmax(row / 0.7, -1)
        drawn = draw(row.expand(n, -1), torch.full((n,), 0.7), torch.ones(n), uniform)
        share = torch.bincount(drawn, minlength=50) / n
        assert ((share - p).abs() <= 1.01 / n).all()
        nucleus = draw(row.expand(n, -1), torch.full((n,), 0.7), torch.full((n,), 0.6), uniform)
        order = p.sort(descending=True).indices
        kept = order[: int((p[order].cumsum(0) < 0.6).sum()) + 1]
        assert set(nucleus.tolist()) == set(kept.tolist())
        share = torch.bincount(nucleus, minlength=50)[kept] / n
        assert ((share - p[kept] / p[kept].sum()).abs() <= 1.01 / n).all()


def test_rows_that_sample_and_rows_that_do_not_do_not_meet() -> None:
    logits = torch.randn(6, 40)
    temperature = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5, 1.0])
    top_p = torch.tensor([0.1, 1.0, 1.0, 0.5, 1.0, 1e-9])
    uniform = torch.tensor([0.9, 0.3, 0.2, 0.999999, 0.0, 0.7])
    whole = draw(logits, temperature, top_p, uniform)
    for i in range(6):
        one = slice(i, i + 1)
        assert_same_bits(draw(logits[one], temperature[one], top_p[one], uniform[one]), whole[one])
    for i in (0, 2, 5):  # greedy, and a nucleus of one
        assert whole[i] == logits[i].argmax()
    assert_no_worse(
        logprobs(logits, whole),
        torch.log_softmax(logits, -1).gather(1, whole[:, None])[:, 0],
        torch.log_softmax(logits.double(), -1).gather(1, whole[:, None])[:, 0],
    )


def test_no_random_number_reaches_a_token_without_probability() -> None:
    logits = torch.full((2, 8), -torch.inf)
    logits[:, :3] = torch.tensor([1.0, 0.0, 2.0])
    for value in (0.0, 1.0 - 2**-24, 1.0):  # 1 itself: a double below it that was rounded
        for nucleus in (1.0, 0.9):
            drawn = draw(logits, torch.ones(2), torch.full((2,), nucleus), torch.full((2,), value))
            assert (drawn < 3).all()


@pytest.mark.parametrize("one_way", [False, True], ids=["as-on-a-cpu", "as-on-a-gpu"])
@pytest.mark.parametrize("nucleus", [1.0, 0.5, 1e-40, 0.0])
def test_the_coldest_temperatures_are_the_likeliest_token(nucleus: float, one_way: bool) -> None:
    """Also of logits so large that their quotient by a normal temperature overflows."""
    torch.manual_seed(1)
    logits = torch.randn(4, 64) * torch.tensor([1.0, 30.0, 1e30, 1e38]).unsqueeze(-1)
    logits[:, 5] = -torch.inf
    for temperature in (1e-30, 1e-38, 1e-40, 1e-45, 0.0):
        given = [torch.full((4,), value) for value in (temperature, nucleus, 0.999)]
        assert_same_bits(draw(logits, *given, one_way), logits.argmax(-1))


@pytest.mark.parametrize("one_way", [False, True], ids=["as-on-a-cpu", "as-on-a-gpu"])
def test_a_row_without_a_distribution_is_told_by_its_logprob_alone(one_way: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 40)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        for each in (logits[3 * row], logits[3 * row + 1], logits[3 * row + 2]):
            each.fill_(value)
    logits[1, 3:], logits[4, 3:] = 0.0, 0.0  # some of them
    logits[9, 7:] = -torch.inf  # a distribution, as 10 and 11
    for temperature, nucleus in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.5), (1e-40, 1.0), (2.0, 1e-40)):
        given = [torch.full((12,), value) for value in (temperature, nucleus, 0.5)]
        tokens = draw(logits, *given, one_way)
        assert ((tokens >= 0) & (tokens < 40)).all()
        assert logprobs(logits, tokens).isfinite().tolist() == [False] * 9 + [True] * 3
        assert_same_bits(tokens[9:], draw(logits[9:], *(each[9:] for each in given), one_way))


def test_a_seed_is_a_requests_own() -> None:
    first, again, other = Sampling(seed=3), Sampling(seed=3), Sampling(seed=4)
    numbers = [first.uniform() for _ in range(5)]
    assert numbers == [again.uniform() for _ in range(5)] != [other.uniform() for _ in range(5)]
    assert [Sampling(0.0, seed=3).uniform() for _ in range(2)] == [0.0, 0.0]


@pytest.mark.parametrize("text", ["plain", "ein Wörtchen, 東京 — 🙂🙂!", "", "a\nb\tc"])
def test_text_comes_whole_and_without_half_characters(text: str) -> None:
    tokenizer = make_byte_tokenizer()
    decoder = Decoder(tokenizer)
    parts = [decoder.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(parts) + decoder.flush() == text
    assert not any("\ufffd" in part for part in parts)


def test_a_client_that_does_not_read_is_taken_for_one_that_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep its request's place, and its adapter in a slot, for ever."""
    monkeypatch.setattr(api, "_LAST_WORDS", 0.0)
    ended = []

    async def never(*_: Any) -> None:
        await asyncio.Event().wait()

    async def texts() -> AsyncIterator[str]:
        yield "data: x\n\n"

    stream = api.EventStream(texts(), lambda: 0.05, lambda: ended.append(True))
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}  # uvicorn's
    asyncio.run(asyncio.wait_for(stream(scope, never, never), 20))
    assert ended == [True]


def test_a_body_of_mistakes_is_one_error() -> None:
    """Each of a million would take kilobytes, and all of them seconds."""
    many = [None] * 1000
    for kind, body in (
        (schemas.Completion, {"model": "m", "prompt": many}),
        (schemas.Completion, {"model": "m", "prompt": [many]}),
        (schemas.Chat, {"model": "m", "messages": many}),
        (schemas.Chat, {"model": "m", "messages": [{"role": "user", "content": many}]}),
    ):
        with pytest.raises(ValidationError) as caught:
            kind.model_validate(body)
        assert caught.value.error_count() <= 4


def test_half_a_character_at_the_end_is_given_out() -> None:
    tokenizer = make_byte_tokenizer()
    decoder = Decoder(tokenizer)
    assert [decoder.push(token) for token in tokenizer("a🙂")["input_ids"][:-1]] == ["a", "", "", ""]
    assert decoder.flush() == "\ufffd"


def test_half_characters_that_never_end_cost_no_more_each() -> None:
    """Bytes that begin no character: all of them would wait for the next one, and be decoded again with it."""
    tokenizer = make_byte_tokenizer()
    half = tokenizer("🙂")["input_ids"][0]
    longest = 0

    class Counted:
        def decode(self, ids: list[int], **options: Any) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            text: str = tokenizer.decode(ids, **options)
            return text

    decoder = Decoder(Counted())
    text = "".join(map(decoder.push, [half] * 300)) + decoder.flush()
    assert text == "\ufffd" * 300
    assert longest <= 64


@pytest.mark.parametrize(
    ("parts", "stops", "expected", "hit"),
    [
        (["ab", "cd", "ef"], ["cde"], ["ab", "", ""], True),
        (["ab", "cd", "xx"], ["cde"], ["ab", "", "cdxx"], False),
        (["aab", "aac"], ["aac"], ["aab", ""], True),
        (["a", "a", "a", "b"], ["aab"], ["", "", "a", ""], True),
        (["one END two"], ["END", "one"], [""], True),
        (["x", "y"], [""], ["x", "y"], False),
    ],
)
def test_stop_strings(parts: list[str], stops: list[str], expected: list[str], hit: bool) -> None:
    stop = Stops(stops)
    assert [stop.push(part, last=i == len(parts) - 1) for i, part in enumerate(parts)] == expected
    assert stop.hit == hit


def test_stop_strings_end_answers_where_a_search_of_the_whole_text_does() -> None:
    rng = random.Random(0)
    for letters in ("ab", "abc") * 1000:
        stops = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 3))]
        parts = ["".join(rng.choices(letters, k=rng.randint(0, 6))) for _ in range(8)]
        stop, out, whole = Stops(stops), "", ""
        for i, part in enumerate(parts):
            last, whole = i == len(parts) - 1, whole + part
            out += stop.push(part, last)
            found = [at for at in map(whole.find, stops) if at >= 0]
            held = [n for s in stops for n in range(1, len(s)) if whole.endswith(s[:n])]
            end = min(found) if found else len(whole) - (0 if last else max(held, default=0))
            assert (out, stop.hit) == (whole[:end], bool(found))
            if stop.hit:
                break


def test_stop_strings_cost_no_more_than_the_text() -> None:
    """Sixteen that nearly are the answer, as whoever knows it may choose them: 4,050 characters in linear steps."""

    class Counted(str):
        looks = 0

        def __getitem__(self, key: Any) -> str:
            Counted.looks += 1
            return super().__getitem__(key)

    answer = ("ab" * 40 + "c") * 50
    stop = Stops([Counted(answer[:i] + "!" + answer) for i in range(400, 4000, 225)])
    assert "".join(map(stop.push, answer)) + stop.push("", last=True) == answer
    assert not stop.hit
    assert Counted.looks < 16 * 8 * len(answer)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("serve-process"))


@pytest.mark.slow
@pytest.mark.parametrize("number", matrix([signal.SIGTERM, signal.SIGHUP], short={signal.SIGHUP}))
def test_the_process_ends_in_order(world: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "fastpeft", "serve", str(world / "model"), "--adapters", str(world / "adapters"),
               "--port", "0", "--dtype", "float32", "--json", "--grace", "20", "--host", "0.0.0.0"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as server:
        try:
            assert server.stdout is not None
            line, lines = "", []
            while line != "}\n":
                line = server.stdout.readline()
                assert line, server.communicate()[1]
                lines.append(line)
            told = json.loads("".join(lines))
            assert (told["model"], told["adapters"], told["pid"]) == ("model", 6, server.pid)
            url = told["url"].replace("0.0.0.0", "127.0.0.1")
            body = {"model": "a1", "prompt": "hi", "max_tokens": 150, "temperature": 0, "stream": True}
            got: list[httpx.Response] = []
            asking = threading.Thread(
                target=lambda: got.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))
            )
            asking.start()
            while httpx.get(f"{url}/health").json()["open_requests"] == 0 and not got:
                pass
            at = url.removeprefix("http://").split(":")
            half = [socket.create_connection((at[0], int(at[1]))) for _ in range(3)]
            half[0].sendall(b"GET /hea")
            half[1].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            server.send_signal(number)
            asking.join()
            answered = time.monotonic()
            _, errors = server.communicate(timeout=60)
            assert time.monotonic() - answered < 15  # of the 20 s that what is half-sent could take
            for one in half:
                one.close()
        finally:
            server.kill()
    assert server.returncode == 0, errors
    assert events(got[0])[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert "no password" in errors  # not the loopback address
    assert f"{number.name}: no new requests" in errors
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--adapters", "nowhere"], "nowhere is no folder"),
        (["--allow-runtime-adapters"], "needs a directory"),
        (["--max-length", "100000"], "more than the model's 512 positions"),
        (["--cache-tokens", "64"], "less than one request's 512"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:8000"),
        (["--max-body", "65"], "--max-body is more than --client-memory"),
        (["--dtype", "int8"], "dtype: expected one of"),
        (["--max-connections", "100000000"], "open files are too few for --max-connections 100000000"),
    ],
)
def test_command_line_errors(world: Path, words: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["serve", str(world / "model"), *words])
    assert done.exit_code == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_servers_packages_are_imported_by_the_command_alone() -> None:
    names = ["fastapi", "uvicorn", "prometheus_client", "transformers"]
    code = f"import sys, fastpeft, fastpeft.apps.cli.app; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
