"""Adapters as folders.

A folder holds `adapter_config.json` and `adapter_model.safetensors`, as PEFT, vLLM and diffusers read and write them,
and our manifest, which they pass over.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.base import CONFIG_NAME, PeftConfig
from ..config.limits import check_bytes, check_config
from ..config.types import warn
from ..files import atomic, bins
from ..files.checks import AdapterFileError, Confined, list_some, path_inside, read_json
from ..files.hub import find_adapter_file
from ..files.safetensors import Header, check_finite, read_header, read_tensors

SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

# What to do about a folder that holds a pickle.
WAYS = (
    "Make a safetensors file of it with `fastpeft convert-bin {}`, or pass allow_bin=True, or set "
    f"{bins.ALLOW_ENV}=1 for a whole process: another process then reads it, as tensors only, under a memory limit"
)

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")


def _warn_of_parts(state_dict: Mapping[str, Tensor]) -> None:
    """Warn of factors without their shape, which shards have that nobody gathered."""
    factors = {k: tuple(t.shape) for k, t in state_dict.items() if k.endswith((".lora_A.weight", ".lora_B.weight"))}
    if bad := [f"{key}:{shape}" for key, shape in factors.items() if len(shape) < 2 or 0 in shape]:
        warn(
            f"{len(bad)} LoRA tensor(s) have invalid shape: {list_some(bad, 3)}. A 1-D or zero-sized lora_A / lora_B "
            "tensor indicates that DeepSpeed ZeRO-3 / FSDP shards were not gathered: the file will not be of use. Save "
            "within deepspeed.zero.GatheredParameters or FullyShardedDataParallel.summon_full_params."
        )


def save_adapter(
    directory: str | os.PathLike[str], state_dict: Mapping[str, Tensor], config: Mapping[str, Any], writes: bool = True,
    safe_serialization: bool = True,
) -> None:  # fmt: skip
    """Write an adapter folder in one step: a crash leaves what was there before. Other files in the folder stay.

    Raises AdapterFileError for what would be refused when it is read: values of the configuration, NaN and infinity.
    writes: False for a process that checks the same and leaves the writing to another. safe_serialization: False writes
    `adapter_model.bin`, with a warning, and takes away `adapter_model.safetensors`, which readers would prefer.
    """
    check_config(config, directory)
    check_bytes(config, directory)
    check_finite(state_dict, f"{directory} is not written: the adapter cannot be used")
    _warn_of_parts(state_dict)
    if not writes:
        return
    tensors: dict[str, Tensor] = {}
    held: set[int] = set()
    for key, value in sorted(state_dict.items()):
        # safetensors refuses tensors that share memory, and strided ones; torch.save writes the whole memory of a view.
        tensors[key] = value.detach() if _is_whole(value, held) else value.detach().cpu().contiguous().clone()
        held.add(tensors[key].data_ptr())
    with atomic.atomic_directory(directory, without=() if safe_serialization else (SAFETENSORS_NAME,)) as folder:
        _write_tensors(tensors, folder, safe_serialization)
        text = json.dumps(dict(config), indent=2, sort_keys=True, default=_plain)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def _write_tensors(tensors: dict[str, Tensor], folder: Path, safe_serialization: bool) -> None:
    if safe_serialization:
        from safetensors.torch import save_file

        save_file(tensors, folder / SAFETENSORS_NAME, metadata={"format": "pt"})
        return
    warnings.warn(
        f"safe_serialization=False writes {PICKLE_NAME}, a pickle, which can run code in programs that load it. It is "
        "read here only where that is allowed; without safe_serialization=False a safetensors file is written.",
        stacklevel=4,
    )
    torch.save(tensors, folder / PICKLE_NAME)


def convert_bin(directory: str | os.PathLike[str]) -> int:
    """Write the tensors of a folder's `adapter_model.bin`, which stays, as `adapter_model.safetensors` beside it.

    Returns how many tensors there are. Raises AdapterFileError for a file that is no adapter's, FileNotFoundError
    where there is none, and FileExistsError where the other is there already.
    """
    folder = Path(directory)
    if not (path := folder / PICKLE_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no {PICKLE_NAME}")
    if (folder / SAFETENSORS_NAME).exists():
        raise FileExistsError(f"{folder} holds {SAFETENSORS_NAME} already, which is what is read: nothing to convert")
    tensors = bins.read_bin(path)
    check_finite(tensors, path)
    with atomic.atomic_directory(folder) as temporary:
        _write_tensors(tensors, temporary, True)
    return len(tensors)


def _is_whole(tensor: Tensor, held: set[int]) -> bool:
    """True if a tensor fills a CPU storage of its own that none of `held` points to."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.data_ptr() in held:
        return False
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise TypeError(f"adapter configuration: {type(value).__name__} cannot be written as json")


