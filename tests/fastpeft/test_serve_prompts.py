"""fastpeft serve with prompts: in mixed batches with LoRAs and the base each answers as real PEFT with it alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import PeftModel
from fastpeft.apps.serve import prefixes
from fastpeft.apps.serve.errors import ApiError
from fastpeft.apps.serve.limits import Limits
from fastpeft.apps.training.testing import make_tiny_model
from fastpeft.pool.prompts import Prompt
from forms import by_form
from safetensors.torch import load_file, save_file
from serve_prompts_tools import PROMPTS, PromptAlone, read_base, write_prompt
from serve_tools import Alone, Running, corrupt, events, make_adapter, running, until

from peft_kernels.testing import assert_no_worse

pytestmark = pytest.mark.filterwarnings("ignore")
LORAS = ["a0", "a1"]
TEXTS = ["hello", "a longer prompt, of some words"]
TOKENS = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prompts")
    make_tiny_model(root / "model")
    for seed, name in enumerate(LORAS):
        make_adapter(root, name, seed)
    for seed, name in enumerate(PROMPTS):
        write_prompt(read_base(root / "model"), name, root / "adapters" / name, seed)
    return root


@pytest.fixture(scope="module")
def alone(world: Path) -> PromptAlone:
    return PromptAlone(world)


@pytest.fixture(scope="module")
def plain(world: Path) -> Alone:
    return Alone(world)


def limits(**changes: Any) -> Limits:
    return Limits(**{"max_length": 256, "max_batch": 8, "max_queue": 32, "batch_tokens": 64, "page": 16, **changes})


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[Running]:
    with running(world, max_resident=16, by_request=True, limits=limits()) as server:
        yield server
        until(server.idle)


def together(server: Running, asked: list[tuple[str, str]], tokens: int = TOKENS, **more: Any) -> list[Any]:
    """Answers to requests that are there at once."""
    with ThreadPoolExecutor(len(asked)) as threads:
        sent = [threads.submit(server.complete, name, text, tokens, **more) for name, text in asked]
        return [each.result().json() for each in sent]


def spelled(alone: PromptAlone, ids: list[int]) -> str:
    return str(alone.tokenizer.decode([i for i in ids if i != alone.tokenizer.eos_token_id], skip_special_tokens=False))


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


@pytest.fixture(scope="module")
def answers(server: Running) -> dict[tuple[str, str], Any]:
    """Of all adapters and the base at once, of which eight are in the batch: rows leave it and others join."""
    asked = [(name, text) for text in TEXTS for name in [*PROMPTS, *LORAS, "base"]]
    return dict(zip(asked, together(server, asked, logprobs=0), strict=True))


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_in_a_mixed_batch_answers_as_real_peft_alone(
    name: str, answers: dict[tuple[str, str], Any], alone: PromptAlone, world: Path
) -> None:
    own = PeftModel.from_pretrained(read_base(world / "model"), world / "adapters" / name).eval()
    for text in TEXTS:
        ids, answer = alone.ids(name, text, TOKENS), answers[name, text]
        assert alone.ids(name, text, TOKENS, own) == ids
        assert text_of(answer) == spelled(alone, ids)
        # tokens of the prompt are not the client's
        assert answer["usage"] == {
            "prompt_tokens": len(text), "completion_tokens": len(ids), "total_tokens": len(text) + len(ids)
        }  # fmt: skip
        told = torch.tensor(answer["choices"][0]["logprobs"]["token_logprobs"])
        eager, exact = (alone.logprobs(name, text, ids, dtype) for dtype in (torch.float32, torch.float64))
        # what rounding does in one layer goes through all that follow
        assert_no_worse(told, eager, exact, 8 * (exact.abs() + exact.abs().mean()))


def test_who_is_with_prompts_in_a_batch_sees_nothing_of_them(
    answers: dict[tuple[str, str], Any], plain: Alone, server: Running
) -> None:
    for name in (*LORAS, "base"):
        for text in TEXTS:
            assert text_of(answers[name, text]) == plain.text(None if name == "base" else name, text, TOKENS)
    told = {name: str(answers[name, TEXTS[0]]["choices"][0]["logprobs"]) for name in [*PROMPTS, *LORAS, "base"]}
    assert len(set(told.values())) == len(told)
    listed = [entry["id"] for entry in server.client.get("/v1/models").json()["data"]]
    assert set(listed) == {"base", *LORAS, *PROMPTS}


def test_a_stream_a_seed_and_a_stop_are_as_without_a_prompt(server: Running, alone: PromptAlone) -> None:
    want = spelled(alone, alone.ids("mlp", "hello", TOKENS))
    told = events(server.complete("mlp", "hello", TOKENS, stream=True))
    assert "".join(event["choices"][0]["text"] for event in told) == want
    sampled = {"temperature": 1.5, "top_p": 0.9, "seed": 5}
    first, again = (text_of(server.complete("prefix", "hello", TOKENS, **sampled).json()) for _ in range(2))
    assert first == again
    stop = want[4:6]
    assert text_of(server.complete("mlp", "hello", TOKENS, stop=stop).json()) == want[: want.index(stop)]


def test_requests_that_the_scheduler_computes_anew(world: Path, alone: PromptAlone, monkeypatch: Any) -> None:
    """The cache holds a few of them: the others lose their pages and get them again, and long ones come in parts."""
    again, whole = [], prefixes.RowScheduler.add_waiting_request

    def counted(self: Any, state: Any) -> None:
        if state._true_initial_tokens:
            again.append(state.request_id)
        whole(self, state)

    monkeypatch.setattr(prefixes.RowScheduler, "add_waiting_request", counted)
    own = limits(max_length=128, batch_tokens=24)
    with running(world, max_resident=16, limits=own, cache_tokens=160) as server:
        names = by_form(short=["mlp", "prefix", "cartridge", "prompt"], full_form=[*PROMPTS] * 4)
        asked = [(name, "y" * (31, 40, 16, 1)[i % 4]) for i, name in enumerate(names)]
        for (name, text), answer in zip(asked, together(server, asked, 24), strict=True):
            assert text_of(answer) == spelled(alone, alone.ids(name, text, 24)), (name, len(text))
        until(server.idle)
    assert again


def test_a_batch_that_raises_is_computed_one_by_one_behind_its_prompts(
    server: Running, answers: dict[tuple[str, str], Any]
) -> None:
    names, faults = ["prompt", "cartridge", "a0", "base"], [RuntimeError("a fault of nobody's")]

    def raises(*_: Any) -> None:
        if faults:
            raise faults.pop()

    hook = None
    with ThreadPoolExecutor(len(names)) as threads:
        with server.engine.manager.pause():
            sent = [threads.submit(server.complete, name, TEXTS[0], TOKENS) for name in names]
            until(lambda: server.engine.open == len(names))
            hook = server.engine.model.model.layers[1].register_forward_pre_hook(raises)
        found = [each.result().json() for each in sent]
    hook.remove()
    assert not faults
    for name, answer in zip(names, found, strict=True):
        assert text_of(answer) == text_of(answers[name, TEXTS[0]])


def test_a_prompt_that_cannot_be_computed_fails_its_own_requests(
    server: Running, answers: dict[tuple[str, str], Any], monkeypatch: Any, world: Path
) -> None:
    """Keys and values that raise while they are made, and such as overflow, as a larger model's may."""
    for name, factor in (("fails", 1.0), ("large", 2.0)):
        folder = shutil.copytree(world / "adapters" / "prompt", world / "adapters" / name)
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({key: t.sign() * factor for key, t in tensors.items()}, folder / "adapter_model.safetensors")
    whole = Prompt.key_values

    def key_values(self: Prompt, model: Any) -> torch.Tensor:
        size = 0.0 if self.vectors is None else float(self.vectors.abs().max())
        if size == 1:
            raise RuntimeError("where it lies")
        found = whole(self, model)
        return found.fill_(torch.inf) if size == 2 else found

    monkeypatch.setattr(Prompt, "key_values", key_values)
    try:
        names = ["fails", "prompt", "large", "a0", "fails", "base"]
        found = together(server, [(name, TEXTS[0]) for name in names])
        for name, answer in zip(names, found, strict=True):
            if name == "fails":
                assert answer["error"]["message"].endswith("this request: RuntimeError")
            elif name == "large":
                assert answer["error"]["code"] == "not_finite"
            else:
                assert text_of(answer) == text_of(answers[name, TEXTS[0]])
        until(server.idle)
    finally:
        for name in ("fails", "large"):
            shutil.rmtree(world / "adapters" / name)
            server.post("/v1/unload_lora_adapter", lora_name=name)


