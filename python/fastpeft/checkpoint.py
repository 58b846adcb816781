"""Adapters as files and as state dicts.

The key rule: in memory `base_model.model.<module>.lora_A.<adapter>.weight`, in a file the adapter's name is left out.
A folder holds `adapter_config.json` and `adapter_model.safetensors`, as PEFT, vLLM and diffusers read and write them,
and our manifest, which they pass over. Loading believes nothing before it was checked (`safetensors_files.py`,
`fits.py`), and setting a state dict changes the model only after every tensor was found to fit.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import atomic
from .checks import PREFIX, TUNER, AdapterFileError, KeyMismatchError, list_some, open_regular, path_inside, read_json
from .fits import check_fits, embedding_tensors, make_room, unpacked
from .limits import check_config
from .safetensors_files import Header, TensorInfo, check_finite, read_header, read_tensors
from .sharded import copy_into, gathered

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")


class IncompatibleKeys(NamedTuple):
    """What `set_peft_model_state_dict` found: missing keys as in memory, unexpected ones as in the state dict."""

    missing_keys: list[str]
    unexpected_keys: list[str]


# --- files ----------------------------------------------------------------------------------------------------


def save_adapter(
    directory: str | os.PathLike[str], state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Write an adapter folder in one step: a crash leaves what was there before. Other files in the folder stay."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    held: set[int] = set()
    for key, value in sorted(state_dict.items()):
        # safetensors refuses tensors that share memory, and strided ones.
        tensors[key] = value.detach() if _is_whole(value, held) else value.detach().cpu().contiguous().clone()
        held.add(tensors[key].data_ptr())
    with atomic.atomic_directory(directory) as folder:
        save_file(tensors, folder / SAFETENSORS_NAME, metadata={"format": "pt"})
        text = json.dumps(dict(config), indent=2, sort_keys=True, default=_plain)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def _is_whole(tensor: Tensor, held: set[int]) -> bool:
    """Whether a tensor fills a CPU storage of its own that none of `held` points to."""
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

    folder: Path
    config: dict[str, Any]
    header: Header | None
    pickled: dict[str, Tensor] | None = None

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        if self.header is not None:
            return self.header.tensors
        assert self.pickled is not None
        return {
            name: TensorInfo(name, t.dtype, tuple(t.shape), 0, t.numel() * t.element_size())
            for name, t in self.pickled.items()
        }

    def read(self) -> dict[str, Tensor]:
        """Read the tensors into CPU memory; NaN and infinity are an error."""
        state = read_tensors(self.header) if self.header is not None else dict(self.pickled or {})
        check_finite(state, self.folder)
        return state


def open_adapter(
    directory: str | os.PathLike[str],
    subfolder: str | None = None,
    revision: str | None = None,
    *,
    allow_pickle: bool = False,
    **hub: Any,
) -> AdapterSource:
    """Read and check an adapter's configuration and header.

    directory: a local folder, or `user/name` on the Hugging Face Hub, which needs huggingface_hub and its `hub`
    arguments (token, cache_dir, local_files_only, ...). revision: of a Hub repository; a local folder has none.
    allow_pickle: also accept `adapter_model.bin`, through torch.load(weights_only=True).
    """
    folder = _local_folder(directory, subfolder, revision, allow_pickle, hub)
    config_path = folder / CONFIG_NAME
    if not config_path.exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}: not an adapter")
    config = read_json(config_path)
    check_config(config, config_path)
    weights = folder / SAFETENSORS_NAME
    if weights.exists():
        header = read_header(weights)
        _warn_if_changed(folder)
        return AdapterSource(folder, config, header)
    pickle = folder / PICKLE_NAME
    if not pickle.exists():
        raise FileNotFoundError(f"{folder} holds no {SAFETENSORS_NAME}")
    if not allow_pickle:
        raise AdapterFileError(
            f"{folder} holds only {PICKLE_NAME}, a pickle, which can run code when it is loaded. "
            "If you trust it, pass allow_pickle=True (it is then read with weights_only=True)"
        )
    return AdapterSource(folder, config, None, _read_pickle(pickle))


def load_adapter_file(
    directory: str | os.PathLike[str],
    subfolder: str | None = None,
    revision: str | None = None,
    *,
    model: nn.Module | None = None,
    allow_pickle: bool = False,
    ignore_mismatched_sizes: bool = False,
    **hub: Any,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the state dict of an adapter folder, with file keys.

    model: the base model that the adapter is meant for; names, shapes, ranks and sizes are then checked against it
    before any tensor is read. ignore_mismatched_sizes: but for the sizes. Other arguments as `open_adapter`.
    """
    source = open_adapter(directory, subfolder, revision, allow_pickle=allow_pickle, **hub)
    if model is not None:
        check_fits(source.config, source.tensors, model, source.folder, ignore_mismatched_sizes)
    return source.config, source.read()


