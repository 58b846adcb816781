"""The main job: fine-tune SmolLM2-135M-Instruct in 4 bits on Python's documentation, and show what changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpeft.training import models
from fastpeft.training.config import TrainConfig
from fastpeft.training.data import Record
from fastpeft.training.errors import UserError
from fastpeft.training.metrics import Console

from . import pydocs

TRAIN_PAIRS, HELD_OUT_PAIRS, ANSWER_TOKENS = 1600, 96, 40
# Held-out objects that a reader knows; where this Python lacks one, others fill in.
_KNOWN = ("math.dist", "textwrap.fill", "tempfile.mkdtemp", "pathlib.Path.is_file", "random.choices")


@dataclass
class Clock:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def mark(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = round(now - self._last, 2)
        self._last = now


def config(output: Path, steps: int) -> TrainConfig:
    """The settings of the quickstart; `runs/quickstart/config.yaml` holds them as a file for `fastpeft train`."""
    return TrainConfig(
        model=models.PACKAGED,
        data="train.jsonl",
        eval_data="held_out.jsonl",
        output=str(output),
        lora={"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
        quantize="nf4",
        double_quant=True,
        max_length=128,  # short rows: attention over a row costs its square
        batch_size=6,
        learning_rate=1e-3,
        schedule="cosine",
        warmup=0.05,
        min_lr_ratio=0.05,
        max_steps=steps,
        eval_every=max(1, steps // 4),
        save_every=max(1, steps // 4),
        keep_checkpoints=1,
    )


def records(pairs: list[pydocs.Pair]) -> list[tuple[str, Record]]:
    return [(p.name, {"prompt": p.prompt, "completion": p.answer}) for p in pairs]


def five(held_out: list[pydocs.Pair]) -> list[pydocs.Pair]:
    """The pairs whose answers are shown: known objects first, then the first of the others."""
    by_name = {p.name.partition("(")[0]: p for p in held_out}
    chosen = [by_name[name] for name in _KNOWN if name in by_name]
    return (chosen + [p for p in held_out if p not in chosen])[:5]


def run(output: Path, steps: int) -> dict[str, Any]:
    """Do everything; returns what ``show`` and ``--json`` print. Interrupted, it goes on from its last checkpoint."""
    import torch

    from fastpeft.training import run as training
    from fastpeft.training.inference import Answerer
    from fastpeft.training.plot import plot_losses

    from .report import write_report

    clock, settings = Clock(), config(output, steps)
    with Console() as progress:
        progress.say(f"quickstart: SmolLM2-135M-Instruct, NF4, LoRA r=16, {steps} steps; results go to {output}")
        progress.say("reading Python's own documentation")
        train, held_out = pydocs.split(pydocs.pairs())
        shown = five(held_out)
        train = pydocs.choose(train, TRAIN_PAIRS)
        held_out = pydocs.choose(held_out, HELD_OUT_PAIRS)
        clock.mark("read the documentation")
        first_time = not any(models.cache_root().glob("smollm2-135m-instruct-*/config.json"))
        progress.say("loading the model" + (" (converting its GGUF file, once, about 20 s)" if first_time else ""))
        prepared = training.prepare(settings, records(train), records(held_out))
        resume = _continue_or_clear(output, settings)
        _write_inputs(output, settings, train, held_out)
        model = training.adapted_model(prepared)
        backend, why = _backend(prepared.device, prepared.dtype)
        if why:
            progress.say(f"the adapter layers run on the reference, about half as fast as the native backend: {why}")
        clock.mark("load and quantise the model")

        answerer = Answerer(model, prepared.tokenizer)
        prompts = [p.prompt for p in shown]
        progress.say("answering five prompts before training")
        with model.disable_adapter():
            before = answerer.answer(prompts, ANSWER_TOKENS)
        clock.mark("answer before")
        result, model = training.train(prepared, progress, resume, model)
        clock.mark("train and evaluate")
        progress.say("answering the same prompts after training")
        after = answerer.answer(prompts, ANSWER_TOKENS)
        clock.mark("answer after")
        progress.say("loading the adapter in a fresh process and asking again")
        again = _in_fresh_process(output / "adapter", prompts)
        clock.mark("answer in a fresh process")
    for prompt, here, there in zip(prompts, after, again, strict=True):
        if here.text != there:
            raise UserError(
                f"the reloaded adapter answers {prompt!r} with {there!r}, the trained model with {here.text!r}",
                "this is a defect of saving or loading; keep the output folder and report it",
            )
    assert result.held_out_before is not None
    assert result.held_out_after is not None
    trainable, total = model.get_nb_trainable_parameters()
    summary: dict[str, Any] = {
        "output": str(output),
        "model": prepared.source.note,
        "held_out_before": result.held_out_before,
        "held_out_after": result.held_out_after,
        "held_out_change_percent": 100 * (result.held_out_after / result.held_out_before - 1),
        "steps": result.steps,
        "resumed_from": result.resumed_from,
        "tokens": result.tokens,
        "trainable_parameters": trainable,
        "parameters": total,
        "training_examples": len(prepared.train.examples),
        "held_out_examples": len(prepared.held_out.examples),
        "peak_memory_mb": result.peak_memory_mb,
        "seconds": clock.seconds,
        "seconds_total": round(sum(clock.seconds.values()), 1),
        "device": str(prepared.device),
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "reloaded_answers_equal": True,
        "answers": [
            {"prompt": p.prompt, "before": _shown(b), "after": _shown(a), "documentation": p.answer}
            for p, b, a in zip(shown, before, after, strict=True)
        ],
    }
    plot_losses(output / "metrics.jsonl", output / "loss.png", "SmolLM2-135M on Python's documentation")
    write_report(output, summary)
    _mark(output, finished=True, settings=settings)
    return summary


def _shown(answer: Any) -> str:
    return str(answer.text) if answer.complete else f"{answer.text} …"


def _continue_or_clear(output: Path, settings: TrainConfig) -> bool:
    """True to resume: the folder holds an unfinished run of the same settings. Else remove what an earlier run left."""
    from fastpeft.training import checkpoints

    if output.exists() and not output.is_dir():
        raise UserError(f"output: {output} is a file", "choose a folder")
    state = output / "state.json"
    if state.is_file():
        try:
            stored = json.loads(state.read_text(encoding="utf-8"))
        except ValueError:
            stored = {}
        if stored == {"finished": False, "settings": settings.to_dict()} and checkpoints.newest(output) is not None:
            return True
    for folder in [*checkpoints.numbered(output), output / "adapter"]:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("metrics.jsonl", "loss.png", "report.md", "state.json"):
        (output / name).unlink(missing_ok=True)
    _mark(output, finished=False, settings=settings)
    return False


def _mark(output: Path, finished: bool, settings: TrainConfig) -> None:
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / "state.json.tmp"
    temporary.write_text(json.dumps({"finished": finished, "settings": settings.to_dict()}, indent=1), encoding="utf-8")
    temporary.replace(output / "state.json")


def _write_inputs(output: Path, settings: TrainConfig, train: list[pydocs.Pair], held_out: list[pydocs.Pair]) -> None:
    """The data and the settings as files, so that `fastpeft train` can repeat and vary the run."""
    for name, pairs in (("train.jsonl", train), ("held_out.jsonl", held_out)):
        text = "".join(json.dumps(record) + "\n" for _, record in records(pairs))
        (output / name).write_text(text, encoding="utf-8")
    values = {**settings.to_dict(), "data": str(output / "train.jsonl"), "eval_data": str(output / "held_out.jsonl")}
    values["output"] = str(output) + "-again"
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in values.items()]  # JSON values are YAML
    (output / "config.yaml").write_text(
        "# fastpeft train config.yaml key=value ...\n" + "".join(lines), encoding="utf-8"
    )


def _in_fresh_process(adapter: Path, prompts: list[str]) -> list[str]:
    """The answers of `fastpeft generate` with the saved adapter, in a Python started anew."""
    command = [
        sys.executable, "-m", "fastpeft", "generate", "--adapter", str(adapter),
        "--max-new-tokens", str(ANSWER_TOKENS), "--json", "--", *prompts,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()
        raise UserError(
            f"the fresh process ended with code {done.returncode}: {last[-1] if last else 'no message'}",
            f"try it yourself: fastpeft generate --adapter {adapter} --debug 'Hello'",
        )
    return [str(a["answer"]) for a in json.loads(done.stdout)["answers"]]


def _backend(device: Any, dtype: Any) -> tuple[str, str]:
    """Which backend serves the adapter layers, and where it is the reference, why the native one does not."""
    import torch

    from peft_kernels import quantize_4bit
    from peft_kernels.dispatch import explain

    weight = quantize_4bit(torch.ones(64, 128, device=device), "nf4", nested=True).flatten()
    a, b = torch.ones(16, 128, device=device), torch.ones(64, 16, device=device)
    x = torch.ones(8, 128, device=device, dtype=dtype)
    reasons = explain("lora_linear", x, *weight, 64, a, b, 1.0, None, 0.0, None)
    chosen = next(name for name, why in reasons.items() if why == "chosen")
    return chosen, reasons["native"] if chosen == "reference" else ""


def show(summary: dict[str, Any]) -> None:
    """Print the answers side by side and the numbers."""
    from fastpeft.cli.output import table

    rows = [(a["prompt"], a["before"], a["after"]) for a in summary["answers"]]
    table("The same prompts before and after training", ("prompt", "before", "after"), rows)
    print(
        f"held-out loss {summary['held_out_before']:.3f} -> {summary['held_out_after']:.3f} "
        f"({summary['held_out_change_percent']:+.0f} %) after {summary['steps']} steps"
    )
    print("adapter saved, reloaded in a fresh process: the same answers, word for word")
    print(f"{summary['seconds_total']:.0f} s in all, peak memory {summary['peak_memory_mb'] / 1000:.2f} GB")
    output = Path(summary["output"])
    print(f"report: {output / 'report.md'}   also there: loss.png, metrics.jsonl, adapter/")
    print(f"try it: fastpeft generate --adapter {output / 'adapter'} 'What does `heapq.merge` do in Python?'")
