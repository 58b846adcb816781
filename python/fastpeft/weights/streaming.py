"""Quantising a model's tensors one by one while transformers reads them, so that its dense weights never exist.

transformers' quantizers may convert each tensor before it is put into the model (`get_quantize_ops`). It has the files
mapped into memory, and gives the tensors of one layer at a time; their pages are given back as soon as they were used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files.checks import AdapterFileError, list_some, mismatch
from ..files.mapped import MappedFiles
from ..files.safetensors import is_unchanged
from ..files.shards import check_index, read_shards, weight_map
from . import quantize_plan as plan
from .nf4_experts import nests, pack, why_not_packed
from .nf4_store import SCALES, NF4Store
from .quantize_tables import put_table, quantised_table, read_tables

_READY = "_is_hf_initialized"  # transformers' mark of modules and tensors that have their values


class Streaming:
    """The quantising of one model, from its skeleton on the meta device until it is whole.

    files: that transformers is going to read; only safetensors are checked, and given back. how: an `NF4Config`.
    Raises AdapterFileError that names a broken file.
    """

    def __init__(self, model: Any, files: Sequence[str], how: Any) -> None:
        self._model, self._how = model, how
        skip = plan.skipped(model, how.skip)
        names, _ = plan.linear_layers(model, skip)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        shared = {*tied.keys(), *tied.values()}
        self._linear = {f"{name}.weight" for name in names} - shared
        packs = plan.experts(model, skip) if how.experts else []
        self._experts = {f"{name}.{parameter}" for name, parameter in packs}
        self._headers = read_shards(f for f in files if str(f).endswith(".safetensors"))
        keys = {key for header in self._headers for key in header.tensors}
        self._tables = read_tables(model, keys) if how.embeddings else {}
        self._linear -= self._tables.keys()
        self._missing: set[str] | None = None
        self._ties: dict[str, str] = {}
        self._problems: list[str] = []
        self._made: list[NF4Store] = []
        if self._headers:
            check_index(self._headers, weight_map(Path(self._headers[0].path).parent))
            self._check_sizes()
        self._mapped = MappedFiles([header.path for header in self._headers])

    def _check_sizes(self) -> None:
        """Raise for tensors that bear the name of one of the model's and have another size."""
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        expected = self._model.state_dict()
        planned = self._linear | self._experts
        for header in self._headers:
            for key, info in header.tensors.items():
                name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in expected), None)
                if name is None or info.shape == expected[name].shape:
                    continue
                if self._how.strict or name in planned:
                    found = mismatch(key, info.shape, expected[name].shape)
                    raise AdapterFileError(f"{header.path}: size mismatch for {found}")

    def takes(self, name: str) -> bool:
        """True of a parameter that is to be quantised."""
        return name in self._linear or name in self._experts or name in self._tables

    def convert(
        self, input_dict: dict[str, Any], missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Put the tensors into the model in 4 bits; the result, which transformers would put there, is empty. What
        cannot be quantised is noted for `finish`: transformers goes on after an error here."""
        if missing_keys is not None:
            self._missing = missing_keys
            missing_keys.difference_update(input_dict)
        for name, value in input_dict.items():
            if not self._problems:
                self._put(name, value[0] if isinstance(value, list) else value)
        input_dict.clear()
        self._mapped.release()
        return {}

    def _put(self, name: str, value: Tensor) -> None:
        path, _, parameter = name.rpartition(".")
        module: Any = self._model.get_submodule(path)
        shape = module._parameters[parameter].shape
        if value.shape != shape:
            self._problems.append(f"{self._file_of(name)}: size mismatch for {mismatch(name, value.shape, shape)}")
            return
        if not plan.is_quantisable(value):
            self._problems.append(f"{self._file_of(name)}: NaN, infinite or not float32/16 weights in {name}")
            return
        how = self._how
        if name in self._tables:
            try:
                table = quantised_table(value)
            except ValueError as error:
                self._problems.append(f"{self._file_of(name)}: {error}")
                return
            for holder in put_table(self._model, self._tables[name], table):
                self._note(holder, holder)
            self._tied_again()
            return
        if name in self._linear:
            dtype = None if how.compute_dtype is None else getattr(torch, how.compute_dtype)
            new = plan.quantised(module, value, how.quant_type, how.blocksize, how.double_quant, dtype)
            self._model.set_submodule(path, new)
            self._note(new, new)
            return
        why = why_not_packed(name, value, how.blocksize)
        if why is not None:
            self._problems.append(why)
            return
        module._parameters[parameter] = nn.Parameter(value, requires_grad=False)
        pack(module, parameter, how.quant_type, how.blocksize, how.double_quant and nests(value, how.blocksize))
        for child in module.children():
            if isinstance(child, NF4Store) and child not in self._made:
                self._note(module, child)

    def _tied_again(self) -> None:
        """Hide from transformers what is tied to a table already: it would look for parameters."""
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        for target in [target for target, own in tied.items() if own in self._tables]:
            self._ties[target] = tied.pop(target)
            if self._missing is not None:
                self._missing.discard(target)

    def _note(self, module: nn.Module, store: NF4Store) -> None:
        # not to be given random values: models ask modules, or their parts
        module.__dict__[_READY] = True
        store.weight.__dict__[_READY] = True
        # transformers makes buffers that are in no file anew (rotary tables), which the scales must not be taken for
        store._non_persistent_buffers_set.clear()
        self._made.append(store)

    def _file_of(self, name: str) -> str:
        """The file of a tensor for messages, or the folder where the names differ."""
        for header in self._headers:
            if name in header.tensors:
                return str(header.path)
        return str(Path(self._headers[0].path).parent) if self._headers else type(self._model).__name__

    def finish(self) -> int:
        """Make what was put into the model whole; how many weights in 4 bits there are. Raises AdapterFileError."""
        if self._problems:
            raise AdapterFileError(self._problems[0])
        for header in self._headers:
            if not is_unchanged(header):
                raise AdapterFileError(f"{header.path}: changed while it was read")
        if self._how.strict:
            self._check_missing()
        if self._ties:
            self._model.all_tied_weights_keys.update(self._ties)
        for store in self._made:
            store._non_persistent_buffers_set.update(SCALES)
            store.weight.__dict__.pop(_READY, None)
            bias = store._parameters.get("bias")
            if bias is not None:
                bias.requires_grad_(False)
        self._own_memory()
        self._mapped.release()
        return len(self._made)

    def _check_missing(self) -> None:
        own = self._model
        missing = (self._linear | self._experts) if self._missing is None else self._missing
        ignored = [re.compile(pattern) for pattern in getattr(own, "_keys_to_ignore_on_load_missing", None) or ()]
        missing = missing - (getattr(own, "all_tied_weights_keys", None) or {}).keys()
        missing = {key for key in missing if not any(pattern.search(key) for pattern in ignored)}
        if missing:
            raise AdapterFileError(f"{self._file_of('')}: its files lack {list_some(sorted(missing))}")

    def _own_memory(self) -> None:
        """Give the dense parameters memory of their own: of a mapped file that is cut short they would crash us."""
        replaced: dict[int, tuple[Tensor, nn.Parameter]] = {}  # by the id of the first, which so stays in use
        held = {info.dtype for header in self._headers for info in header.tensors.values()}
        for module in self._model.modules():
            for name, parameter in module._parameters.items():
                # of another dtype than the files have, it is a copy already
                if type(parameter) is not nn.Parameter or parameter.dtype not in held or parameter.device.type != "cpu":
                    continue
                if id(parameter) not in replaced:
                    new = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    replaced[id(parameter)] = parameter, new
                    self._mapped.release()
                module._parameters[name] = replaced[id(parameter)][1]
