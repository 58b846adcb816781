"""Two processes over gloo, beside real PEFT in the same processes: outputs, gradients, state dicts and files of every
method that DDP, FSDP1 and FSDP2 can hold, and the errors of those that they cannot."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import matrix
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("sharing_tools.py")
pytest.importorskip("peft")
assert_equal = runpy.run_path(str(SCRIPT.with_name("peft_tools.py")))["assert_equal"]
tools = runpy.run_path(str(SCRIPT))
ACROSS, SHORT = tools["ACROSS"], tools["SHORT"]
pytestmark = [
    pytest.mark.full_form,  # test_distributed.py has a case of each in the short one
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.xdist_group("distributed"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of two processes that ran every case of this form."""
    folder = tmp_path_factory.mktemp("sharing")
    run_ranks(SCRIPT.with_name("distributed_tools.py"), folder, "sharing", timeout=900)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize(("case", "policy"), matrix(sorted({*tools["cases"](), *SHORT}), SHORT))
def test_outputs_gradients_states_and_files_are_pefts(results: Any, case: str, policy: str) -> None:
    found = results[case, policy]
    if case in ACROSS and policy.startswith("fsdp1"):
        assert "without auto_wrap_policy" in found["refused"]
        assert "fully_shard_model" in found["refused"]
        return
    assert_equal(found["ours"], found["alone"])
    if "theirs" in found:
        assert_equal(found["ours"], found["theirs"])
    assert_equal(found["state"], found["trained"])
    assert not all(torch.equal(found["trained"][key], value) for key, value in found["start"].items())
    assert len(found["files"]) == (2 if policy in ("ddp", "fsdp2") else 1)
    for file in found["files"]:
        assert_equal(file, found["trained"])
    if "unset" in found:
        assert "load the adapter before the model is wrapped" in found["unset"]
        return
    assert_equal(found["set"], found["start"])
    assert_equal(found["again"], found["alone"])  # what was set is what computes
    assert policy == "ddp" or "is sharded" in found["merging"]


def test_a_module_whose_tensors_a_unit_around_it_has_says_so(results: Any) -> None:
    assert "pass the module that it returned" in results["inside"]


@pytest.mark.parametrize("version", [1, 2])
def test_accelerates_helpers_save_and_load_the_adapter(results: Any, version: int) -> None:
    found = results["accelerate", version]
    assert all(not value.any() for value in found["zeroed"].values())
    assert_equal(found["loaded"], found["start"])
