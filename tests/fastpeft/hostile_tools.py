"""Tools of the tests of hostile files: a model, a sound adapter to spoil, and the check that it is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastpeft
import pytest
import torch
from fastpeft.config.base import CONFIG_NAME
from torch import nn

SECONDS = 1.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(3)]
        )
        self.emb = nn.Embedding(10, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.emb(ids)
        for layer in self.layers:
            h = h + layer["down"](torch.tanh(layer["up"](h)))
        return h


CONFIG = {"target_modules": ["up", "down", "emb"], "r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter. Loading it once also pays for what is imported on first use."""
    folder = tmp_path_factory.mktemp("good")
    model = fastpeft.get_peft_model(Net(), fastpeft.LoraConfig(**CONFIG))
    model.save_pretrained(folder)
    fastpeft.PeftModel.from_pretrained(Net(), folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "a")
    (tmp_path / "a" / "fastpeft_manifest.json").unlink()
    return tmp_path / "a"


def snapshot(model: nn.Module) -> Any:
    """Everything that a failed load could have changed: modules by identity, tensors by bytes, flags."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        {name: (id(t), t.requires_grad, t.detach().clone().numpy().tobytes()) for name, t in tensors.items()},
        copy.deepcopy({k: v.to_dict() for k, v in getattr(model, "peft_config", {}).items()}),
        list(getattr(model, "active_adapters", [])),
    )


@contextmanager
def quick(most: float = SECONDS) -> Iterator[None]:
    """Processor time, of this process and of those it started: on a busy machine the clock says little."""
    begin = sum(os.times()[:4])
    yield
    seconds = sum(os.times()[:4]) - begin
    assert seconds < most, f"took {seconds:.2f} s of processor time"


ERRORS = (ValueError, TypeError, OSError, NotImplementedError)


def refuse(folder: Path, message: str, **options: Any) -> None:
    """The folder must be refused by from_pretrained and by load_adapter, whatever is in the model already."""
    fresh = Net()
    before = snapshot(fresh)
    with quick(), pytest.raises(ERRORS, match=message):
        fastpeft.PeftModel.from_pretrained(fresh, folder, **options)
    assert snapshot(fresh) == before
    model = fastpeft.get_peft_model(Net(), fastpeft.LoraConfig(target_modules=["up"], r=2))
    before = snapshot(model)
    with quick(), pytest.raises(ERRORS, match=message):
        model.load_adapter(folder, "other", **options)
    assert snapshot(model) == before
    assert model(torch.arange(10)).isfinite().all()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


KEY = "base_model.model.layers.1.up.lora_A.weight"
