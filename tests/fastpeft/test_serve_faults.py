"""A request's fault is its own: each is put into a batch of other requests, which must see nothing of it.

Faults come in by what a client sends, by an adapter's files, or by a hook of the model and a tokenizer that raise for
one request's text, as any model and tokenizer may.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from fastpeft.apps.serve.engine import Engine, Limits
from fastpeft.apps.serve.errors import ApiError
from fastpeft.apps.serve.metrics import Metrics
from fastpeft.apps.serve.sampling import Sampling
from forms import by_form, matrix
from safetensors.torch import load_file, save_file
from serve_tools import ADAPTERS, Alone, Running, corrupt, events, make_world, running, until

UNREADABLE = "unreadable"  # in a prompt that the tokenizer does not take
TOKENS = 24
SPOILT = 77  # the position at which the model fails; prompts of the others and their answers end before


def scaled(root: Path, name: str, factor: float, like: str = "a0") -> None:
    """An adapter whose values are finite, and what a model makes of them is not."""
    folder = root / "adapters" / name
    shutil.copytree(root / "adapters" / like, folder)
    (folder / "fastpeft_manifest.json").unlink()  # it would warn of other tensors
    file = folder / "adapter_model.safetensors"
    save_file({key: t.sign() * factor for key, t in load_file(file).items()}, file, {"format": "pt"})


class Fragile:
    """A tokenizer that fails for some texts and for one token."""

    def __init__(self, whole: Any) -> None:
        self.whole, self.bad = whole, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def __call__(self, text: str, **options: Any) -> Any:
        if UNREADABLE in text:
            raise TypeError("TextInputSequence must be str")
        return self.whole(text, **options)

    def decode(self, ids: list[int], **options: Any) -> str:
        if self.bad in ids:
            raise OverflowError("out of range integral type conversion attempted")
        text: str = self.whole.decode(ids, **options)
        return text


class Spoiler:
    """Hooks of a model that spoil whatever request comes to position `SPOILT`: NaN there, or an exception."""

    def __init__(self, model: Any) -> None:
        self.raises: BaseException | None = None
        self.once = False
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.get_input_embeddings().register_forward_hook(self._embedded)

    def _before(self, _: Any, args: Any, given: dict[str, Any]) -> None:
        self.where = given["position_ids"] == SPOILT
        raises = self.raises
        if raises is not None and self.where.any():
            self.raises = None if self.once else raises
            raise raises

    def _embedded(self, _: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill(self.where.unsqueeze(-1), torch.nan)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("faults"))
    scaled(root, "large", 1e20)
    scaled(root, "largest", 3e38)
    corrupt(root, "cut")
    return root


@pytest.fixture(scope="module")
def alone(world: Path) -> Alone:
    return Alone(world)


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[Running]:
    with running(world, by_request=True, max_resident=8) as server:
        server.loaded.service.tokenizer = Fragile(server.loaded.service.tokenizer)
        yield server


@pytest.fixture(scope="module")
def spoiler(server: Running) -> Spoiler:
    return Spoiler(server.engine.model)


class Company:
    """Requests of all kinds that run while something else happens, and must answer as they do alone."""

    def __init__(self, server: Running, alone: Alone) -> None:
        self.server, self.alone = server, alone
        sampled = {"temperature": 1.2, "top_p": 0.9, "seed": 11}
        self.asked: list[tuple[str, str, dict[str, Any]]] = [
            ("base", "hello", {}), ("a1", "hello", {}), ("a2", "The sea.", {"stream": True}),
            ("a3", "hello", sampled), ("a3", "hello", {**sampled, "stream": True}), ("a4", "x", {"logprobs": 0}),
        ]  # fmt: skip
        self.want = [self.text(*each) for each in self.asked]
        for (name, prompt, more), text in zip(self.asked, self.want, strict=True):
            if "seed" not in more:
                assert text == alone.text(None if name == "base" else name, prompt, TOKENS)
        assert self.want[3] == self.want[4]  # one seed, one answer

    def text(self, name: str, prompt: str, more: dict[str, Any]) -> str:
        answer = self.server.complete(name, prompt, TOKENS, **more)
        assert answer.status_code == 200, answer.text
        told = events(answer) if more.get("stream") else [answer.json()]
        assert not any("error" in each for each in told), told
        return "".join(each["choices"][0]["text"] for each in told)

    def unspoken(self) -> str:
        """A prompt of the base whose first token nobody here says, and which the tokenizer then does not spell."""
        tokenizer = self.server.loaded.service.tokenizer
        tokenizer.bad = -1
        said = {id for text in self.want for id in tokenizer(text)["input_ids"]}
        for name, prompt, more in self.asked:
            if "seed" not in more:
                said |= set(self.alone.ids(None if name == "base" else name, prompt, TOKENS))
        for letter in map(chr, range(32, 127)):
            first = self.alone.ids(None, letter, 1)[0]
            if first not in said and first >= 5:  # no special token
                tokenizer.bad = first
                return letter
        raise AssertionError("all of them are said")

    def sees_nothing_of(self, fault: Callable[[], None]) -> None:
        """Run `fault` again and again until all have answered, at least twice."""
        restarts = self.server.metric("fastpeft_engine_restarts_total")
        with ThreadPoolExecutor(len(self.asked)) as threads:
            texts = [threads.submit(self.text, *each) for each in self.asked]
            times = 0
            while times < 2 or not all(text.done() for text in texts):
                fault()
                assert self.server.client.get("/health").status_code == 200
                times += 1
            assert [text.result() for text in texts] == self.want
        assert self.server.metric("fastpeft_engine_restarts_total") == restarts
        until(self.server.idle)


@pytest.fixture(scope="module")
def company(server: Running, alone: Alone) -> Company:
    return Company(server, alone)


NAN: dict[str, Any] = {"prompt": "y" * (SPOILT - 3), "max_tokens": 8, "seed": 1}  # its fourth token or so
RAISES = IndexError("index out of range in self")
# name: (the request, the status, a part of its reason)
FAULTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "a forward raises, decoding": ({**NAN, "raises": RAISES}, 500, "IndexError"),
    "a forward raises, prompt": ({"prompt": "y" * 100, "raises": RAISES}, 500, "IndexError"),
    "no memory": ({"prompt": "y" * 100, "raises": MemoryError()}, 500, "the engine failed"),
    "NaN, decoding": (NAN, 500, "not finite"),
    "NaN, prompt": ({"prompt": "y" * 100}, 500, "not finite"),
    "NaN, greedy": ({**NAN, "temperature": 0}, 500, "not finite"),
    "NaN, nucleus": ({**NAN, "top_p": 0.5, "temperature": 1e-40}, 500, "not finite"),
    "NaN, last token": ({"prompt": "y" * SPOILT + "y", "max_tokens": 1}, 500, "not finite"),
    "NaN, logprobs": ({**NAN, "logprobs": 0}, 500, "not finite"),
    "NaN, an adapter's": ({**NAN, "model": "a5"}, 422, "adapter 'a5'"),
    "large adapter": ({"model": "large"}, 422, "adapter 'large'"),
    "largest adapter": ({"model": "largest", "top_p": 0.3}, 422, "not finite"),
    "largest adapter, greedy": ({"model": "largest", "temperature": 0}, 422, "not finite"),
    "cut adapter": ({"model": "cut"}, 422, "adapter 'cut'"),
    "a prompt that the tokenizer does not take": ({"prompt": f"a{UNREADABLE}"}, 400, "tokenizer cannot take"),
    "an answer that it does not spell": ({"spells": False}, 500, "tokenizer cannot spell"),
    "a logprob that it does not spell": ({"spells": False, "logprobs": True}, 500, "tokenizer cannot spell"),
}


SHORT = {
    "a forward raises, decoding", "NaN, prompt", "NaN, last token", "largest adapter", "cut adapter",
    "a prompt that the tokenizer does not take", "an answer that it does not spell",
}  # fmt: skip


@pytest.mark.parametrize("name", matrix(FAULTS, SHORT))
def test_a_fault_is_its_own_requests(server: Running, company: Company, spoiler: Spoiler, name: str) -> None:
    change, status, reason = FAULTS[name]
    body = {"model": "base", "prompt": "hello", "max_tokens": 4, **change}
    spoiler.raises, spoiler.once = body.pop("raises", None), False
    if not body.pop("spells", True):
        body |= {"prompt": company.unspoken(), "temperature": 0}
    streams = itertools.cycle([False, True])

    def fault() -> None:
        stream = next(streams)
        answer = server.post(**body, stream=stream)
        if stream and answer.status_code == 200:  # it had begun
            *_, error = events(answer)
        else:
            assert answer.status_code == status, answer.text
            error = answer.json()
        assert reason in error["error"]["message"]

    company.sees_nothing_of(fault)


def test_an_adapter_that_does_not_get_into_its_slot(
    server: Running, company: Company, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = server.pool.try_acquire  # type: ignore[union-attr]
    no_room = lambda name: acquire(name) if name != "a5" else [][0]  # noqa: E731
    monkeypatch.setattr(server.pool, "try_acquire", no_room)

    def fault() -> None:
        answer = server.complete("a5", "hello")
        assert answer.status_code == 500
        assert "slot: IndexError" in answer.json()["error"]["message"]

    company.sees_nothing_of(fault)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away(server: Running, company: Company, stream: bool) -> None:
    cancelled = server.metric("fastpeft_cancelled_total")
    body = {"model": "a5", "prompt": "hello", "max_tokens": 200, "temperature": 0, "stream": stream}

    def fault() -> None:
        with (
            httpx.Client(base_url=server.client.base_url, timeout=0.05) as client,
            contextlib.suppress(httpx.ReadTimeout),
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            next(response.iter_bytes(1))

    deadline = time.monotonic() + 30  # until one was in the batch: each may leave before its request has begun
    while server.metric("fastpeft_cancelled_total") == cancelled and time.monotonic() < deadline:
        company.sees_nothing_of(fault)
    assert server.metric("fastpeft_cancelled_total") > cancelled


def test_extremes_of_sampling_are_the_likeliest_token(server: Running, company: Company, alone: Alone) -> None:
    want = alone.text("a5", "hello", 6)
    extremes = itertools.cycle([
        {"temperature": 1e-40}, {"temperature": 1e-45}, {"temperature": 1e-38, "seed": -(10**4000)},
        {"temperature": 5e-324, "top_p": 5e-324}, {"temperature": 1.2e-38, "top_p": 0.5}, {"top_p": 1e-40},
        {"temperature": 2, "top_p": 1e-300, "seed": 10**4000}, {"temperature": 1e-30, "logprobs": 0},
        {"temperature": -0.0, "stop": ""},
    ])  # fmt: skip

    def fault() -> None:
        for _ in range(3):
            answer = server.complete("a5", "hello", 6, **next(extremes))
            assert answer.json()["choices"][0]["text"] == want

    company.sees_nothing_of(fault)


def test_an_adapter_that_is_unloaded_while_it_waits_or_runs(server: Running, company: Company, world: Path) -> None:
    """Requests that run with it end with it; those that wait or come are told that there is none."""
    path = str(world / "adapters" / "a5")

    def fault() -> None:
        answer = server.post("/v1/load_lora_adapter", lora_name="mine", lora_path=path)
        assert answer.status_code == 200, answer.text
        with ThreadPoolExecutor(2) as threads:
            running = [threads.submit(server.complete, "mine", "hello", 12) for _ in range(2)]
            assert server.post("/v1/unload_lora_adapter", lora_name="mine").status_code == 200
            for each in running:
                if each.result().status_code == 200:
                    assert each.result().json()["choices"][0]["text"] == company.alone.text("a5", "hello", 12)
                else:
                    assert each.result().status_code == 404

    company.sees_nothing_of(fault)


def test_loads_and_unloads_of_one_name_at_once(server: Running, company: Company, world: Path) -> None:
    """Each gets an answer of its own, and a load that failed takes nobody else's adapter away."""
    paths = [str(world / "adapters" / name) for name in ("a5", "cut")]
    found: set[int] = set()

    def one(step: int) -> None:
        change = [
            ("/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": paths[step % 2]}),
            ("/v1/unload_lora_adapter", {"lora_name": "mine"}),
        ][step // 2 % 2]
        found.add(server.post(change[0], **change[1]).status_code)

    def fault() -> None:
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(one, range(30)))

    company.sees_nothing_of(fault)
    assert 200 in found
    assert found <= {200, 400, 404, 409, 422}
    server.post("/v1/unload_lora_adapter", lora_name="mine")
    assert server.complete("mine", "hello").status_code == 404