def test_virtual_tokens_take_their_place_in_the_context(server: Running) -> None:
    fits = server.complete("cartridge", "y" * 200, 21)
    assert fits.status_code == 200
    for text, tokens in (("y" * 200, 22), ("y" * 221, None), ("y" * 240, 2)):
        asked = {"model": "cartridge", "prompt": text, "temperature": 0}
        refused = server.post(**asked, **({} if tokens is None else {"max_tokens": tokens}))
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "the adapter puts 35 virtual tokens before it" in error["message"]
    engine = server.engine
    assert engine.check([40] * 200, None, Prompt(35)) == 21
    with pytest.raises(ApiError):
        engine.check([40] * 221, None, Prompt(35))
    assert server.complete("base", "y" * 240, 2).status_code == 200
    until(server.idle)


def test_prompts_are_loaded_and_unloaded_by_requests_and_replaced_while_they_run(
    server: Running, world: Path, alone: PromptAlone
) -> None:
    archive = world / "adapters" / "archive"
    for i, name in enumerate(("first", "second")):
        write_prompt(read_base(world / "model"), "prefix", archive / name, 50 + i)
    (world / "adapters" / "task-new").symlink_to(archive / "first")  # a name for `alone`
    want = [spelled(alone, alone.ids(f"archive/{name}", "hello", 60)) for name in ("first", "second")]
    assert want[0] != want[1]
    assert server.post("/v1/load_lora_adapter", lora_name="swap", lora_path="archive/first").status_code == 200
    with ThreadPoolExecutor(2) as threads:
        with server.engine.manager.pause():
            old = threads.submit(server.complete, "swap", "hello", 60)
            until(lambda: server.engine.open == 1)
            for file in archive.joinpath("second").iterdir():
                shutil.copy(file, archive / "first")
            assert server.pool is not None
            assert "swap" in server.pool.rescan()[2]
            new = threads.submit(server.complete, "swap", "hello", 60)
            until(lambda: server.engine.open == 2)
            assert server.pool.stats().virtual_tokens_taken >= 32  # both
        assert [text_of(each.result().json()) for each in (old, new)] == want
    assert server.post("/v1/unload_lora_adapter", lora_name="swap").status_code == 200
    assert server.complete("swap", "hello").status_code == 404


