"""The quickstart's report.md."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from ..training.output import CURVE_NAME
from .folder import write_text


def write_report(output: Path, summary: dict[str, Any]) -> None:
    write_text(output / "report.md", report(output, summary))


def report(output: Path, summary: dict[str, Any]) -> str:
    """The run in Markdown: numbers, curve, answers, and how to go on."""
    share = 100 * summary["trainable_parameters"] / summary["parameters"]
    facts = [
        ("Model", f"{summary['model']}, as its GGUF file lies"),
        ("Adapter", f"LoRA r=16 on all linear layers: {summary['trainable_parameters']:,} parameters ({share:.1f} %)"),
        ("Data", f"Python's own documentation: {summary['training_examples']:,} pairs, "
                 f"{summary['held_out_examples']} held out"),
        ("Training", f"{summary['steps']} steps, {summary['tokens']:,} tokens" + _resumed(summary)),
        ("Machine", f"{platform.machine()}, {summary['threads']} threads, {summary['device']}, "
                    f"{summary['dtype']} compute, lora_linear served by the {summary['backend']} backend"),
        ("Time", f"{summary['seconds_total']:.0f} s: "
                 + ", ".join(f"{phase} {s:.0f} s" for phase, s in summary["seconds"].items())),
        ("Peak memory", f"{summary['peak_memory_mb'] / 1000:.2f} GB (the whole process)"
                        if summary["device"] == "cpu" else f"{summary['peak_memory_mb'] / 1000:.2f} GB on the device"),
    ]  # fmt: skip
    before, after = summary["held_out_before"], summary["held_out_after"]
    lines = [
        "# Quickstart: a small model learns how Python documents itself",
        "",
        f"**Held-out loss {before:.3f} → {after:.3f} ({summary['held_out_change_percent']:+.0f} %).** "
        "The adapter was saved, loaded in a fresh process, and gave the same answers word for word.",
        "",
        *picture(output, CURVE_NAME),
        "| | |",
        "|---|---|",
        *[f"| {name} | {cell(value)} |" for name, value in facts],
        "",
        "## The same prompts before and after",
        "",
        "None of these objects was in the training data.",
        "",
        "| prompt | before | after | Python's documentation |",
        "|---|---|---|---|",
        *[
            f"| {cell(a['prompt'])} | {cell(a['before'])} | {cell(a['after'])} | {cell(a['documentation'])} |"
            for a in summary["answers"]
        ],
        "",
        "## Go on",
        "",
        "```",
        f"fastpeft generate --adapter {summary['output']}/adapter 'What does `heapq.merge` do in Python?'",
        f"fastpeft inspect {summary['output']}/adapter",
        f"fastpeft merge {summary['output']}/adapter {summary['output']}/merged --dtype bf16",
        f"fastpeft train {summary['output']}/config.yaml learning_rate=5e-4 lora.r=8",
        "```",
        "",
    ]
    return "\n".join(lines)


def _resumed(summary: dict[str, Any]) -> str:
    return (
        f" since step {summary['resumed_from']}, where an interrupted run was resumed"
        if summary["resumed_from"]
        else ""
    )


def picture(output: Path, name: str) -> list[str]:
    """Lines that show a picture of a run's folder; none where it was not drawn."""
    return [f"![{name.partition('.')[0]}]({name})", ""] if (output / name).is_file() else []


def cell(text: str) -> str:
    """Text that stays in one table cell and is not taken for markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