@dataclass(frozen=True)
class AdapterSource:
    """An adapter folder whose configuration and header were read and checked; the tensors are still on the disk."""

    folder: Path | Confined
    config: dict[str, Any]
    tensors: dict[str, Tensor]  # for their names, shapes and dtypes; a pickle's hold their values
    header: Header | None = None

    def peft_config(self) -> PeftConfig:
        """The configuration as an object; its values were checked when it was read."""
        return PeftConfig.from_peft_type(**{k: v for k, v in self.config.items() if k != "runtime_config"})

    def read(self) -> dict[str, Tensor]:
        """Read the tensors into CPU memory; NaN and infinity are an error."""
        state = dict(self.tensors) if self.header is None else read_tensors(self.header)
        check_finite(state, self.folder)
        return state


def open_adapter(
    directory: str | os.PathLike[str], subfolder: str | None = None, *, allow_bin: bool = False, **hub: Any
) -> AdapterSource:
    """Read and check an adapter's configuration and header.

    directory: a local folder, or `user/name` on the Hugging Face Hub, which needs huggingface_hub and its `hub`
    arguments (revision, token, cache_dir, local_files_only, ...; others are passed over), whose links are followed; a
    folder that is `Confined` as that says. allow_bin: also accept `adapter_model.bin` (see `files/bins.py`); so does
    `FASTPEFT_ALLOW_BIN=1` in the environment.
    """
    allow_bin = allow_bin or bins.allowed()
    folder = _local_folder(directory, subfolder, allow_bin, hub)
    if not (config_path := folder / CONFIG_NAME).exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}: not an adapter")
    config = read_json(config_path)
    check_config(config, config_path)
    if (weights := folder / SAFETENSORS_NAME).exists():
        header = read_header(weights)
        _warn_if_changed(folder)
        return AdapterSource(folder, config, header.tensors, header)
    if not (pickle := folder / PICKLE_NAME).exists():
        raise FileNotFoundError(f"{folder} holds no {SAFETENSORS_NAME}")
    if not allow_bin:
        rule = f"it holds only {PICKLE_NAME}, a pickle, which can run code when it is loaded"
        raise AdapterFileError(f"{folder}: {rule}. {WAYS.format(folder)}", rule)
    return AdapterSource(folder, config, bins.read_bin(pickle))


def load_adapter_file(directory: str | os.PathLike[str], **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the state dict of an adapter folder, with file keys. options: those of `open_adapter`."""
    source = open_adapter(directory, **options)
    return source.config, source.read()


def _warn_if_changed(folder: Path | Confined) -> None:
    try:
        if (folder / atomic.MANIFEST_NAME).exists():
            atomic.verify_manifest(folder, [SAFETENSORS_NAME])
    except AdapterFileError as error:
        # Not an error: PEFT may have saved into the folder since. A damaged file fails the checks of its content.
        warnings.warn(f"{error}. Loading it all the same; save it again to refresh the manifest.", stacklevel=4)


def _local_folder(
    directory: str | os.PathLike[str], subfolder: str | None, allow_bin: bool, hub: dict[str, Any]
) -> Path | Confined:
    if isinstance(directory, Confined):
        return directory
    root = Path(directory)
    if root.is_dir():
        return path_inside(root, subfolder) if subfolder else root
    name = os.fspath(directory)
    if root.exists():
        raise NotADirectoryError(f"{root} is a file, an adapter folder was expected")
    if not isinstance(name, str) or _HUB_ID.fullmatch(name) is None or ".." in name:
        raise FileNotFoundError(f"{name!r} is neither a folder nor the name of a repository on the Hub")
    fetched = Path(find_adapter_file(name, CONFIG_NAME, subfolder, **hub))
    try:
        find_adapter_file(name, SAFETENSORS_NAME, subfolder, **hub)
    except ValueError as error:
        if not allow_bin:
            raise ValueError(f"{error}. If it holds {PICKLE_NAME}: {WAYS.format(fetched.parent)}") from error
        find_adapter_file(name, PICKLE_NAME, subfolder, **hub)
    return fetched.parent
