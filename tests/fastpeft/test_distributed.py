"""Two processes over gloo: FSDP2 by our rules, DDP, and PEFT's policy for the older FSDP, against one process."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from peft_kernels.testing import assert_no_worse, assert_same_bits

SCRIPT = Path(__file__).with_name("distributed_tools.py")
tools = runpy.run_path(str(SCRIPT))
FSDP2 = tools["FSDP2"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.xdist_group("distributed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes that ran every case left their files."""
    folder = tmp_path_factory.mktemp("distributed")
    run_ranks(SCRIPT, folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Any:
    return torch.load(folder / "results.pt", weights_only=False)  # placements are among them


def assert_as_alone(found: dict[str, Any], *parts: str) -> None:
    """A shared run is no further from float64 than one process."""
    exact, eager, ours = found["exact"], found["eager"], found["ours"]
    assert_near_exact(ours["output"], eager["output"], exact["output"])
    for part in parts:
        assert ours[part].keys() == eager[part].keys() != set()
        for key, value in ours[part].items():
            assert value.dtype == eager[part][key].dtype
            assert_near_exact(value, eager[part][key], exact[part][key])


def assert_near_exact(ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    assert_no_worse(ours, eager, exact, exact.abs().max().expand_as(exact))


@pytest.mark.parametrize("case", FSDP2, ids=lambda case: "-".join(map(str, case)))
def test_fsdp2_trains_as_one_process_does(results: Any, case: tuple[Any, ...]) -> None:
    found = results[("fsdp2", *case)]
    assert_as_alone(found, "grads", "state")
    assert not torch.equal(found["after"], found["ours"]["output"])  # the step was taken


@pytest.mark.parametrize("case", FSDP2, ids=lambda case: "-".join(map(str, case)))
def test_what_is_sharded(results: Any, case: tuple[Any, ...]) -> None:
    found = results[("fsdp2", *case)]
    kind = case[1]
    for name, (shape, placements) in found["placements"].items():
        whole = torch.Size(shape).numel()
        if kind == "bnb" and name.endswith("base_layer.weight") and ".layers." in name:
            assert placements == ()
            assert found["held"][name] == whole
            continue
        assert [repr(p) for p in placements] == ["Shard(dim=0)"], name
        assert found["held"][name] == shape[0] // 2 * (whole // shape[0]) + (shape[0] % 2) * (whole // shape[0])
    packed = [n for n in found["placements"] if n.endswith("base_layer.absmax")]
    assert len(packed) == (6 if kind.startswith("nf4") else 0)


@pytest.mark.parametrize("case", FSDP2, ids=lambda case: "-".join(map(str, case)))
def test_a_sharded_model_is_saved_whole_and_loaded(results: Any, folder: Path, case: tuple[Any, ...]) -> None:
    found = results[("fsdp2", *case)]
    saved = folder / "-".join(map(str, case))
    state = load_file(saved / "adapter_model.safetensors")
    assert state.keys() == found["ours"]["state"].keys()
    for key, value in state.items():
        assert_same_bits(value, found["ours"]["state"][key])
    if case[1] != "bnb":
        model = fastpeft.PeftModel.from_pretrained(tools["base"](case[1]), saved)
        with torch.no_grad():
            y = model(tools["IDS"])
            assert_near_exact(found["after"], y, model.double()(tools["IDS"]))
    assert all(not value.any() for value in found["zeroed"].values())  # set_peft_model_state_dict
    assert "is sharded" in found["merging"]


def test_what_cannot_be_sharded_says_so(results: Any) -> None:
    two, unknown, bank, merged = results["refused"]
    assert "several dtypes" in two
    assert "layers.0.norm.weight" in two
    assert "NoSuchBlock" in unknown
    assert "vblora_vector_bank" in bank
    assert "unmerge_adapter" in merged


@pytest.mark.parametrize("reentrant", [None, False])
def test_ddp_trains_as_one_process_does(results: Any, reentrant: bool | None) -> None:
    found = results["ddp", reentrant]
    assert_as_alone(found, "grads", "state")
    assert found["sent"] == []  # no packed weight goes through the network in each forward


def test_the_older_fsdp_wraps_blocks_and_what_trains(results: Any) -> None:
    found = results["fsdp1"]
    assert found["wrapped"] == ["Block", "Linear", "PeftModel"]
    assert_as_alone(found)
    start, gathered, again = found["states"]
    assert start.keys() == gathered.keys() == again.keys()
    for key, value in start.items():
        assert_same_bits(gathered[key], value)
        assert_same_bits(again[key], (value + 1) - 1)


def test_torchs_and_accelerates_state_dicts_of_packed_layers(results: Any) -> None:
    found = results["torch's states"]
    assert sum(key.endswith("base_layer.weight.nested_absmax") for key in found["wanted"]) == 6
    for state in found["states"]:
        assert state.keys() == found["wanted"].keys()
        for key, value in found["wanted"].items():
            assert_same_bits(state[key], value)
    assert {key for key in found["wanted"] if "lora_" in key or ".base_layer.weight" in key} == found["adapter"].keys()
    kept, filled = found["outputs"]  # of the second process as well, which was given nothing
    assert kept.any()
    assert_same_bits(filled, kept)


def test_experts_in_4_bits_are_sharded(results: Any) -> None:
    pytest.importorskip("transformers")
    found = results["packed experts"]
    assert found["shards"] == ["DTensor"] * 4  # bytes and scales
    for alone, sharded in zip(*found["runs"], strict=True):
        assert_same_bits(sharded, alone)
    assert found["found"].keys() == found["wanted"].keys()
    for key, value in found["wanted"].items():
        assert_same_bits(found["found"][key], value)


@pytest.mark.parametrize("name", tools["QUICKER"])
def test_accelerate_before_and_after_sharding(results: Any, name: str) -> None:
    pytest.importorskip("transformers")
    whole, *sharded = (results["quicker"][name][order] for order in ("whole", "before", "after"))
    assert whole["served"]
    for found in sharded:
        assert found["served"] == whole["served"]
        assert found["left"] == []
        for part in ("run", "undone"):
            for mine, alone in zip(found[part], whole[part], strict=True):
                assert_same_bits(mine, alone)


def test_a_packed_layer_shows_modules_to_distributed_checkpoints_alone() -> None:
    layer = fastpeft.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 32)))[0]
    assert {*dict(layer.keys_as_modules.named_buffers()), "weight", "bias"} == layer.state_dict().keys()
    assert [*layer.children(), *layer.named_children()] == []
    assert [*layer.modules()] == [layer]


def test_a_sharded_layer_is_not_replaced_and_keeps_its_dtypes() -> None:
    """The part that needs no second process: the parameters that FSDP2 shards."""
    layer = fastpeft.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 32)), double_quant=False)[0]
    before, state = layer(torch.ones(1, 64)), layer.state_dict()
    layer.share_parameters()
    assert sorted(n for n, p in layer.named_parameters() if not p.requires_grad) == ["absmax", "bias", "weight"]
    assert_same_bits(layer(torch.ones(1, 64)), before)
    assert layer.state_dict().keys() == state.keys()
    for key, value in layer.state_dict().items():
        assert_same_bits(value, state[key])
    with pytest.raises(ValueError, match="is sharded"):
        layer.set_quant_weight(layer.quant_weight())
    layer.bfloat16()
    assert (layer.absmax.dtype, layer.weight.dtype, layer.bias.dtype) == (torch.float32, torch.uint8, torch.bfloat16)
    assert isinstance(layer.absmax, torch.nn.Parameter)
