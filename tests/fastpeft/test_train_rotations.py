"""`fastpeft train` with OFT and BOFT, dense and NF4, and QDoRA: it learns; two of the adapters generate and merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft.apps.cli.app import app
from fastpeft.apps.training.metrics import read_metrics
from fastpeft.apps.training.testing import make_tiny_run
from forms import matrix
from safetensors.torch import load_file
from typer.testing import CliRunner

METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "oft": ({"oft_block_size": 8}, "oft_R"),
    "boft": ({"boft_block_size": 4, "boft_n_butterfly_factor": 2}, "boft_R"),
    "lora": ({"r": 4, "use_dora": True}, "lora_magnitude_vector"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("world"), 40, hidden=64)


def result_of(*args: object) -> Any:
    done = CliRunner().invoke(app, [str(a) for a in args] + ["--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "quantize"), matrix(
    [("oft", "none"), ("oft", "nf4"), ("boft", "none"), ("boft", "nf4"), ("lora", "nf4")],
    short=[("oft", "nf4"), ("boft", "none"), ("lora", "nf4")],
))  # fmt: skip
def test_rotations_and_qdora_train_from_the_shell(world: Path, tmp_path: Path, method: str, quantize: str) -> None:
    adapter, tensor = METHODS[method]
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({
        "model": str(world / "model"), "data": str(world / "data.jsonl"), "output": str(tmp_path / "run"),
        "method": method, "lora" if method == "lora" else "adapter": {"target_modules": "all-linear", **adapter},
        "quantize": quantize, "dtype": "float32", "eval_fraction": 0.2, "max_length": 64, "batch_size": 2,
        "max_steps": 8, "learning_rate": 3e-2,
    }))  # fmt: skip
    result = result_of("train", file)
    assert result["held_out_after"] < 0.98 * result["held_out_before"]
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    folder = tmp_path / "run" / "adapter"
    tensors = {k: v for k, v in load_file(folder / "adapter_model.safetensors").items() if tensor in k}
    assert len(tensors) == 2 * 7  # of two layers all projections
    assert all(bool(t.any()) and bool(torch.isfinite(t).all()) for t in tensors.values())
    if (method, quantize) not in (("oft", "nf4"), ("boft", "none")):
        return  # these two go on
    words = ("--dtype", "float32", "--max-new-tokens", 8, "colour 3?")
    expected = result_of("generate", "--adapter", folder, "--quantize", quantize, *words)["answers"]
    onto = "quantized" if quantize == "nf4" else "original"
    result_of("merge", folder, tmp_path / "merged", "--dtype", "fp32", "--onto", onto)
    assert result_of("generate", "--model", tmp_path / "merged", *words)["answers"] == expected
