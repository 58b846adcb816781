"""A server in this process on a tiny random model with some adapters, and what its answers must be."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastpeft
import httpx
import torch
import transformers
from fastpeft.apps.serve.connections import places
from fastpeft.apps.serve.limits import Limits
from fastpeft.apps.serve.run import Loaded, Options, Server, listen, load
from fastpeft.apps.serve.text import Decoder
from fastpeft.apps.training.testing import make_tiny_model

ADAPTERS = [f"a{i}" for i in range(6)]
PROMPTS = ["hello", "a longer prompt, of some words", "x", "The sea."]


def make_world(root: Path) -> Path:
    """A model and adapters of ranks 2 to 6 that change its answers."""
    make_tiny_model(root / "model")
    (root / "adapters").mkdir()
    for seed, name in enumerate(ADAPTERS):
        make_adapter(root, name, seed)
    return root


def make_adapter(root: Path, name: str, seed: int) -> Path:
    torch.manual_seed(100 + seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    config = fastpeft.LoraConfig(r=2 + 2 * (seed % 3), target_modules="all-linear", init_lora_weights=False)
    adapted = fastpeft.get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.mul_(3)
    adapted.save_pretrained(root / "adapters" / name)
    return root / "adapters" / name


class Alone:
    """Each adapter's answers when it is alone, by transformers' `generate`."""

    def __init__(self, root: Path, nf4: bool = False) -> None:
        self.root, self.nf4 = root, nf4
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(root / "model")
        self.ids, self.model = functools.cache(self._ids), functools.cache(self._model)

    def _model(self, name: str | None) -> Any:
        base = transformers.AutoModelForCausalLM.from_pretrained(self.root / "model", dtype=torch.float32)
        if self.nf4:
            base = fastpeft.quantize_model(base, "nf4", double_quant=True, skip=["lm_head"])
        if name is not None:
            base = fastpeft.PeftModel.from_pretrained(base, str(self.root / "adapters" / name))
        return base.eval()

    def _ids(self, name: str | None, prompt: str, tokens: int) -> tuple[int, ...]:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = self.model(name).generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())

    def text(self, name: str | None, prompt: str, tokens: int) -> str:
        ids = [i for i in self.ids(name, prompt, tokens) if i != self.tokenizer.eos_token_id]
        decoder = Decoder(self.tokenizer)
        return "".join(map(decoder.push, ids)) + decoder.flush()


class Running:
    """A server that listens, and a client of it."""

    def __init__(self, loaded: Loaded, server: Server, port: int) -> None:
        self.loaded, self.server, self.port = loaded, server, port
        self.engine, self.pool = loaded.service.engine, loaded.pool
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, model: str, prompt: str, tokens: int = 8, **more: Any) -> httpx.Response:
        return self.post(model=model, prompt=prompt, max_tokens=tokens, **{"temperature": 0, **more})

    def idle(self) -> bool:
        """True if nothing is left of any request: no row, no handler, no lease, no page of the cache."""
        engine = self.engine
        processor: Any = engine.manager.batch_processor
        tables = [a.block_table for a in processor.cache.cache_allocators.values()]
        return not (
            engine.open or engine.rows.by_id or engine.manager.output_router.result_handlers or any(tables)
            or (self.pool is not None and self.pool.stats().in_use)
        )  # fmt: skip

    def metric(self, name: str, **labels: str) -> float:
        return self.engine.metrics.registry.get_sample_value(name, labels) or 0.0


@contextlib.contextmanager
def running(root: Path, adapters: bool = True, limits: Limits | None = None, **options: Any) -> Iterator[Running]:
    given: dict[str, Any] = {"name": "base", "dtype": "float32", "max_resident": 4, "max_rank": 8, "cache_tokens": 4096}
    given |= {"adapters": root / "adapters" if adapters else None, "rescan": 3600.0, **options}
    chosen = limits or Limits(max_length=256, max_batch=8, max_queue=8, batch_tokens=64, page=16, timeout=60)
    chosen_options = Options(str(root / "model"), limits=chosen, **{"grace": 5, **given})
    loaded = load(chosen_options, lambda line: None)
    ready = threading.Event()
    with contextlib.closing(listen("127.0.0.1", 0)) as sock:
        server = Server(loaded, chosen_options, places(chosen_options.connections), ready.set, lambda line: None)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])))
        thread.start()
        try:
            assert ready.wait(60)
            yield Running(loaded, server, sock.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)
            loaded.close()
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, which must end with [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def corrupt(root: Path, name: str, like: str = "a0") -> Path:
    """A folder like an adapter's whose tensors end early."""
    folder = root / "adapters" / name
    shutil.copytree(root / "adapters" / like, folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder
