"""DeepSpeed's ZeRO-2 and ZeRO-3 on the CPU, two processes: a step, the state, files and loading, beside real PEFT."""

from __future__ import annotations

import importlib.util
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = SCRIPT.parents[2]
    own = {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "python")]), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
        "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # for ninja
    }  # fmt: skip
    logs = [folder / f"log{rank}" for rank in range(2)]
    started = []
    for rank, log in enumerate(logs):
        env = {**os.environ, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            command = [sys.executable, str(SCRIPT), str(rank), str(folder), case, str(stage)]
            started.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
    try:
        codes = [process.wait(timeout=600) for process in started]  # it compiles what processes talk through
    finally:
        for process, log in zip(started, logs, strict=True):
            process.kill()
            print(log.read_text()[-4000:])
    assert codes == [0, 0]
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
