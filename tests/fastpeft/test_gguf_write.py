"""GGUF files that programs describe and write: reports, adapters for llama.cpp, merged models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastpeft.apps.cli.app import app
from typer.testing import CliRunner

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
from gguf_tools import tiny_gguf  # noqa: E402  # imports gguf


def run(*words: object, code: int = 0) -> str:
    """A command's output: on stdout, or where it fails its line on stderr."""
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, done.output
    return str(done.stderr if code else done.stdout)


def result_of(*words: object) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(run(*words, "--json"))
    return parsed


def test_inspect(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf")
    found = result_of("inspect", path)
    assert (found["type"], found["architecture"], found["name"]) == ("model", "llama", "tiny")
    assert found["adapter"] is None
    # seven of each of two layers; a layer's two norms and the last
    assert {name: one["tensors"] for name, one in found["types"].items()} == {"Q8_0": 1, "Q4_1": 14, "F32": 5}
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    assert found["types"]["Q4_1"] == {"tensors": 14, "elements": 2 * layer, "bytes": 2 * layer // 32 * 20}
    assert found["tensors"]["blk.1.ffn_up.weight"] == {"shape": [64, 32], "type": "Q4_1"}
    assert found["file_bytes"] == path.stat().st_size > found["bytes"]
    shown = run("inspect", path, "--keys")
    assert "blk.1.ffn_up.weight" in shown
    assert "64x32" in shown
    path.write_bytes(path.read_bytes()[:300])
    assert "x.gguf: truncated" in run("inspect", path, code=1)
