"""The command line on a tiny model: results, JSON, errors in one line, start-up time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fastpeft.apps.cli.app import app
from fastpeft.apps.training.testing import make_tiny_model, write_jsonl
from typer.testing import CliRunner, Result


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def result_of(*words: object) -> dict[str, Any]:
    """The JSON that a successful command prints; stdout holds nothing else."""
    done = invoke(words[0], "--json", *words[1:])
    assert done.exit_code == 0, done.output
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def error_of(*words: object) -> str:
    """The line of a failing command; there is no traceback, and with --json the error is JSON."""
    done = invoke(*words)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line and not line.startswith("  ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    as_json = json.loads(invoke(words[0], "--json", *words[1:]).stdout)
    assert as_json["error"]["problem"] in lines[0]
    return lines[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, data, a config file, and a run trained through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    make_tiny_model(folder / "model")
    write_jsonl(folder / "data.jsonl")
    (folder / "config.yaml").write_text(
        f"model: {folder / 'model'}\ndata: {folder / 'data.jsonl'}\noutput: {folder / 'run'}\neval_fraction: 0.2\n"
        "max_length: 64\ndtype: float32\nbatch_size: 2\nmax_steps: 8\nlearning_rate: 2e-2\n"
        "lora: {r: 4, target_modules: all-linear}\n"
    )
    done = invoke("train", folder / "config.yaml", "save_every=4")
    assert done.exit_code == 0, done.output
    return folder


def test_training_writes_what_it_promises(world: Path) -> None:
    run = world / "run"
    assert (run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 9
    assert lines[-1]["held_out_loss"] < lines[0]["held_out_loss"]
    assert {p.name for p in run.iterdir()} == {
        "adapter", "checkpoint-4", "checkpoint-8", "loss.png", "metrics.jsonl",
    }  # fmt: skip
    note = json.loads((run / "adapter" / "fastpeft_training.json").read_text())
    assert (note["base"], note["quantize"]) == (str(world / "model"), "nf4")


def test_resume_after_the_end_changes_nothing(world: Path) -> None:
    before = (world / "run" / "metrics.jsonl").read_bytes()
    result = result_of("train", world / "config.yaml", "--resume")
    assert result["resumed_from"] == 8
    assert (world / "run" / "metrics.jsonl").read_bytes() == before
    said = invoke("train", world / "config.yaml", "--resume").stdout
    assert said.startswith("the run is finished")
    assert " tokens in " not in said


def test_dry_run_trains_nothing(world: Path) -> None:
    plan = result_of("train", world / "config.yaml", f"output={world / 'dry'}", "--dry-run")
    assert not (world / "dry").exists()
    assert plan["steps"] == 8
    # 2 layers; per layer r * (in + out) over q, k, v, o, gate, up, down
    per_layer = 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 2 * (32 + 64) + (64 + 32))
    assert plan["trainable_parameters"] == 2 * per_layer
    assert plan["parameters"] == sum(
        p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(world / "model").parameters()
    )
    assert plan["memory_total_bytes"] == sum(plan["memory_bytes"].values())
    some = result_of("train", world / "config.yaml", "gradient_checkpointing=true", "checkpointing_keeps=0.5",
                     "--dry-run")["memory_bytes"]  # fmt: skip
    every = result_of("train", world / "config.yaml", "gradient_checkpointing=true", "--dry-run")["memory_bytes"]
    assert every["activations"] < some["activations"] < plan["memory_bytes"]["activations"]
    unknown = result_of("train", world / "config.yaml", "method=shira", "adapter.r=4", "quantize=none", "--dry-run")
    assert (unknown["memory_bytes"], unknown["memory_total_bytes"]) == ({}, None)
    assert "depend on the values" in unknown["memory_unknown"]
    assert invoke("train", world / "config.yaml", f"output={world / 'dry'}", "--dry-run").exit_code == 0


def test_without_matplotlib_there_is_no_curve(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    done = invoke("train", world / "config.yaml", f"output={tmp_path / 'run'}", "max_steps=1")
    assert done.exit_code == 0, done.output
    assert "loss.png is not drawn: pip install matplotlib" in done.stderr
    assert not (tmp_path / "run" / "loss.png").exists()
    assert (tmp_path / "run" / "adapter").is_dir()


def test_generate(world: Path) -> None:
    adapter = world / "run" / "adapter"
    tuned = result_of("generate", "--adapter", adapter, "--max-new-tokens", 12, "--", "colour 3?", "colour 4?")
    assert [a["prompt"] for a in tuned["answers"]] == ["colour 3?", "colour 4?"]
    assert tuned == {**result_of("generate", "--adapter", adapter, "--max-new-tokens", 12, "colour 3?", "colour 4?"),
                     "tokens_per_s": tuned["tokens_per_s"]}  # fmt: skip
    base = result_of("generate", "--model", world / "model", "--dtype", "float32", "--max-new-tokens", 12, "colour 3?")
    assert base["answers"][0]["answer"] != tuned["answers"][0]["answer"]
    shown = invoke("generate", "--adapter", adapter, "--max-new-tokens", 12, "colour 3?")
    assert shown.stdout.strip() == tuned["answers"][0]["answer"]
    first, second = (
        result_of("generate", "--adapter", adapter, "--temperature", 1.5, "--seed", seed, "--max-new-tokens", 12, "x")[
            "answers"
        ]
        for seed in (1, 2)
    )
    assert first != second
    again = result_of("generate", "--adapter", adapter, "--temperature", 1.5, "--seed", 1, "--max-new-tokens", 12, "x")
    assert again["answers"] == first


@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_merge_makes_a_model_that_answers_like_the_adapter(world: Path, onto: str) -> None:
    adapter, merged = world / "run" / "adapter", world / f"merged-{onto}"
    result = result_of("merge", adapter, merged, "--dtype", "fp32", "--onto", onto)
    assert result["dtype"] == "float32"
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    base = transformers.AutoModelForCausalLM.from_pretrained(world / "model")
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in base.named_parameters()}
    quantize = "nf4" if onto == "quantized" else "none"
    words = ("--dtype", "float32", "--max-new-tokens", 10, "colour 3?")
    expected = result_of("generate", "--adapter", adapter, "--quantize", quantize, *words)["answers"]
    assert result_of("generate", "--model", merged, *words)["answers"] == expected


def test_merge_rounds_to_the_dtype_asked_for(world: Path) -> None:
    result = result_of("merge", world / "run" / "adapter", world / "merged-bf16")
    assert result["dtype"] == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "merged-bf16", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "exists and is not an empty folder" in error_of("merge", world / "run" / "adapter", world / "merged-bf16")


def test_a_mixture_with_experts_in_four_bits(world: Path, tmp_path: Path) -> None:
    """Trained, planned, asked and merged on the base that training had."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "num_local_experts": 4}  # fmt: skip
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=len(tokenizer), **sizes, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )).save_pretrained(tmp_path / "model")  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "model")
    words = ("train", world / "config.yaml", f"model={tmp_path / 'model'}", f"output={tmp_path / 'run'}", "max_steps=2",
             "lora.target_parameters=[gate_up_proj, down_proj]")  # fmt: skip
    dense, packed = (
        result_of(*words, f"quantize_experts={given}", "--dry-run")["memory_bytes"]["base"] for given in ("no", "yes")
    )
    assert dense - packed == 4 * 3 * 64 * 32 * (4 - (4 + 32 / 64) / 8)  # bytes of the experts' numbers
    assert result_of(*words, "quantize_experts=true")["steps"] == 2
    adapter, asked = tmp_path / "run" / "adapter", ("--dtype", "float32", "--max-new-tokens", 10, "colour 3?")
    assert result_of("inspect", adapter)["trained_on"]["quantize_experts"] is True
    expected = result_of("generate", "--adapter", adapter, *asked)["answers"]
    for onto, same in (("quantized", True), ("original", False)):
        result_of("merge", adapter, tmp_path / onto, "--dtype", "fp32", "--onto", onto)
        assert (result_of("generate", "--model", tmp_path / onto, *asked)["answers"] == expected) is same
    assert "quantize=none" in error_of(*words, "quantize_experts=true", "quantize=none")
    assert "no dense experts" in error_of("train", world / "config.yaml", f"output={tmp_path / 'no'}",
                                          "quantize_experts=true")  # fmt: skip


