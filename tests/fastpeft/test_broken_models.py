"""Models with broken files or values, by the ways of programs that do not quantise: errors that say which and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fastpeft import load_nf4_model, quantize_model
from fastpeft.apps.training import models
from fastpeft.apps.training.data import Example
from fastpeft.apps.training.errors import UserError
from fastpeft.apps.training.forward import CompletionLoss
from fastpeft.files.checks import AdapterFileError
from safetensors.torch import load_file, save_file

from .test_streaming_load import NORM, SHARD, llama, shard_of

CPU = torch.device("cpu")


def changed(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("what", ["cut", "junk", "size"])
def test_a_dense_folder(tmp_path: Path, what: str) -> None:
    llama().save_pretrained(tmp_path, max_shard_size=SHARD)
    file = shard_of(tmp_path, NORM)
    if what == "size":
        changed(file, lambda tensors: tensors.update({NORM: tensors[NORM][:-1].clone()}))
    else:
        file.write_bytes(file.read_bytes()[:-9] if what == "cut" else bytes(range(256)) * 4)
    with pytest.raises(UserError) as told:
        models.load_base(models.Source(str(tmp_path), "folder x"), torch.float32, CPU, "none", {})
    assert ("of other sizes" if what == "size" else file.name) in told.value.problem


def test_scales_of_four_bits(tmp_path: Path) -> None:
    quantize_model(llama(), double_quant=False).save_pretrained(tmp_path)
    scales = "model.layers.1.mlp.up_proj.weight.absmax"
    changed(tmp_path / "model.safetensors", lambda tensors: tensors[scales][3:].fill_(torch.nan))
    with pytest.raises(AdapterFileError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj: absmax holds"):
        load_nf4_model(tmp_path)


def test_a_loss_that_is_no_number() -> None:
    model = llama().requires_grad_(False)
    model.model.norm.weight[0] = torch.inf
    examples = [Example([1, 2, 3, 4], [False, True, True, True])]
    with pytest.raises(UserError, match="before any training: weights are NaN or infinite"):
        CompletionLoss(model).self_check(examples, False, 0, CPU)
