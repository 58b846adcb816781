"""Activations that wait on disk: the same bits as without, a scratch file that is not seen, errors that name it."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fastpeft import LoraConfig, WriteError, get_peft_model, offload_activations
from fastpeft.apps.training import run
from fastpeft.apps.training.config import from_dict
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.memory import offloading
from fastpeft.apps.training.metrics import Silent, read_metrics
from fastpeft.apps.training.testing import make_tiny_run
from forms import matrix
from torch import nn

from peft_kernels.testing import assert_same_bits

ROWS, TOKENS, HIDDEN, LAYERS = 2, 384, 32, 3  # an input of a layer has 96 KiB


def tiny(checkpointing: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = get_peft_model(transformers.LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear"))
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def gradients(model: Any, inside: Any = None) -> list[torch.Tensor]:
    ids = torch.randint(0, 64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    if inside is None:
        model(input_ids=ids, labels=ids).loss.backward()
    else:
        with inside:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_are_the_same_bits(checkpointing: bool, tmp_path: Path) -> None:
    model = tiny(checkpointing)
    expected, inside = gradients(model), offload_activations(model, "disk", tmp_path)
    for found, value in zip(gradients(model, inside), expected, strict=True):
        assert_same_bits(found, value)
    assert inside.moved >= LAYERS * ROWS * TOKENS * HIDDEN * 4


def test_the_next_step_takes_the_same_places_of_a_file_without_a_name(tmp_path: Path) -> None:
    model = tiny()
    inside = offload_activations(model, folder=tmp_path)
    gradients(model, inside)
    room = inside.room
    for _ in range(3):
        gradients(model, inside)
    gc.collect()
    assert inside.room == room <= inside.moved / 4
    assert list(tmp_path.iterdir()) == []


def test_weights_and_what_is_small_stay(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    inside = offload_activations(model, "disk", tmp_path)
    for part in model:
        part.weight.requires_grad_(False)
    with inside:
        model(torch.ones(1, 256)).sum().backward()  # keeps the second weight, of 256 KiB
    assert inside.moved == 0


def test_a_tensor_that_stays_is_not_written_to(tmp_path: Path) -> None:
    w = torch.ones(4, requires_grad=True)
    x = torch.ones(4)
    with offload_activations(nn.Linear(2, 2), "disk", tmp_path):
        y = (w * x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_another_context_is_not_switched_off() -> None:
    model = tiny()
    with model.base_model.rows_assigned(["default"] * ROWS), pytest.raises(RuntimeError, match="enter it first"):
        gradients(model, offload_activations(model))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    model = tiny()
    with largest_file(150_000), pytest.raises(WriteError, match=f"cannot write {tmp_path}: a file would be larger"):
        gradients(model, offload_activations(model, "disk", tmp_path))
    expected = gradients(model)  # and the next step, with room, is whole
    for found, value in zip(gradients(model, offload_activations(model)), expected, strict=True):
        assert_same_bits(found, value)


def test_bad_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in the host's memory already; use to=\"disk\""):
        offload_activations(tiny(), "cpu")
    with pytest.raises(ValueError, match="expected one of cpu, disk, got 'gpu'"):
        offload_activations(tiny(), "gpu")  # type: ignore[arg-type]
    with pytest.raises(OSError, match="nowhere"):
        offload_activations(tiny(), "disk", tmp_path / "nowhere")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("world"), 40, hidden=128)


def settings(world: Path, output: Path, **changes: Any) -> Any:
    return from_dict({
        "model": str(world / "model"), "data": str(world / "data.jsonl"), "output": str(output), "max_length": 256,
        "gradient_checkpointing": True, "max_steps": 2, "dtype": "float32", "lora": {"r": 2}, **changes,
    })  # fmt: skip


@pytest.mark.parametrize("trainer", matrix(["own", "hf", "several"], short=("own", "several")))
def test_a_run_is_the_same_bits(world: Path, tmp_path: Path, trainer: str) -> None:
    losses = []
    for place in ("none", "disk"):
        more = {"adapters": {"one": {}, "two": {"seed": 1}}} if trainer == "several" else {}
        config = settings(world, tmp_path / place, offload_activations=place, **more)
        run.train_all(config, run.prepare_all(config), Silent(), trainer="hf" if trainer == "hf" else "own")
        lines = read_metrics(tmp_path / place / "metrics.jsonl")
        losses.append([(line["loss"], line["grad_norm"]) for line in lines if "loss" in line])
    assert losses[0] == losses[1] != []


def test_settings_that_do_not_fit_together_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="offload_activations=disk without gradient_checkpointing"):
        settings(world, tmp_path, offload_activations="disk", gradient_checkpointing=False)
    config = settings(world, tmp_path, offload_activations="disk", offload_folder=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        offloading(config, tiny())
    with pytest.raises(UserError, match="in the host's memory already"):
        offloading(settings(world, tmp_path, offload_activations="cpu"), tiny())
