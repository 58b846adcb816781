"""Training checkpoints: the adapter in its ordinary format, and beside it all that continues the same loss curve.

``checkpoint-N/`` holds ``adapter_model.safetensors`` and ``adapter_config.json`` (loads anywhere) and
``training_state.safetensors`` with ``training_state.json``: optimizer, random states, position, the data's fingerprint.
A folder appears whole or not at all, with a manifest of hashes; resuming takes the newest one that is intact.
Everything is safetensors and json, so reading a checkpoint cannot run code.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .output import ADAPTER_NAME, CURVE_NAME

_TENSOR = "$tensor"
_PATTERN = r"checkpoint-(\d+)"


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """``value`` as json, its tensors moved into ``tensors`` under their paths; `unpack` is the inverse."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {_TENSOR: path}
    if isinstance(value, dict):
        return {"$items": [[k, pack(v, tensors, f"{path}.{k}" if path else str(k))] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        packed = [pack(v, tensors, f"{path}.{i}") for i, v in enumerate(value)]
        return packed if isinstance(value, list) else {"$tuple": packed}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{path}: cannot store a {type(value).__name__} in a checkpoint")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if "$tuple" in value:
            return tuple(unpack(v, tensors) for v in value["$tuple"])
        return {k: unpack(v, tensors) for k, v in value["$items"]}
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    return value


def random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = list(torch.cuda.get_rng_state_all())
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    cuda = state.get("cuda", [])
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def write_adapter(model: Any, adapter: str, folder: Path) -> None:
    """One adapter's files in ``folder`` itself, where `save_pretrained` would make a folder of its name."""
    model.save_pretrained(str(folder), selected_adapters=[adapter])
    if adapter != "default":
        for file in (folder / adapter).iterdir():
            file.replace(folder / file.name)
        (folder / adapter).rmdir()


def save(
    root: Path,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    keep: int,
    adapter: str = "default",
    spare: int | None = None,
) -> Path:
    """Write ``root/checkpoint-<step>`` and delete all but the ``keep`` newest up to it, and that of step ``spare``;
    ``extra`` must be json.

    Those of later steps stay: a run that was resumed from before them found them broken.
    """
    from safetensors.torch import save_file

    from ... import atomic_directory

    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {"optimizer": optimizer.state_dict(), "random": random_state()}
    if (encoder := _encoder(model, adapter)) is not None:  # an adapter's file lacks what makes its prompt
        state["encoder"] = encoder.state_dict()
    state, seen = pack(state, tensors), set()
    for name, tensor in tensors.items():  # safetensors wants each in memory of its own
        if tensor.untyped_storage() in seen:  # the tables of 8-bit optimizers are those of all parameters
            tensors[name] = tensor.clone()
        seen.add(tensor.untyped_storage())
    folder = root / f"checkpoint-{step}"
    root.mkdir(parents=True, exist_ok=True)
    with atomic_directory(folder, keep=False) as temporary:
        write_adapter(model, adapter, Path(temporary))
        save_file(tensors, str(Path(temporary) / "training_state.safetensors"))
        text = json.dumps({"step": step, "extra": extra, "state": state})
        (Path(temporary) / "training_state.json").write_text(text, encoding="utf-8")
    for old in [p for p in numbered(root) if _step(p) <= step and _step(p) != spare][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _encoder(model: Any, adapter: str) -> Any:
    """The module that makes an adapter's prompt; None of one that is no prompt."""
    encoders = getattr(model, "prompt_encoder", None)
    return None if encoders is None else encoders.get(adapter)


def clear(root: Path) -> None:
    """Remove what an earlier run left in an output: its checkpoints, its adapter, its curve.

    Raises UserError, and removes nothing, where a folder of such a name is not of a run here (but of another trainer).
    """
    folders = [(folder, ("training_state.json", "training_state.safetensors")) for folder in numbered(root)]
    if (root / ADAPTER_NAME).is_dir():
        folders.append((root / ADAPTER_NAME, ("adapter_config.json", "adapter_model.safetensors")))
    for folder, names in folders:
        there = os.listdir(folder)
        if folder.is_symlink() or (there and not {*names, "fastpeft_manifest.json"} & set(there)):
            raise UserError(f"{folder} is not of a training run here", "move it away, or choose another output")
    for folder, _ in folders:
        shutil.rmtree(folder)
    (root / CURVE_NAME).unlink(missing_ok=True)


def numbered(root: Path) -> list[Path]:
    """Checkpoint folders by rising step, intact or not."""
    folders = [p for p in root.glob("checkpoint-*") if p.is_dir() and re.fullmatch(_PATTERN, p.name)]
    return sorted(folders, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def newest(root: Path) -> Path | None:
    """The newest checkpoint whose manifest holds; None where there is none."""
    from ... import newest_valid

    found: Path | None = newest_valid(root, _PATTERN)
    return found


def load(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, fingerprint: str, adapter: str = "default"
) -> dict[str, Any]:
    """Put adapter and optimizer back; return ``{"step": ..., "extra": ..., "random": ...}``.

    Raises `UserError` when the checkpoint belongs to other data or another layout: its position means nothing there.
    """
    stored, state = _read(folder)
    if stored["extra"].get("fingerprint") != fingerprint:
        raise UserError(
            f"{folder} was written with other data or another layout "
            "(seed, max_length, packing, batch_size, gradient_accumulation)",
            "restore those settings to resume, or choose another output to start anew",
        )
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    then, now = (
        [(len(group["params"]), sorted({"alpha", "betas", "momentum"} & group.keys())) for group in groups]
        for groups in (state["optimizer"]["param_groups"], optimizer.param_groups)
    )
    if then != now:
        raise UserError(
            f"{folder} was written with another optimizer or another method",
            "restore optimizer, method and targets to resume, or choose another output to start anew",
        )
    _put(folder, state, model, adapter)
    optimizer.load_state_dict(state["optimizer"])
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)  # the settings of now, as those of the learning rate
    return {"step": int(stored["step"]), "extra": stored["extra"], "random": state["random"]}


def put_adapter(folder: Path, model: Any, adapter: str = "default") -> None:
    """Put a checkpoint's adapter into the model, and nothing else of it."""
    _put(folder, _read(folder)[1], model, adapter)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is stored beside the adapter, its states with their tensors)."""
    from safetensors.torch import load_file

    stored: dict[str, Any] = json.loads((folder / "training_state.json").read_text(encoding="utf-8"))
    return stored, unpack(stored["state"], load_file(str(folder / "training_state.safetensors")))


def _put(folder: Path, state: dict[str, Any], model: Any, adapter: str) -> None:
    from safetensors.torch import load_file

    from ... import set_peft_model_state_dict

    saved = load_file(str(folder / "adapter_model.safetensors"))
    if (encoder := _encoder(model, adapter)) is not None:
        encoder.load_state_dict(state["encoder"])
        saved = {key: tensor for key, tensor in saved.items() if key.startswith("base_model.")}
    set_peft_model_state_dict(model, saved, adapter)