@pytest.fixture
def engine(world: Path) -> Iterator[Engine]:
    """An engine without HTTP, whose cache is smaller than what it lets in."""
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    limits = Limits(max_length=256, max_batch=4, max_queue=64, batch_tokens=32, page=16, cache_tokens=96, timeout=20)
    engine = Engine(model, None, [], limits, Metrics())
    yield engine
    assert engine.open == 0
    assert engine.metrics.registry.get_sample_value("fastpeft_engine_restarts_total") == 0


async def answer(engine: Engine, prompt: list[int], tokens: int) -> list[int]:
    request = engine.admit("base", engine.check(prompt, tokens))
    try:
        await engine.begin(request, prompt, None, Sampling(0.0))
        return [token.id async for token in engine.tokens(request)]
    finally:
        engine.leave(request)


def run(engine: Engine, work: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        engine.start()
        try:
            await work()
            while engine.open:
                await asyncio.sleep(0.01)
        finally:
            await asyncio.to_thread(engine.stop)

    asyncio.run(whole())


def test_a_request_that_the_cache_cannot_hold_fails_alone(engine: Engine) -> None:
    async def work() -> None:
        want = await answer(engine, [40, 41], 20)
        for long in (answer(engine, [50] * 200, 8), answer(engine, [50] * 60, 100)):
            short, failed, other = await asyncio.gather(
                answer(engine, [40, 41], 20), long, answer(engine, [40, 41], 20), return_exceptions=True
            )
            assert isinstance(failed, ApiError)
            assert "do not fit into the key-value cache" in failed.message
            assert short == other == want

    run(engine, work)


def test_requests_that_are_given_up_at_any_moment(engine: Engine) -> None:
    """Before the loop has seen them, with it, and after: nobody is computed who has left, and nothing is left."""

    async def give_up(steps: int) -> None:
        request = engine.admit("base", 8)
        await engine.begin(request, [40, 41], None, Sampling(0.0))
        for _ in range(steps):
            await asyncio.sleep(0)
        engine.leave(request)
        engine.leave(request)

    async def work() -> None:
        want = await answer(engine, [40, 41], 8)
        for i in range(by_form(short=16, full_form=200)):
            first, *_ = await asyncio.gather(answer(engine, [40, 41], 8), *map(give_up, range(i % 16)))
            assert first == want

    run(engine, work)


def test_a_loop_that_ends_takes_those_that_had_begun(server: Running, company: Company, spoiler: Spoiler) -> None:
    """A defect that is no request's: a clear 500 for who had tokens; who waits, or comes then, is answered."""
    restarts = server.metric("fastpeft_engine_restarts_total")
    full, prompt = server.engine.limits.max_batch, "y" * (SPOILT - 40)
    steady = next(name for name in (None, *ADAPTERS) if len(company.alone.ids(name, prompt, 60)) == 60) or "base"
    spoiler.raises, spoiler.once = SystemExit("a defect"), True
    with ThreadPoolExecutor(full + len(company.asked)) as threads:
        begun = [threads.submit(server.complete, steady, prompt, 60, stream=i == 0) for i in range(full)]
        until(lambda: server.engine.open == full and not server.engine.waiting)
        waiting = [threads.submit(company.text, *each) for each in company.asked]
        streamed, *others = [each.result() for each in begun]
        assert "SystemExit" in events(streamed)[-1]["error"]["message"]
        for answer in others:
            assert answer.status_code == 500
            assert "SystemExit" in answer.json()["error"]["message"]
        assert [each.result() for each in waiting] == company.want
    assert server.metric("fastpeft_engine_restarts_total") == restarts + 1
    assert server.client.get("/health").status_code == 200
    until(server.idle)
