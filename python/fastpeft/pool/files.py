"""Adapter folders as a pool finds and reads them. Nothing a file says is believed before it was checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.base import CONFIG_NAME, PeftConfig
from ..config.limits import check_adapter_name, check_config
from ..files.checks import PREFIX, AdapterFileError, Confined, list_some, path_inside, read_json
from ..methods.lora.lora import Lora, LoraConfig, scaling_of
from ..methods.registry import method_of
from ..saving.export import beyond_plain_lora
from ..saving.fits import check_shapes
from ..saving.folder import SAFETENSORS_NAME, AdapterSource, open_adapter
from .buffers import Buffers, LayerAdapter, Staged
from .layers import Selector
from .prompts import Prompt, Prompts, is_prompt, prompt_config

Signature = tuple[tuple[int, int, int] | None, ...]

# Options of LoRA whose tensors or layers are no A and B of modules that are there.
_READS = 4  # of files that are replaced while they are read
_OTHER_OPTIONS = ("target_parameters", "trainable_token_indices", "layer_replication", "ensure_weight_tying",
                  "arrow_config", "megatron_config")  # fmt: skip
_PLAIN = "it is no plain LoRA, which is all that is served"


class AdapterLoadError(RuntimeError):
    """An adapter that cannot be used: `name`, and why not: `reason`. Others are not affected.

    rule: the reason for strangers, without places of files and without anything that they hold.
    """

    def __init__(self, name: str, reason: str, rule: str = "") -> None:
        super().__init__(f"adapter {name!r}: {reason}")
        self.name, self.reason, self.rule = name, reason, rule

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.reason, self.rule)


class UnknownAdapterError(AdapterLoadError):
    """There is no adapter of this name."""


def signature_of(folder: os.PathLike[str]) -> Signature:
    """(time, size, inode) of an adapter's two files: what differs after a change. None for a file that is missing."""

    def one(name: str) -> tuple[int, int, int] | None:
        try:
            found = os.stat(os.path.join(folder, name))
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    return one(CONFIG_NAME), one(SAFETENSORS_NAME)


@dataclass
class Record:
    """An adapter folder. listed: whether it was found in the pool's directory. failure: why it could not be read last
    (reason and rule), with the signature that it had then."""

    name: str
    folder: Confined
    listed: bool = False
    failure: tuple[Signature, str, str] | None = None

    def check(self) -> None:
        """Raise what reading it raised last, unless its files have changed since."""
        if self.failure is None:
            return
        if self.failure[0] == signature_of(self.folder):
            raise AdapterLoadError(self.name, *self.failure[1:])
        self.failure = None


@dataclass
class Registry:
    """The adapters that a pool knows, by name. refused: why folders of the directory cannot be used, by name."""

    directory: Path | None
    records: dict[str, Record] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def get(self, name: str) -> Record:
        record = self.records.get(name)
        if record is None:
            raise UnknownAdapterError(name, "there is no adapter of this name")
        return record

    def add(self, name: str, folder: str | os.PathLike[str]) -> None:
        check_adapter_name(name)
        if name in self.records:
            raise ValueError(f"there is an adapter {name!r} already: remove it first")
        place, root = Path(folder).resolve(), None if self.directory is None else self.directory.resolve()
        found = Confined(place, root if root is not None and root in place.parents else place)
        try:
            os.lstat(found / CONFIG_NAME)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}: not an adapter") from None
        self.records[name] = Record(name, found)

    def look(self) -> tuple[dict[str, Confined], dict[str, str]]:
        """The adapter folders of the directory now, and why others are none, by name."""
        found: dict[str, Confined] = {}
        refused: dict[str, str] = {}
        if self.directory is None:
            return found, refused
        root = self.directory.resolve()
        with os.scandir(root) as entries:
            # lexists is False for what cannot be looked at, a link to itself say, where the entry's is_dir raises
            folders = sorted(e.name for e in entries if os.path.lexists(os.path.join(e.path, CONFIG_NAME)))
        for name in folders:
            try:
                found[check_adapter_name(name)] = Confined(path_inside(root, name), root)
            except AdapterFileError as error:
                refused[name] = str(error)
        return found, refused

    def update(self, seen: tuple[dict[str, Confined], dict[str, str]]) -> tuple[list[str], list[str]]:
        """Take over what `look` saw. Returns the names that are new, and those whose folders are gone or moved."""
        found, self.refused = seen
        gone = [name for name, r in self.records.items() if r.listed and found.get(name) != r.folder]
        for name in gone:
            del self.records[name]
        new = [name for name in found if name not in self.records]
        for name in new:
            self.records[name] = Record(name, found[name], listed=True)
        return new, gone


