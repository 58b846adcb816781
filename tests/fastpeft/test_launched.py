"""Trainer and a loop on accelerate under DeepSpeed's ZeRO, FSDP1 and FSDP2, two processes on a CPU: losses, adapters,
saving, loading and resuming, beside one process and beside real PEFT."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import beside_python, rendezvous, run_ranks

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
SCRIPT = Path(__file__).with_name("launched_tools.py")
TYPES = {"zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp1": "FSDP", "fsdp2": "FSDP", "alone": "NO"}
no_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs deepspeed: DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed ninja",
)
pytestmark = [pytest.mark.ecosystem, pytest.mark.full_form, pytest.mark.xdist_group("distributed")]
KINDS = [pytest.param(kind, marks=no_deepspeed if kind.startswith("zero") else ()) for kind in TYPES]
close = runpy.run_path(str(SCRIPT.with_name("peft_tools.py")))["close"]


def launch(folder: Path, kind: str) -> Any:
    own = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", **beside_python()}
    count = 1 if kind == "alone" else 2
    together = rendezvous() if count > 1 else {}
    # it compiles what processes talk through
    run_ranks(SCRIPT, folder, kind, own={**own, **together}, count=count, timeout=600)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return launch(tmp_path_factory.mktemp("alone"), "alone")


def assert_near(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """As near as four steps of AdamW leave sums in another order."""
    assert ours.keys() == wanted.keys() != set()
    for key, value in wanted.items():
        assert ours[key].dtype == value.dtype
        close(ours[key], value, times=64)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_loaded_and_resumed(alone: Any, tmp_path: Path, kind: str) -> None:
    results = alone if kind == "alone" else launch(tmp_path, kind)
    assert len(results) >= 4
    for (name, loop, case), found in results.items():
        one = alone[name, loop, case]
        theirs = alone["peft", loop, "dense"]
        assert found["type"] == TYPES[kind]
        assert len(found["losses"]) == 4
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert found["losses"] == pytest.approx(theirs["losses"], rel=2e-3 if case == "dense" else 2e-2)
        assert found["buffers"]  # packed weights are where and as they were
        if (kind, name) == ("fsdp1", "peft"):
            assert not found["state"]  # from what accelerate gathers PEFT takes nothing
            continue
        assert_near(found["state"], one["state"])
        if case == "dense":
            assert_near(found["state"], theirs["state"])
        assert found["loaded"].keys() == found["state"].keys()
        for key, value in found["state"].items():
            assert torch.equal(found["loaded"][key], value)
        if kind == "fsdp1":  # resumed on a CPU it goes on in another way, with PEFT in the same one
            wanted = results["peft", loop, "dense"]["resumed losses"]
            assert case == "packed" or found["resumed losses"] == pytest.approx(wanted, rel=2e-3)
            continue
        assert found["resumed losses"] == pytest.approx(found["losses"][2:], rel=1e-5)
        assert_near(found["resumed"], found["state"])
