"""DeepSpeed's ZeRO-2 and ZeRO-3 on the CPU, two processes: a step, the state, files and loading, beside real PEFT."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import beside_python, rendezvous, run_ranks
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("deepspeed_tools.py")
pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="needs deepspeed: DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed ninja",
    ),
    pytest.mark.xdist_group("distributed"),
]
assert_equal = runpy.run_path(str(SCRIPT.with_name("test_distributed_state.py")))["assert_equal"]


def results(folder: Path, case: str, stage: int) -> Any:
    own = {"DS_ACCELERATOR": "cpu", **rendezvous(), **beside_python()}
    run_ranks(SCRIPT, folder, case, str(stage), own=own, timeout=600)  # it compiles what processes talk through
    return torch.load(folder / "results.pt", weights_only=False)


ALL = ("lora", "dora", "all", "OFTConfig", "VeraConfig", "packed")
CASES = [("lora", 2), ("packed", 2), *((case, 3) for case in ALL)]


@pytest.mark.parametrize(("case", "stage"), CASES)
def test_a_step_is_pefts_and_is_saved_and_loaded(tmp_path: Path, case: str, stage: int) -> None:
    found = results(tmp_path, case, stage)
    assert found["partitioned"] is (stage == 3)
    assert found["buffers"]  # packed weights are where and as they were
    assert_equal(found["ours"], found["alone"])
    assert_equal(found["state"], found["trained"])
    assert not all(torch.equal(found["trained"][key], value) for key, value in found["start"].items())
    files = sorted(tmp_path.glob("*/adapter_model.safetensors"))
    assert len(files) == (2 if stage == 3 else 1)
    for file in files:
        assert_equal(load_file(file), found["trained"])
    assert_equal(found["set"], found["start"])
    assert stage == 2 or "is sharded" in found["merging"]
