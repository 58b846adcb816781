"""A GGUF file's tensors as the layers of transformers' model: which is whose, and in which order its rows lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight
from peft_kernels.formats import FORMATS

from ..files.checks import list_some, mismatch, short
from ..files.gguf_file import FLOATS, GGUFFile
from .gguf_config import ROTATIONS
from .gguf_experts import Experts, check_scales, experts_of


def is_known(quant: str) -> bool:
    """True of a type of ggml that kernels read as it lies."""
    known = FORMATS.get(quant.lower())
    return known is not None and known.blocksize is not None


class _Flat:
    """A model as transformers' function of names reads it, without its children: for each of them it would make the
    whole table again, which takes seconds."""

    def __init__(self, of: nn.Module, model: Any) -> None:
        self.config, self.state_dict = model.config, of.state_dict

    def named_children(self) -> list[Any]:
        return []


@dataclass
class Naming:
    """transformers' own tables for a file and a model: names of tensors, and what its reader does to their values.

    names: the model's by the file's. processor: transformers' `TensorProcessor` of the architecture. experts: those of
    the model, whose tensors are not among the names. found: tensors that it put aside for names of its own.
    """

    names: dict[str, str]
    processor: Any
    experts: list[Experts] = field(default_factory=list)
    found: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, file: GGUFFile, model: Any) -> Naming:
        """Raises AdapterFileError for an architecture that transformers does not read from GGUF files."""
        try:
            return cls.made(str(file.values.get("general.architecture")), model)
        except NotImplementedError as error:
            raise file.wrong(str(error).partition("\n")[0]) from None

    @classmethod
    def made(cls, architecture: str, model: Any) -> Naming:
        """Of a model without a file. Raises NotImplementedError as transformers does."""
        from transformers import modeling_gguf_pytorch_utils as own

        make: Any = own.TENSOR_PROCESSORS.get(architecture, own.TensorProcessor)
        processor = make(config=model.config.to_dict())
        prefix = model.base_model_prefix
        inner = getattr(model, prefix, None)
        model_type = architecture if architecture == "llama" else None  # Mistral's family has these names, too
        # a file's names may be those of the causal model, or of the model within it
        names = dict(own.get_gguf_hf_weights_map(_Flat(model, model), processor, model_type))
        if isinstance(inner, nn.Module):
            within = own.get_gguf_hf_weights_map(_Flat(inner, model), processor, model_type, qual_name=f"{prefix}.")
            names = {**within, **names}
        experts = experts_of(model)
        held = {one.key for one in experts}
        return cls({name: key for name, key in names.items() if key not in held}, processor, experts)

    def processed(self, name: str, values: Any) -> Any:
        """Values as transformers would have them, or None where they went into `found`."""
        done = self.processor.process(
            weights=values, name=name, tensor_key_mapping=self.names, parsed_parameters={"tensors": self.found}
        )
        return done.weights if done.name == name else None

    def rows(self, name: str, count: int) -> Tensor | None:
        """The order in which a matrix' rows are taken, int64 [count]; empty where they lie so. None where transformers
        does more to the values than to order rows. The numbers of the rows go through its own code."""
        numbers = np.arange(count).reshape(count, 1)
        before = dict(self.found)
        try:
            done = self.processed(name, numbers.copy())
        except (ValueError, IndexError, KeyError, TypeError):
            done = None
        if len(self.found) != len(before):
            self.found = before
            return None
        if done is None or done.size != count or 1 not in done.shape:
            return None
        order = np.ascontiguousarray(done).reshape(count)
        if not np.array_equal(np.sort(order), numbers.reshape(count)):
            return None
        in_order = np.array_equal(order, numbers.reshape(count))
        return torch.empty(0, dtype=torch.int64) if in_order else torch.from_numpy(order.astype(np.int64))

    def check(self, file: GGUFFile) -> list[str]:
        """Names of tensors that the model has no place for."""
        experts = {name for one in self.experts for name in one.names}
        return [name for name in file.tensors if name not in self.names.keys() | experts and name not in ROTATIONS]


def blocks(
    file: GGUFFile, naming: Naming, name: str, shape: tuple[int, ...], dtype: torch.dtype, empty: bool = False
) -> QuantWeight | None:  # fmt: skip
    """A matrix as it lies in the file; a copy of its bytes in another order where llama.cpp has its rows so.

    None for floats, and where transformers changes more than the order. empty: on the meta device, nothing is read.
    Raises AdapterFileError for one of another shape, for types that kernels do not read, and for scales that are NaN or
    infinite.
    """
    found = file.tensors[name]
    if found.quant in FLOATS:
        return None
    if not is_known(found.quant):
        names = sorted(f.name.upper() for f in FORMATS.values() if f.blocksize)
        raise file.wrong(f"tensor {short(name)} is in {found.quant}, and layers hold {', '.join(names)}: quantize=nf4 "
                         "converts the file")  # fmt: skip
    if found.shape != shape:
        raise file.wrong(f"size mismatch for {mismatch(name, found.shape, shape)}")
    order = naming.rows(name, shape[0])
    if order is None:
        return None
    if empty:
        return QuantWeight.gguf(torch.empty(found.nbytes, dtype=torch.uint8, device="meta"), found.quant, shape, dtype)
    weight = QuantWeight.gguf(file.bytes_of(name), found.quant, shape, dtype)
    check_scales(file, name, weight)
    return weight.take(order) if len(order) else weight


def dense(file: GGUFFile, naming: Naming, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A tensor's values in `dtype` in memory of their own; None where it is a part of others. Raises AdapterFileError
    for another shape, for NaN and infinity."""
    values = naming.processed(name, file.dense(name))
    if values is None:
        return None
    made = torch.tensor(np.ascontiguousarray(values)).to(dtype)
    if tuple(made.shape) != shape:
        raise file.wrong(f"size mismatch for {mismatch(name, made.shape, shape)}")
    file.check_finite(name, made)
    return made


def check_places(file: GGUFFile, naming: Naming) -> None:
    """Raise AdapterFileError for tensors that the model has no place for."""
    if left := naming.check(file):
        raise file.wrong(f"the model has no place for its {list_some(left)}")
