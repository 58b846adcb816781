"""The main job: fine-tune SmolLM2-135M-Instruct in 4 bits on Python's documentation, and show what changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..training import models
from ..training.config import TrainConfig
from ..training.errors import UserError
from ..training.metrics import Console
from ..training.output import CURVE_NAME, held
from ..training.records import Record
from . import folder, pydocs

TRAIN_PAIRS, HELD_OUT_PAIRS, ANSWER_TOKENS = 1600, 96, 40
# Held-out objects that a reader knows; where this Python lacks one, others fill in.
_KNOWN = ("math.dist", "textwrap.fill", "tempfile.mkdtemp", "pathlib.Path.is_file", "random.choices")


def config(output: Path, steps: int) -> TrainConfig:
    """The settings of the quickstart; `runs/quickstart/config.yaml` holds them as a file for `fastpeft train`."""
    return TrainConfig(
        model=models.PACKAGED,
        data="train.jsonl",
        eval_data="held_out.jsonl",
        output=str(output),
        lora={"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
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
    settings = config(output, steps)
    with held(settings):
        return _run(output, settings)


def _run(output: Path, settings: TrainConfig) -> dict[str, Any]:
    import torch

    from ..training import run as training
    from ..training.inference import Answerer
    from ..training.plot import plot_losses
    from .report import write_report

    clock, steps = folder.Clock(), settings.max_steps
    with Console() as progress:
        of = "SmolLM2-135M-Instruct as its GGUF file lies"
        progress.say(f"quickstart: {of}, LoRA r=16, {steps} steps; results go to {output}")
        progress.say("reading Python's own documentation")
        train, held_out = pydocs.split(pydocs.pairs())
        shown = five(held_out)
        train = pydocs.choose(train, TRAIN_PAIRS)
        held_out = pydocs.choose(held_out, HELD_OUT_PAIRS)
        clock.mark("read the documentation")
        progress.say("loading the model")
        prepared = training.prepare(settings, records(train), records(held_out))
        resume = folder.continue_or_clear(output, settings)
        # The data and the settings as files, so that `fastpeft train` can repeat and vary the run.
        files = {"data": (output / "train.jsonl", train), "eval_data": (output / "held_out.jsonl", held_out)}
        for file, pairs in files.values():
            folder.write_records(file, records(pairs))
        folder.write_config(output, settings.to_dict() | {key: str(file) for key, (file, _) in files.items()})
        model = training.adapted_model(prepared)
        backend, why = _backend(prepared.device, prepared.dtype)
        if why:
            progress.say(f"the adapter layers run on the reference, about half as fast as the native backend: {why}")
        clock.mark("load the model")

        answerer = Answerer(model, prepared.tokenizer)
        prompts = [p.prompt for p in shown]
        progress.say("answering five prompts before training")
        with model.disable_adapter():
            before = answerer.answer(prompts, ANSWER_TOKENS)
        clock.mark("answer before")
        result, model = training.train(prepared, progress, resume, model, restart=True)
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
            {"prompt": p.prompt, "before": folder.shown(b), "after": folder.shown(a), "documentation": p.answer}
            for p, b, a in zip(shown, before, after, strict=True)
        ],
    }
    curve = output / CURVE_NAME
    if curve.is_file():  # drawn by the training, which says so where matplotlib is not there
        plot_losses(output / "metrics.jsonl", curve, "SmolLM2-135M on Python's documentation")
    write_report(output, summary)
    folder.mark(output, finished=True, settings=settings)
    return summary


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
    from ..cli.output import table

    rows = [(a["prompt"], a["before"], a["after"]) for a in summary["answers"]]
    table("The same prompts before and after training", ("prompt", "before", "after"), rows)
    print(
        f"held-out loss {summary['held_out_before']:.3f} -> {summary['held_out_after']:.3f} "
        f"({summary['held_out_change_percent']:+.0f} %) after {summary['steps']} steps"
    )
    print("adapter saved, reloaded in a fresh process: the same answers, word for word")
    print(f"{summary['seconds_total']:.0f} s in all, peak memory {summary['peak_memory_mb'] / 1000:.2f} GB")
    output = Path(summary["output"])
    print(f"report: {output / 'report.md'}   also there: {folder.there(output, CURVE_NAME)}metrics.jsonl, adapter/")
    print(f"try it: fastpeft generate --adapter {output / 'adapter'} 'What does `heapq.merge` do in Python?'")