def test_inspect(world: Path) -> None:
    report = result_of("inspect", world / "run" / "adapter")
    assert report["method"] == "LORA"
    assert report["ranks"] == {"4": 14}
    assert len(report["tensors"]) == 28
    assert report["trained_on"]["quantize"] == "nf4"
    shown = invoke("inspect", world / "run" / "adapter", "--keys").stdout
    assert "lora_A" in shown
    assert "vllm" in shown


def test_errors_are_one_line(world: Path, tmp_path: Path) -> None:
    config = world / "config.yaml"
    assert "did you mean 'batch_size'?" in error_of("train", config, "batchsize=3")
    assert "did you mean 'lora_dropout'?" in error_of("train", config, "lora.dropout=3", f"output={tmp_path}")
    assert "is not a file" in error_of("train", tmp_path / "absent.yaml")
    assert "does not exist" in error_of("train", config, "model=./nowhere", "--dry-run")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "x"}\n')
    assert "bad.jsonl:2: expected text in 'prompt', got a number" in error_of("train", config, f"data={bad}")
    assert "holds the checkpoints of an earlier run" in error_of("train", config)
    assert "is not a folder" in error_of("inspect", tmp_path / "absent")
    assert "no adapter_config.json" in error_of("generate", "--adapter", tmp_path, "hi")
    assert "neither a model nor an adapter" in error_of("generate", "hi")
    assert "quantize: expected one of" in error_of("generate", "--model", world / "model", "--quantize", "int3", "hi")
    assert "nothing_like_it" in error_of(
        "train", config, "lora.target_modules=[nothing_like_it]", f"output={tmp_path / 'o'}"
    )


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = invoke("train", tmp_path / "absent.yaml", "--debug")
    assert done.exit_code == 1
    assert type(done.exception).__name__ == "UserError"


def test_an_unexpected_exception_is_called_a_defect(monkeypatch: pytest.MonkeyPatch, world: Path) -> None:
    monkeypatch.setattr("fastpeft.apps.cli.commands.plan", lambda config: {}["gone"])
    done = invoke("train", world / "config.yaml", "--dry-run")
    assert done.exit_code == 3
    assert "error: unexpected KeyError: 'gone'; this is a defect; run again with --debug" in done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    """Start-up is what it imports: 380 modules, a fifth of a second. Seconds would tell what else the machine does."""
    for words, listed in (
        ((), ("quickstart", "train", "generate", "merge", "inspect", "export", "serve", "doctor")),
        (("train",), ()),
    ):
        code = f"""
import sys
from fastpeft.apps.cli import main
sys.argv = ["fastpeft", *{words!r}, "--help"]
try:
    main()
except SystemExit:
    heavy = {{"torch", "transformers", "numpy", "peft_kernels", "matplotlib", "yaml"}} & set(sys.modules)
    assert not heavy, heavy
    assert 200 < len(sys.modules) < 450, len(sys.modules)
"""
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
        assert all(name in done.stdout for name in listed)
