"""A program that was written for PEFT (tests/tools/peft_program.py) under `fastpeft run`: its numbers, beside PEFT's
where transformers takes the installed PEFT. `make test-matrix` runs it with transformers 5.23 and 5.24."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import peft_program
import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.ecosystem
PROGRAM = Path(peft_program.__file__)
TRANSFORMERS = tuple(int(part) for part in metadata.version("transformers").split(".")[:2])
# PEFT loads a DoRA's magnitudes under names that the model does not have, and reports them as missing; it injects no
# adapter whose layers share tensors.
OURS_ALONE = {"files_with_more_than_an_adapter", "tensors_that_layers_share"}
# transformers itself refuses these with a PEFT that it finds too old, or that lacks a module which it imports (0.18)
INJECTING = {"adapters_of_transformers", "hotswap", "pipeline"}
REFUSALS = ("version of PEFT you are using is not compatible", "No module named 'peft.utils.transformers_weight_conv")


def python(*args: Any) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def told(folder: Path, *how: str) -> dict[str, dict[str, Any]]:
    """The program's account of each of its cases."""
    folder.mkdir()
    lines = [line for line in python(*how, PROGRAM, folder, *peft_program.CASES).splitlines() if line[:2] == '{"']
    return {case["case"]: case for case in map(json.loads, lines)}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return told(tmp_path_factory.mktemp("ours") / "work", "-m", "fastpeft", "run")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    # transformers 5.24 refuses every PEFT that there is
    return told(tmp_path_factory.mktemp("theirs") / "work") if TRANSFORMERS < (5, 24) else {}


@pytest.mark.parametrize("case", peft_program.CASES)
def test_a_program_for_peft(case: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert "error" not in ours[case], ours[case]
    if theirs and case not in OURS_ALONE and not too_old(theirs[case]):
        assert "error" not in theirs[case], theirs[case]
        assert_near(ours[case]["found"], theirs[case]["found"])


def too_old(told: dict[str, Any]) -> bool:
    """True for transformers' own refusal of the installed PEFT."""
    refused = any(refusal in told.get("error", "") for refusal in REFUSALS)
    assert not refused or told["case"] in INJECTING
    return refused


@pytest.mark.parametrize(("case", "count"), [("files_with_more_than_an_adapter", 3), ("tensors_that_layers_share", 4)])
def test_what_transformers_loads_is_what_was_saved(case: str, count: int, ours: dict[str, Any]) -> None:
    found = ours[case]["found"]
    for saved, loaded in zip(found[::2], found[1::2], strict=True):
        assert loaded == pytest.approx(saved)
    assert len({str(values) for values in found[::2]}) == count


def assert_near(found: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
    else:
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_trls_scripts_train_on_a_folder(script: str, tmp_path: Path) -> None:
    peft_program.llama().save_pretrained(tmp_path / "model")
    tokenizer = peft_program.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"prompt": "ab", "chosen": "cd", "rejected": "ef"} if script == "dpo" else {"text": "abcdef"}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    python(
        "-m", "fastpeft", "run", "-m", f"trl.scripts.{script}", "--model_name_or_path", tmp_path / "model",
        "--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "out", "--use_peft", "--lora_r", 4,
        "--lora_target_modules", "q_proj", "v_proj", "--max_steps", 2, "--per_device_train_batch_size", 4,
        "--report_to", "none", "--use_cpu", "--bf16", "false", "--learning_rate", 0.1,
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(trained) == 8
    assert all(bool(t.abs().sum()) for key, t in trained.items() if "lora_B" in key)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("count", "launcher"), [
    (1, ["accelerate.commands.launch", "--cpu", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no",
         "--dynamo_backend", "no", "-m"]),
    (2, ["torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m"]),
])  # fmt: skip
def test_processes_of_launchers_see_it(count: int, launcher: list[Any], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import sys\nfrom accelerate import Accelerator\nimport peft, fastpeft\nprocess = Accelerator(cpu=True)\n"
        "open(f'{sys.argv[1]}/{process.process_index}', 'w').write(f'{process.num_processes} {peft is fastpeft}')\n"
    )
    python("-m", *launcher, "fastpeft", "run", tmp_path / "script.py", tmp_path)
    assert [(tmp_path / str(i)).read_text() for i in range(count)] == [f"{count} True"] * count