def test_broken_prompts_fail_their_own_requests(server: Running, world: Path) -> None:
    root = world / "adapters"
    corrupt(world, "cut", "prompt")
    try:
        found = together(server, [("cut", "hello"), ("prompt", "hello"), ("cut", "hello")])
        assert [each.get("error", {}).get("code") for each in found] == ["adapter_unusable", None, "adapter_unusable"]
        shutil.copy(root / "prompt" / "adapter_model.safetensors", root / "cut")
        assert text_of(server.complete("cut", "hello", TOKENS).json()) == text_of(found[1])  # mended
    finally:
        shutil.rmtree(root / "cut")


def test_a_folder_of_prompts_alone_makes_no_layer_ready(world: Path, tmp_path: Path, alone: PromptAlone) -> None:
    (tmp_path / "model").symlink_to(world / "model")
    shutil.copytree(world / "adapters" / "mlp", tmp_path / "adapters" / "mlp")
    with running(tmp_path, max_rank=None) as server:
        assert server.pool is not None
        assert not server.pool.layers
        found = together(server, [("mlp", "hello"), ("base", "hello")])
        assert text_of(found[0]) == spelled(alone, alone.ids("mlp", "hello", TOKENS)) != text_of(found[1])
        stats = server.pool.stats()
        assert (stats.virtual_tokens, stats.virtual_tokens_taken) == (80, 20)
        assert server.metric("fastpeft_pool_virtual_tokens_taken") == 20
        until(server.idle)
