"""Single tensors of a base model's safetensors files, read when they are asked for."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from ..files.checks import path_inside, read_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class ModelTensors:
    """path: the file or its folder; None: the folder that the model was loaded from, or the Hub's cache of it."""

    def __init__(self, path: str | os.PathLike[str] | None, model: nn.Module) -> None:
        self._prefix = getattr(model, "base_model_prefix", "")
        self.where = where = Path(path) if path is not None else _folder_of(model)
        if where.is_dir() and (where / FILE).exists():
            where = where / FILE
        self._files: dict[str, Path] = {}
        self._only: Path | None = where if where.is_file() else None
        if self._only is None:
            folder = where if where.is_dir() else where.parent
            if not (folder / INDEX).is_file():
                raise FileNotFoundError(f"{self.where} holds neither {FILE} nor {INDEX}.")
            names = read_json(folder / INDEX)["weight_map"]
            self._files = {key: path_inside(folder, file) for key, file in names.items()}

    def get(self, name: str) -> Tensor:
        """The tensor of this name; files of a model's body have it without the body's own name (`model.`)."""
        from safetensors import safe_open

        for key in (name, name.removeprefix(f"{self._prefix}.") if self._prefix else name):
            file = self._only or self._files.get(key)
            if file is None:
                continue
            with safe_open(file, framework="pt", device="cpu") as content:
                if key in content.keys():  # noqa: SIM118  (it is no dictionary)
                    return content.get_tensor(key)  # type: ignore[no-any-return]
        raise KeyError(f"{self.where} holds no tensor {name!r}")


def _folder_of(model: nn.Module) -> Path:
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
    if not name:
        raise ValueError("The model does not say where it was loaded from: pass model_path.")
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:
        raise ValueError(f"The files of {name!r} are not in the Hub's cache: pass model_path ({error}).") from error