def _warn_if_changed(folder: Path) -> None:
    if not (folder / atomic.MANIFEST_NAME).exists():
        return
    try:
        atomic.verify_manifest(folder, [SAFETENSORS_NAME])
    except AdapterFileError as error:
        # Not an error: PEFT may have saved into the folder since. A damaged file fails the checks of its content.
        warnings.warn(f"{error}. Loading it all the same; save it again to refresh the manifest.", stacklevel=4)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with open_regular(path) as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises whatever the file makes it raise
            raise AdapterFileError(f"{path}: not a file of tensors only ({str(error).splitlines()[0][:200]})") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and type(v) is Tensor for k, v in state.items()):
        raise AdapterFileError(f"{path}: expected a dictionary of tensors by name")
    if sum(t.numel() * t.element_size() for t in state.values()) > size:
        raise AdapterFileError(f"{path}: its tensors claim more than the file's {size} bytes")
    return state


def _local_folder(
    directory: str | os.PathLike[str],
    subfolder: str | None,
    revision: str | None,
    allow_pickle: bool,
    hub: dict[str, Any],
) -> Path:
    root = Path(directory)
    if root.is_dir():
        return path_inside(root, subfolder) if subfolder else root
    name = os.fspath(directory)
    if root.exists():
        raise NotADirectoryError(f"{root} is a file, an adapter folder was expected")
    if not isinstance(name, str) or _HUB_ID.fullmatch(name) is None or ".." in name:
        raise FileNotFoundError(f"{name!r} is neither a folder nor the name of a repository on the Hub")
    from .config import find_adapter_file

    fetched = Path(find_adapter_file(name, CONFIG_NAME, subfolder, revision=revision, **hub))
    try:
        find_adapter_file(name, SAFETENSORS_NAME, subfolder, revision=revision, **hub)
    except ValueError:
        if not allow_pickle:
            raise
        find_adapter_file(name, PICKLE_NAME, subfolder, revision=revision, **hub)
    return fetched.parent


# --- state dicts ----------------------------------------------------------------------------------------------


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """One adapter's tensors by their file keys: its own, trained biases, modules_to_save, embeddings where asked.

    state_dict: take the values from here (keys as in memory), for models whose parameters are sharded elsewhere. Of a
    model that FSDP2 shards the tensors are whole, on every process; all of them must call this.
    save_embedding_layers: "auto" saves the embeddings that are targeted, else all if the vocabulary was resized.
    """
    from .method import method_of
    from .sites import iter_adapter_tensors

    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    config = _configs(model)[adapter_name]
    pairs: dict[str, tuple[str, Tensor]] = {}
    for memory, file, tensor in iter_adapter_tensors(model, adapter_name):
        pairs.setdefault(memory, (file, tensor))
    for memory, tensor in _bias_tensors(model, config).items():
        pairs.setdefault(memory, (memory, tensor))
    if _saves_embeddings(model, config, save_embedding_layers):
        tensors = embedding_tensors(model)
        targeted = {memory: tensor for memory, tensor in tensors.items() if ".base_layer." in memory}
        for memory, tensor in (targeted or tensors).items():
            pairs.setdefault(memory, (memory, tensor))
    method = method_of(config)
    if state_dict is None:
        return method.pack(config, gathered({file: tensor.detach() for file, tensor in pairs.values()}))
    lacking = [memory for memory in pairs if memory not in state_dict]
    if lacking:
        raise KeyMismatchError(f"the state dict lacks {list_some(lacking)} of adapter {adapter_name!r}")
    return method.pack(config, {file: state_dict[memory] for memory, (file, _) in pairs.items()})


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:
    """Put a state dict with file keys into the adapter `adapter_name`, which must be in the model already.

    Sizes are checked first, so that an error leaves the model as it was. Keys that the adapter lacks and that the
    state dict lacks are returned. low_cpu_mem_usage: take the tensors over instead of copying them (needed where the
    adapter was made on the meta device); they move to the device of their layer. Raises KeyMismatchError.
    """
    from .layer import AdapterLayer
    from .shared import held_containers, reuse
    from .sites import adapter_modules, iter_adapter_tensors

    config = _configs(model)[adapter_name]
    peft_model_state_dict = unpacked(model, config, peft_model_state_dict)
    make_room(model, adapter_name, peft_model_state_dict)
    own = {file: (memory, tensor) for memory, file, tensor in iter_adapter_tensors(model, adapter_name)}
    plain = _bias_tensors(model, config) | embedding_tensors(model)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    unexpected, mismatched = [], []
    for key, value in peft_model_state_dict.items():
        for candidate in (key, PREFIX + key, key.removeprefix(PREFIX), TUNER + key, key.removeprefix(TUNER)):
            if candidate in own or candidate in plain:
                memory, target = own[candidate] if candidate in own else (candidate, plain[candidate])
                break
        else:
            unexpected.append(key)
            continue
        if value.shape != target.shape:
            mismatched.append(f"{key} {list(value.shape)}, expected {list(target.shape)}")
            continue
        found[memory] = (target, value)
    if mismatched and not ignore_mismatched_sizes:
        raise KeyMismatchError(f"size mismatch for {list_some(mismatched)}")
    if mismatched:
        warnings.warn(f"ignored because of another size: {list_some(mismatched)}", stacklevel=2)
    new: dict[int, nn.Parameter] = {}  # by the old one's id: what layers share stays one
    for memory, (target, value) in found.items():
        if low_cpu_mem_usage or target.is_meta:
            _assign(model, memory, value, new)
        elif not isinstance(target, nn.Parameter):  # adapters may share a buffer
            _assign(model, memory, value.to(target.dtype, copy=True), new)
        else:
            copy_into(target, value)
    layers = [m for _, m in adapter_modules(model) if isinstance(m, AdapterLayer) and adapter_name in m.methods]
    for layer in layers:
        layer.methods[adapter_name].filled(layer, adapter_name)
    reuse(held_containers(layers), adapter_name)
    there = {id(target) for target, _ in found.values()}  # what layers share may be in a file once or often
    return IncompatibleKeys([memory for memory, target in own.values() if id(target) not in there], unexpected)


