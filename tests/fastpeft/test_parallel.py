"""Two processes over gloo, among which transformers' tensor parallelism splits a model, against one process; and with
Megatron's parallel linear layers (megatron-core's where it is installed, else stand-ins of their interface), against
dense layers of the same weights."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from forms import full, matrix
from ranks import rendezvous, run_ranks
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("transformers.distributed.tensor_parallel")
pytest.importorskip("peft")
SCRIPT = Path(__file__).with_name("parallel_tools.py")
assert_equal = runpy.run_path(str(SCRIPT.with_name("peft_tools.py")))["assert_equal"]
tools = runpy.run_path(str(SCRIPT))
CASES, LATE = matrix(tools["CASES"], tools["SHORT"]), tools["LATE"]
MEGATRON = runpy.run_path(str(SCRIPT.with_name("megatron_tools.py")))["CASES"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.xdist_group("distributed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    if full():
        tools["save_base"](folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return {case: tools["run"](folder, case, False) for case in (tools["CASES"] if full() else tools["SHORT"])}


@pytest.fixture(scope="module")
def ranks(folder: Path, alone: Any) -> list[Any]:
    """Results of both processes; they load what one process saved."""
    run_ranks(SCRIPT, folder, own=rendezvous())
    return [torch.load(folder / f"results{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_a_step_are_those_of_one_process(ranks: Any, alone: Any, case: str) -> None:
    wanted = alone[case]
    for found in (rank[case] for rank in ranks):
        for name in ("output", "seen", "norm", "after"):
            assert_equal(found[name], wanted[name])
        for name in ("grads", "state"):
            assert found[name].keys() == wanted[name].keys() != set()
            for key, value in wanted[name].items():
                assert_equal(found[name][key], value)
    assert not torch.equal(wanted["output"], wanted["after"])


@pytest.mark.parametrize("case", CASES)
def test_processes_start_alike_whatever_they_draw(ranks: Any, alone: Any, case: str) -> None:
    first, second = (rank[case]["start"] for rank in ranks)
    assert first.keys() == second.keys() == alone[case]["start"].keys()
    for key, value in alone[case]["start"].items():
        assert torch.equal(first[key], second[key])
        assert torch.equal(first[key], value)  # the first process has the seed of the one that is alone


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_whole_and_loads_into_either_model(ranks: Any, alone: Any, folder: Path, case: str) -> None:
    state = load_file(folder / f"{case}-split" / "adapter_model.safetensors")
    assert state.keys() == ranks[0][case]["state"].keys()
    for key, value in state.items():
        assert torch.equal(value, ranks[0][case]["state"][key])
    for found in (rank[case] for rank in ranks):
        assert_equal(found["loaded"], found["after"])
    model = fastpeft.PeftModel.from_pretrained(tools["base"](folder, False, case), folder / f"{case}-split")
    with torch.no_grad():
        assert_equal(model(tools["IDS"]).logits, alone[case]["after"])


@pytest.mark.parametrize("case", matrix(LATE, ["net"]))
def test_rows_merging_and_a_second_adapter_are_as_in_one_process(ranks: Any, alone: Any, case: str) -> None:
    wanted = alone[case]
    for found in (rank[case] for rank in ranks):
        for name in ("rows", "second", "base", "merged", "unmerged", "unloaded"):
            assert_equal(found[name], wanted[name])
        assert_equal(found.get("compiled", found["second"]), wanted["second"])
        assert found["row grads"].keys() == wanted["row grads"].keys() != set()
        for key, value in wanted["row grads"].items():
            assert_equal(found["row grads"][key], value)
        combining, swapping = found["refused"]
        assert "Save the adapters, combine them in a model that is whole" in combining
        assert "Load the adapter under another name" in swapping
    for name in ("rows", "base", "merged"):
        assert not torch.equal(wanted[name], wanted["second"])
    parts = [rank[case]["delta"] for rank in ranks]
    assert_equal(torch.cat(parts), wanted["delta"])  # of a layer that is split by rows of its weight


@pytest.mark.full_form
def test_outputs_gradients_and_files_are_pefts_under_the_same_plan(ranks: Any) -> None:
    for found in (rank["peft"] for rank in ranks):
        assert_equal(*found["output"])
        assert_equal(*found["grads"])
        assert len(found["grads"][0]) == 20
        assert "is invalid for input of size" in found["error"]


def test_what_is_split(ranks: Any) -> None:
    placements = {case: found["shapes"] for case, found in ranks[0].items() if "shapes" in found}

    def split(case: str, end: str) -> list[str]:
        (found,) = {tuple(map(repr, p)) for n, p in placements[case].items() if n.endswith(end)}
        return list(found)

    rows, columns, whole = ["Shard(dim=0)"], ["Shard(dim=1)"], []
    assert [split("net", f"q_proj.lora_{m}.default.weight") for m in "AB"] == [whole, rows]
    assert [split("net", f"o_proj.lora_{m}.default.weight") for m in "AB"] == [columns, whole]
    assert [split("net", f"embed_tokens.lora_embedding_{m}.default") for m in "AB"] == [columns, whole]
    assert [split("net", f"lm_head.lora_{m}.default.weight") for m in "AB"] == [whole, rows]
    # BD-LoRA: a process has its blocks and its part of the rank alone
    assert [split("net-bdlora", f"q_proj.lora_{m}.default.weight") for m in "AB"] == [rows, rows]
    assert [split("net-bdlora", f"o_proj.lora_{m}.default.weight") for m in "AB"] == [rows, columns]
    if full():
        assert [split("bdlora-3", f"gate_proj.lora_{m}.default.weight") for m in "AB"] == [whole, whole]


def test_what_cannot_follow_the_parts_says_so(ranks: Any) -> None:
    dora, vera, pissa, saved, tokens = ranks[0]["refused"]
    assert "Dora cannot adapt" in dora
    assert "Vera cannot adapt" in vera
    assert "init_lora_weights=True" in pissa
    assert "modules_to_save cannot have 'lm_head'" in saved
    assert "only a LoRA that has it in `target_modules` can follow" in tokens


def test_pefts_names_for_split_models(ranks: Any) -> None:
    assert ranks[0]["names"] == [True] * 6
    from fastpeft.tuners.lora.layer import LoraEmbeddingATPHolder

    matrix = nn.Parameter(torch.arange(6.0).view(2, 3), requires_grad=False)
    held = LoraEmbeddingATPHolder(matrix)
    assert (held.num_embeddings, held.embedding_dim, held.weight.requires_grad) == (3, 2, False)
    assert torch.equal(held(torch.tensor([2, 0])), matrix.T[[2, 0]])


@pytest.mark.parametrize("case", MEGATRON)
def test_megatrons_outputs_and_gradients_are_those_of_dense_layers(ranks: Any, case: str) -> None:
    for found in (rank["megatron"][case] for rank in ranks):
        assert found["classes"] == [True] * 4
        assert found["keys"]
        for name in ("output", "x", "merged", "base"):
            assert_equal(*found[name])
        assert not torch.equal(found["output"][0], found["base"][0])
        assert len(found["grads"]) == len(found["start"]) == 4
        for pair in found["grads"].values():
            assert_equal(*pair)


@pytest.mark.parametrize("case", MEGATRON)
def test_megatrons_adapters_start_as_the_first_process_does(ranks: Any, case: str) -> None:
    for found in (rank["megatron"][case] for rank in ranks):
        for ours, wanted in found["start"].values():
            assert torch.equal(ours, wanted)


def test_what_megatrons_layers_cannot_have_says_so(ranks: Any) -> None:
    plain, bias, rows, saved = ranks[0]["megatron"]["refused"]
    assert "megatron_config" in plain
    assert "does not support lora_bias yet" in bias
    assert "does not support mixed_batch_forward yet" in rows
    assert "let Megatron's checkpoints join them" in saved


@pytest.mark.full_form
def test_pefts_adapters_do_not_go_into_megatrons_layers(ranks: Any) -> None:
    """PEFT 0.21.2 fails while it makes the layer, so there are no numbers of its to compare with."""
    assert ranks[0]["peft's error"].startswith("KeyError")


def test_nothing_that_megatron_core_names_is_imported() -> None:
    config = fastpeft.LoraConfig(target_modules=["0"], megatron_config={"foo": 1}, megatron_core="os.system")
    with pytest.raises(ValueError, match="unsupported due to being a potential security risk"):
        fastpeft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
    with pytest.raises(ValueError, match="DoRA does not support megatron_core"):
        fastpeft.LoraConfig(use_dora=True, megatron_config={"foo": 1})


def test_layers_that_are_not_megatrons_have_plain_lora() -> None:
    x = torch.ones(3, 4)
    outputs = []
    for more in ({}, {"megatron_config": {"num_layers": 1}}):
        torch.manual_seed(0)
        config = fastpeft.LoraConfig(target_modules=["0"], init_lora_weights=False, **more)
        outputs.append(fastpeft.get_peft_model(nn.Sequential(nn.Linear(4, 5)), config)(x))
    assert torch.equal(*outputs)