def lora_config(content: Mapping[str, Any]) -> LoraConfig:
    """The configuration of a folder, which must be plain LoRA's: else ValueError that says what it has beyond."""
    reasons = beyond_plain_lora(content, {})  # tensors are compared with what the model needs, one by one, later
    if reasons:
        raise AdapterFileError(f"a pool serves plain LoRA: {'; '.join(reasons)}", _PLAIN)
    config = PeftConfig.from_peft_type(**{k: v for k, v in content.items() if k != "runtime_config"})
    assert isinstance(config, LoraConfig)
    method = method_of(config)
    method.check_config(config, loading=True)
    set_options = [f"{f}={getattr(config, f)!r}" for f in _OTHER_OPTIONS if getattr(config, f)]
    if set_options or type(method) is not Lora:
        found = ", ".join(set_options) or type(method).__name__
        raise AdapterFileError(f"a pool serves plain LoRA, not {found}", _PLAIN)
    return config


def read_config(folder: Confined, prompts: bool) -> Any:
    """The checked configuration of a folder whose tensors are not looked at: of LoRA, or (prompts) of a prompt."""
    path = folder / CONFIG_NAME
    content = read_json(path)
    check_config(content, path)
    return prompt_config(content) if prompts and is_prompt(content) else lora_config(content)


def read(folder: Confined, selector: Selector, buffers: Buffers, prompts: Prompts) -> Staged | Prompt:
    """Read an adapter into CPU memory, laid out for the pool, from files that lie in the pool's directory.

    Configuration, names, shapes, ranks and sizes are checked before a tensor is read, then the values. Files that are
    replaced meanwhile are read again, a few times. Raises ValueError, OSError or NotImplementedError.
    """
    for _ in range(_READS):
        before = signature_of(folder)
        try:
            staged = _read(folder, selector, buffers, prompts)
        except (ValueError, OSError, NotImplementedError):
            if signature_of(folder) == before:
                raise
            continue
        if signature_of(folder) == before:
            return staged
    raise AdapterFileError(f"{folder} changed while it was read", "it changed while it was read; try again")


def _read(folder: Confined, selector: Selector, buffers: Buffers, prompts: Prompts) -> Staged | Prompt:
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"the folder {folder} is gone")
    source = open_adapter(folder)
    return prompts.read(source) if prompts.most and is_prompt(source.config) else _read_lora(source, selector, buffers)


def _read_lora(source: AdapterSource, selector: Selector, buffers: Buffers) -> Staged:
    config = lora_config(source.config)
    names = selector.names(config)
    if not names:
        rule = "its target_modules select nothing in this model"
        raise AdapterFileError(f"{rule}: {config.target_modules!r}", rule)
    outside = [name for name in names if name not in buffers.layers]
    if outside:
        why = selector.why_not(outside[0]) or f"targets {list_some(outside, 3)}, outside of the pool's target_modules"
        raise AdapterFileError(why, "it targets modules that this server does not serve")
    configs = method_of(config).layer_config(config, names)
    parts = {name: configs.get(name, config) for name in names}
    top = max(part.r for part in parts.values())
    if top > buffers.max_rank:
        why = f"is above the pool's max_rank={buffers.max_rank}"
        raise AdapterFileError(f"its rank {top} {why}", f"its rank {why}")
    shapes = {}
    for name, part in parts.items():
        info = buffers.layers[name]
        shapes[_key(name, "A")] = (part.r, info.in_features)
        shapes[_key(name, "B")] = (info.out_features, part.r)
    check_shapes(shapes, source.tensors, source.folder)
    tensors = source.read()
    return buffers.stage({
        name: LayerAdapter(
            tensors[_key(name, "A")], tensors[_key(name, "B")], scaling_of(part.lora_alpha, part.r, part.use_rslora)
        )
        for name, part in parts.items()
    })  # fmt: skip


def _key(layer: str, which: str) -> str:
    return f"{PREFIX}{layer}.lora_{which}.weight"