def _configs(model: nn.Module) -> Mapping[str, Any]:
    configs: Mapping[str, Any] | None = getattr(model, "peft_config", None)
    if configs is None:
        raise ValueError(f"{type(model).__name__} carries no adapter (it has no peft_config)")
    return configs


def _assign(model: nn.Module, memory: str, value: Tensor, new: dict[int, nn.Parameter]) -> None:
    """Make `value` the tensor at a dotted path; looked up in the modules' tables, since `train` may be an adapter."""
    *path, name = memory.split(".")
    module, parents = model, [model]
    for part in path:
        child = module._modules[part]
        assert child is not None
        module = child
        parents.append(module)
    device = next((t.device for m in reversed(parents) for t in _tensors(m) if not t.is_meta), value.device)
    value = value.to(device)
    if name in module._buffers:
        module._buffers[name] = value
        return
    if name not in module._parameters:  # it follows a tensor that is given, too
        return
    old = module._parameters[name]
    assert old is not None
    if not old.is_meta and old.dtype == value.dtype:
        old.data = value  # the same parameter, which another layer may hold too
        return
    module._parameters[name] = new.setdefault(id(old), nn.Parameter(value, requires_grad=old.requires_grad))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bias_tensors(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """The base model's biases that this adapter trains, which PEFT saves under their keys in memory."""
    bias = getattr(config, "bias", "none")
    if bias in (None, "none", False):
        return {}
    biases = {name: p for name, p in model.named_parameters() if name == "bias" or name.endswith(".bias")}
    if bias == "all":
        own = _adapter_bias_names(model)
        return {name: p for name, p in biases.items() if name not in own}
    # "<method>_only": the biases of the layers that the adapter sits on
    return {name: p for name, p in biases.items() if name.endswith(".base_layer.bias")}


def _adapter_bias_names(model: nn.Module) -> set[str]:
    from .sites import iter_adapter_tensors

    return {memory for name in _configs(model) for memory, _, _ in iter_adapter_tensors(model, name)}


def _saves_embeddings(model: nn.Module, config: Any, choice: bool | Literal["auto"]) -> bool:
    if choice != "auto":
        return bool(choice)
    trains_rows = any(getattr(config, name, None) for name in ("trainable_token_indices", "token_indices"))
    if not trains_rows and any(".base_layer." in name for name in embedding_tensors(model)):
        warnings.warn("save_embedding_layers is on: an embedding layer is targeted by the adapter", stacklevel=3)
        return True
    base = getattr(config, "base_model_name_or_path", None)
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    file = Path(base) / "config.json" if base else None
    if size is None or file is None or not file.is_file():
        return False
    if read_json(file).get("vocab_size", size) == size:
        return False
    warnings.warn("save_embedding_layers is on: the vocabulary was resized", stacklevel=3)
    return True
