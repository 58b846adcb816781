"""Three adapters trained in one run on three libraries' docstrings, answering side by side in one batch."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from ..training import models
from ..training.config import TrainConfig
from ..training.metrics import Console
from ..training.output import CURVE_NAME, held
from . import docstyles, folder, pydocs, throughput
from .report import cell, picture

TRAIN_PAIRS, HELD_OUT_PAIRS, ANSWER_TOKENS, PROMPTS = 900, 24, 56, 4
BASE, NAME = "__base__", "SmolLM2-135M-Instruct"
_THROUGHPUT = "throughput.png"


def config(output: Path, steps: int) -> TrainConfig:
    """The settings of the run; `config.yaml` beside its results holds them for `fastpeft train`."""
    return TrainConfig(
        model=models.PACKAGED,
        adapters={
            style: {"data": str(output / f"{style}.jsonl"), "eval_data": str(output / f"{style}-held-out.jsonl")}
            for style in ("python", "numpy", "torch")
        },
        output=str(output),
        lora={"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
        max_length=128,
        batch_size=2,
        learning_rate=1e-3,
        warmup=0.05,
        min_lr_ratio=0.05,
        max_steps=steps,
        save_every=max(1, steps // 2),
        keep_checkpoints=1,
    )


def run(output: Path, steps: int) -> dict[str, Any]:
    """Do everything; returns what ``show`` and ``--json`` print. Interrupted, it goes on from its last checkpoints."""
    settings = config(output, steps)
    with held(settings):
        return _run(output, settings)


def _run(output: Path, settings: TrainConfig) -> dict[str, Any]:
    import torch

    from ..cli.output import progress_bar
    from ..training import run as training
    from ..training.inference import Answerer

    clock, steps = folder.Clock(), settings.max_steps
    with Console() as progress:
        progress.say(f"demo-adapters: {NAME} as its GGUF file lies, three LoRAs r=16 in one run of {steps} steps")
        progress.say("reading the docstrings of Python's library, numpy and torch")
        resume = folder.continue_or_clear(output, settings)
        counts = _write_data(output)
        folder.write_config(output, settings.to_dict())
        clock.mark("read the docstrings")
        progress.say("loading the model")
        prepared = training.prepare_all(settings)
        model = training.adapted_model(*prepared)
        clock.mark("load the model")
        results, model = training.train_all(settings, prepared, progress, resume, model, restart=True)
        clock.mark("train three adapters at once")
        progress.say(f"answering {PROMPTS} prompts four times in one batch: the base, and each adapter")
        who = [BASE, *results]
        names = list(docstyles.SHOWN[:PROMPTS])
        asked = [(docstyles.prompt(name), adapter) for name in names for adapter in who]
        answers = Answerer(model, prepared[0].tokenizer).answer(
            [p for p, _ in asked], ANSWER_TOKENS, adapters=[a for _, a in asked], batch=len(asked)
        )
        clock.mark("answer in one batch")
    folders = {p.name: Path(p.config.output) / "adapter" for p in prepared}
    with progress_bar() as report:
        speed = throughput.measure(model.unload(), folders, report, throughput.COUNTS, throughput.ROWS)
    clock.mark("measure throughput")
    text = {key: folder.shown(answer) for key, answer in zip(asked, answers, strict=True)}
    summary: dict[str, Any] = {
        "output": str(output),
        "model": prepared[0].source.note,
        "steps": steps,
        "pairs": counts,
        "held_out": {name: [r.held_out_before, r.held_out_after] for name, r in results.items()},
        "tokens": sum(r.tokens for r in results.values()),
        "answers": [
            {"prompt": docstyles.prompt(n), **{a: text[docstyles.prompt(n), a] for a in who}} for n in names
        ],
        "throughput": speed,
        "seconds": clock.seconds,
        "seconds_total": round(sum(clock.seconds.values()), 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {prepared[0].device}, "
        + str(prepared[0].dtype).removeprefix("torch."),
    }  # fmt: skip
    if (output / CURVE_NAME).is_file():  # drawn by the training, which says so where matplotlib is not there
        throughput.plot(speed, output / _THROUGHPUT, f"SmolLM2-135M in Q4_1, adapters of r=16 ({summary['machine']})")
    folder.write_text(output / "report.md", _report(output, summary))
    folder.mark(output, finished=True, settings=settings)
    return summary


def _write_data(output: Path) -> dict[str, list[int]]:
    """Each style's pairs as jsonl files; how many there are: [to train, held out]."""
    counts = {}
    for style, pairs in docstyles.pairs().items():
        train, held_out = pydocs.split(pairs)
        train, held_out = pydocs.choose(train, TRAIN_PAIRS), pydocs.choose(held_out, HELD_OUT_PAIRS)
        for name, some in ((style, train), (f"{style}-held-out", held_out)):
            records = [(p.name, {"prompt": docstyles.prompt(p.name), "completion": p.answer}) for p in some]
            folder.write_records(output / f"{name}.jsonl", records)
        counts[style] = [len(train), len(held_out)]
    return counts


