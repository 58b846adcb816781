"""One mode of the families' models in a process of its own, which loads one model after another as families.py says.

Protocol: a JSON object a line each way; the first names the mode. `load`: a model is loaded and its costs are replied;
`step`, `token`: one is run. What fails is replied as `error`, and the process goes on.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from typing import Any

from ..pipes import driven
from . import worker
from .bounds import costs

OWN = "-own"


def inputs(model: Any, family: str, rows: int, length: int) -> dict[str, Any]:
    """A batch of the family's model, every token of text learned: CLIP has a caption of 64 tokens for each image."""
    import torch

    config, g = model.config, torch.Generator().manual_seed(5)
    images = {"pixel_values": torch.randn(rows, 3, 224, 224, generator=g).to(model.dtype)}
    if family == "vit":
        return {**images, "labels": torch.zeros(rows, dtype=torch.long)}
    if family == "clip":
        ids = torch.randint(3, config.text_config.vocab_size, (rows, 64), generator=g)
        return {**images, "input_ids": ids, "return_loss": True}
    given = worker.tokens_of(model, rows, length)
    if family in ("bert", "roberta"):
        return {"input_ids": given["input_ids"], "labels": torch.zeros(rows, dtype=torch.long)}
    if family == "whisper":
        frames = torch.randn(rows, config.num_mel_bins, 2 * config.max_source_positions, generator=g)
        return {"input_features": frames.to(model.dtype), "labels": given["labels"], "use_cache": False}
    return given


def one_token(model: Any, tokens: int) -> Callable[[], dict[str, Any]]:
    """Greedy `generate` after 16 random tokens: seconds of a token, from the first to the last of `tokens` more."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.at: list[float] = []

        def put(self, value: Any) -> None:
            self.at.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = worker.tokens_of(model, 1, 16)["input_ids"]
    count = tokens + 1
    options: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False,
                               "attention_mask": torch.ones_like(ids)}  # fmt: skip

    def run() -> dict[str, Any]:
        clock = Clock()
        with torch.no_grad():
            out = model.generate(ids, streamer=clock, **options)
        _, first, *_, last = clock.at  # the prompt is put first
        return {"s": (last - first) / tokens, "ids": out[0, ids.shape[1] :].tolist()}

    return run


def is_linear4bit(module: Any) -> bool:
    import bitsandbytes

    return isinstance(module, bitsandbytes.nn.Linear4bit)


class Loaded:
    """A family's model in a mode, trained first: bitsandbytes' layers change for good when they are evaluated."""

    def __init__(self, mode: str, task: dict[str, Any]) -> None:
        causal = task["auto"] == "AutoModelForCausalLM"
        lora = {"target_modules": task["targets"], "task_type": "CAUSAL_LM" if causal else None}
        self.mode, self.task, self.parts = mode, task, {}
        self.model = worker.load(mode, task["folder"], task["dropout"], "cpu", 1, task["auto"], task["skip"], **lora)
        self.found = costs(self.model, task["rows"], task["length"]) if mode.startswith("ours") else {
            "quantized": sum(is_linear4bit(m) for m in self.model.modules()),
            "trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }  # fmt: skip
        if mode.endswith(OWN):
            import fastpeft

            report = fastpeft.accelerate(self.model, loss=causal)
            self.found["stays"] = report.shortfalls

    def run(self, what: str) -> dict[str, Any]:
        """A step or a token; the first one is not to be counted."""
        if what not in self.parts:
            self.parts[what] = self._make(what)
        return self.parts[what]()

    def _make(self, what: str) -> Callable[[], dict[str, Any]]:
        task = self.task
        if what == "step":
            given = inputs(self.model, task["family"], task["rows"], task["length"])
            return worker.TrainStep(self.model, self.mode.removesuffix(OWN), given)
        self.model.eval()
        return one_token(self.model, task["tokens"])


def main() -> None:
    task, told, reply = driven()
    import torch

    torch.set_num_threads(task["threads"])
    loaded: Loaded | None = None
    reply({"ready": True})
    for line in told:
        order = json.loads(line)
        try:
            if order["do"] == "load":
                loaded = None
                gc.collect()
                loaded = Loaded(task["mode"], {**task, **order})
                reply(loaded.found)
            else:
                assert loaded is not None
                reply(loaded.run(order["do"]))
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"})


if __name__ == "__main__":
    main()
