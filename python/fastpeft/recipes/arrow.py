"""Arrow models: several trained LoRA adapters, and a router between them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..config.base import CONFIG_NAME
from ..config.targets import minimal_suffixes
from ..files.checks import PREFIX, list_some
from ..methods.lora.lora import LoraConfig
from ..methods.lora.variants.arrow import GKS_ADAPTER_PREFIX, TASK_ADAPTER_PREFIX, ArrowConfig
from ..model.peft_model import PeftModel
from ..saving.folder import open_adapter

ROUTER = "arrow_router"


def create_arrow_model(
    base_model: nn.Module, task_specific_adapter_paths: Sequence[str], arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None, **adapter_kwargs: Any,
) -> PeftModel:  # fmt: skip
    """A PeftModel with LoRA adapters `task_0`, `task_1`, ... of folders or Hub repositories ("user/name/subfolder") and
    the active adapter `arrow_router`, which sends each token through those that suit it.

    general_adapter_paths: adapters `gks_0`, ..., whose mean is subtracted with `arrow_config.use_gks`. adapter_kwargs:
    of `PeftModel.from_pretrained`. All must have one rank and the same linear target layers: else ValueError, or
    TypeError for layers of another kind. On an error the base model is as it was. Adapters that are loaded later take
    part.
    """
    if not task_specific_adapter_paths:
        raise ValueError("`task_specific_adapter_paths` should contain at least one adapter path")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("You should provide general LoRA paths if you want to use GenKnowSub.")
    paths = {f"{TASK_ADAPTER_PREFIX}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    for i, path in enumerate(general_adapter_paths or () if arrow_config.use_gks else ()):
        paths[f"{GKS_ADAPTER_PREFIX}{i}"] = path
    sources = {name: _source(path, adapter_kwargs) for name, path in paths.items()}
    headers = {name: open_adapter(folder, **options).tensors for name, (folder, options) in sources.items()}
    modules, rank = _checked(headers)
    names = [name for name, _ in base_model.named_modules() if name]
    before = arrow_config.task_adapter_names, arrow_config.gks_adapter_names
    model: PeftModel | None = None
    try:
        arrow_config.task_adapter_names = [n for n in paths if n.startswith(TASK_ADAPTER_PREFIX)]
        arrow_config.gks_adapter_names = [n for n in paths if n.startswith(GKS_ADAPTER_PREFIX)]
        for name, (folder, options) in sources.items():
            if model is None:
                model = PeftModel.from_pretrained(base_model, folder, name, **options)
            else:
                model.load_adapter(folder, name, **options)
        assert model is not None
        targets = sorted(minimal_suffixes(modules, names))
        model.add_adapter(ROUTER, LoraConfig(arrow_config=arrow_config, target_modules=targets, r=rank))
        model.set_adapter(ROUTER)
    except Exception:
        arrow_config.task_adapter_names, arrow_config.gks_adapter_names = before
        if model is not None:
            model.unload()
        raise
    return model


def _source(path: str, adapter_kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """An adapter's folder or repository, and the arguments that it is read with."""
    folder, subfolder = _resolve_adapter_source(path)
    return folder, {**({} if subfolder is None else {"subfolder": subfolder}), **adapter_kwargs}


def _resolve_adapter_source(path: str) -> tuple[str, str | None]:
    """(folder or repository, folder in the repository) of an adapter."""
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, CONFIG_NAME)):
            raise ValueError(f"Local adapter path '{path}' does not contain 'adapter_config.json'.")
        return path, None
    parts = path.strip("/").split("/")
    return ("/".join(parts[:2]), "/".join(parts[2:]) or None) if len(parts) > 1 else (path, None)


def _checked(headers: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], int]:
    """The modules that all of these adapters have, and their rank, by what their files hold."""
    first: tuple[str, dict[str, tuple[int, ...]]] | None = None
    for name, tensors in headers.items():
        shapes = {}
        for key, tensor in tensors.items():
            module, found, _ = key.removeprefix(PREFIX).partition(".lora_A.")
            if found and len(tensor.shape) == 2:
                shapes[module] = tuple(tensor.shape)
            elif found or ".lora_B." not in key:
                raise TypeError(
                    "LoRA adapters must only target Linear-like layers (torch.nn.Linear, transformers' Conv1D, 4-bit "
                    f"and 8-bit). Found: adapter '{name}' has {key} {tuple(tensor.shape)}."
                )
        if not shapes:
            raise ValueError(f"[{name}] has no tensors of a LoRA adapter.")
        if first is None:
            first = name, shapes
        other = first[1]
        differing = [m for m in shapes.keys() & other.keys() if shapes[m] != other[m]]
        if differing:
            ranks = shapes[differing[0]][0], other[differing[0]][0]
            raise ValueError(
                f"[{name}] rank mismatch: {ranks[0]} != {ranks[1]} of [{first[0]}] in {list_some(sorted(differing))}"
                if ranks[0] != ranks[1] else f"[{name}] shape mismatch in {list_some(sorted(differing))}"
            )  # fmt: skip
        if shapes.keys() != other.keys():
            raise ValueError(
                f"[{name}] target_modules mismatch: it lacks {list_some(sorted(other.keys() - shapes.keys()))} of "
                f"[{first[0]}] and has {list_some(sorted(shapes.keys() - other.keys()))} beside them."
            )
    assert first is not None
    ranks_found = sorted({shape[0] for shape in first[1].values()})
    if len(ranks_found) > 1:
        raise ValueError(f"[{first[0]}] rank mismatch: its layers have ranks {ranks_found}, Arrow needs one.")
    return list(first[1]), ranks_found[0]
