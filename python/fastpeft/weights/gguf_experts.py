"""Experts of GGUF files: the blocks of three tensors as the two parameters that transformers' modules have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight

from ..files.checks import list_some, mismatch, short
from ..files.gguf_file import FLOATS, GGUFFile
from .nf4_experts import dense_parameters, hold

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_PLACES = {GATE_UP: ("ffn_gate_exps", "ffn_up_exps"), DOWN: ("ffn_down_exps",)}


@dataclass(frozen=True)
class Experts:
    """A parameter [E, out, in] of a module of experts. path: of the module. names: of the file's tensors, whose rows
    follow each other in each expert."""

    path: str
    parameter: str
    names: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.path}.{self.parameter}"


def experts_of(model: nn.Module) -> list[Experts]:
    """The experts of a model by what llama.cpp calls their tensors."""
    found = []
    for path, module in model.named_modules():
        numbers = [part for part in path.split(".") if part.isdigit()]
        held = dense_parameters(module)
        if numbers and set(held) == set(_PLACES) and not getattr(module, "is_transposed", False):
            found += [Experts(path, p, tuple(f"blk.{numbers[0]}.{n}.weight" for n in _PLACES[p])) for p in held]
    return found


def fill_experts(model: nn.Module, file: GGUFFile, one: Experts, dtype: torch.dtype, empty: bool) -> None:
    """Put a file's experts into the module, blocks as blocks: those of `down_proj` as they lie, a copy of the others,
    whose gate and up rows lie apart. empty: on the meta device, nothing is read. Raises AdapterFileError for what is
    not there, has other sizes, lies in two types, or is not finite."""
    module: Any = model.get_submodule(one.path)
    shape = tuple(module._parameters[one.parameter].shape)
    if lost := [name for name in one.names if name not in file.tensors]:
        raise file.wrong(f"it has no tensor {list_some(lost)}")
    tensors = [file.tensors[name] for name in one.names]
    part = (shape[0], shape[1] // len(tensors), shape[2])
    for tensor in tensors:
        if tensor.shape != part:
            raise file.wrong(f"size mismatch for {mismatch(tensor.name, tensor.shape, part)}")
    types = {tensor.quant for tensor in tensors}
    if types <= set(FLOATS):
        if not empty:
            dense = [torch.from_numpy(np.array(file.dense(name))).to(dtype) for name in one.names]
            for name, values in zip(one.names, dense, strict=True):
                file.check_finite(name, values)
            module._parameters[one.parameter] = nn.Parameter(torch.cat(dense, 1), requires_grad=False)
        return
    if len(types) > 1:
        raise file.wrong(f"{list_some(one.names)} are in {' and '.join(sorted(types))}, and one parameter holds both: "
                         "quantize=nf4 converts the file")  # fmt: skip
    weight = QuantWeight.gguf(_blocks(file, one, empty), types.pop(), shape, dtype)
    if not empty:
        check_scales(file, one.names[0], weight)
    hold(module, one.parameter, weight)


def _blocks(file: GGUFFile, one: Experts, empty: bool) -> Tensor:
    count = file.tensors[one.names[0]].shape[0]
    if empty:
        size = sum(file.tensors[name].nbytes for name in one.names)
        return torch.empty(size, dtype=torch.uint8, device="meta")
    parts = [file.bytes_of(name) for name in one.names]
    return parts[0] if len(parts) == 1 else torch.cat([part.view(count, -1) for part in parts], 1).view(-1)


def check_scales(file: GGUFFile, name: str, weight: QuantWeight) -> None:
    """Raise AdapterFileError where a tensor's scales are NaN or infinite. Reads the blocks once."""
    try:
        weight.check_values(f"tensor {short(name)}")
    except ValueError as error:
        raise file.wrong(str(error)) from None