def _report(output: Path, summary: dict[str, Any]) -> str:
    adapters = list(summary["held_out"])
    speed = summary["throughput"]
    lines = [
        "# Three adapters, one run, one batch",
        "",
        f"{summary['model']}, as its GGUF file lies. Three LoRA adapters of r=16 were trained in one run of "
        f"{summary['steps']} steps ({summary['tokens']:,} tokens, {summary['machine']}): every step's batch held rows "
        "of all three, each with an optimizer of its own.",
        "",
        "| adapter | learned from | pairs | held-out loss before | after |",
        "|---|---|---|---|---|",
        *[
            f"| {name} | the docstrings of {'Python’s library' if name == 'python' else name} | "
            f"{summary['pairs'][name][0]} | {before:.2f} | {after:.2f} |"
            for name, (before, after) in summary["held_out"].items()
        ],
        "",
        *picture(output, CURVE_NAME),
        "## The same prompts, answered in one batch",
        "",
        f"Each prompt stands {1 + len(adapters)} times in one batch. None of these functions was in anyone's data.",
        "",
        "| prompt | base | " + " | ".join(adapters) + " |",
        "|---" * (2 + len(adapters)) + "|",
        *[
            f"| {cell(a['prompt'])} | " + " | ".join(_block(a[name]) for name in (BASE, *adapters)) + " |"
            for a in summary["answers"]
        ],
        "",
        "## Throughput",
        "",
        f"{speed['rows']} sequences decode, and belong to 1 to {speed['adapters'][-1]} adapters.",
        "",
        *picture(output, _THROUGHPUT),
        "| adapters | one batch, tokens/s | one adapter after another, tokens/s |",
        "|---|---|---|",
        f"| none | {speed['base']:.0f} | |",
        *[
            f"| {k} | {one:.0f} | {apart:.0f} |"
            for k, one, apart in zip(
                speed["adapters"], speed["one_batch"], speed["one_after_another"], strict=True
            )
        ],
        "",
        "Time: " + ", ".join(f"{phase} {s:.0f} s" for phase, s in summary["seconds"].items()) + ".",
        "",
        "## Go on",
        "",
        "```",
        f"fastpeft train {summary['output']}/config.yaml adapters.numpy.learning_rate=5e-4",
        f"fastpeft generate --adapter {summary['output']}/torch/adapter 'What does `argsort` do?'",
        "```",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _block(text: str) -> str:
    """Several lines in one cell of a table."""
    return "<br>".join("&nbsp;" * (len(line) - len(line.lstrip())) + cell(line) for line in text.splitlines())


def show(summary: dict[str, Any]) -> None:
    """Print the answers side by side and the numbers."""
    from ..cli.output import table

    adapters = list(summary["held_out"])
    rows = [(a["prompt"], a[BASE], *(a[name] for name in adapters)) for a in summary["answers"]]
    table("The same prompts in one batch", ("prompt", "base", *adapters), rows, lines=True)
    for name, (before, after) in summary["held_out"].items():
        print(f"{name}: held-out loss {before:.2f} -> {after:.2f}")
    speed = summary["throughput"]
    print(
        f"{speed['rows']} sequences at once: {speed['base']:.0f} tokens/s without adapters, "
        f"{speed['one_batch'][0]:.0f} with one, {speed['one_batch'][-1]:.0f} with {speed['adapters'][-1]}; "
        f"one adapter after another {speed['one_after_another'][-1]:.0f}"
    )
    print(f"{summary['seconds_total']:.0f} s in all")
    output = Path(summary["output"])
    pictures = folder.there(output, _THROUGHPUT, CURVE_NAME)
    print(f"report: {output / 'report.md'}   also there: {pictures}metrics.jsonl, three adapters")
