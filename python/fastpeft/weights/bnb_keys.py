"""The state dict keys under which bitsandbytes saves a 4-bit weight: written, and read with every part checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight
from peft_kernels.formats import BLOCKSIZES, QUANT_TYPES, table

from ..files.checks import AdapterFileError, parse_json

_STATE = "weight.quant_state.bitsandbytes__"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def bnb_state(weight: QuantWeight) -> dict[str, Tensor]:
    """Entries that bitsandbytes saves beside `weight`: scales, the code table, and a json text as a uint8 tensor."""
    facts: dict[str, Any] = {name: getattr(weight, name) for name in ("quant_type", "blocksize")}
    facts |= {"dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)}
    assert weight.absmax is not None
    # Clones: safetensors and transformers take tensors that share memory for tied weights and drop all but one.
    state = {
        "weight.absmax": weight.absmax.detach(),
        "weight.quant_map": table(QUANT_TYPES[weight.quant_type], weight.device).clone(),
    }
    if weight.nested_absmax is not None:
        assert weight.nested_code is not None
        assert weight.offset is not None
        # A module on the meta device has no value to write; its state dict is only asked for its keys.
        offset = 0.0 if weight.offset.is_meta else weight.offset.item()
        facts |= {"nested_blocksize": weight.nested_blocksize, "nested_dtype": "float32", "nested_offset": offset}
        state["weight.nested_absmax"] = weight.nested_absmax.detach()
        state["weight.nested_quant_map"] = weight.nested_code.detach().clone()
    return state | {_STATE + weight.quant_type: torch.tensor([*json.dumps(facts).encode()], dtype=torch.uint8)}


class _Keys(nn.Module):
    """Keys of a state dict as a module's attributes. A key may be both a tensor and the start of others: it is what
    leads on then."""

    def __getattr__(self, name: str) -> Any:
        return self._modules[name] if name in self._modules else super().__getattr__(name)


def as_modules(state: Mapping[str, Tensor]) -> nn.Module:
    """A module that has these tensors as buffers under these names: of `weight.absmax`, its child `weight` has one."""
    root = _Keys()
    for key, tensor in state.items():
        *path, name = key.split(".")
        owner: nn.Module = root
        for part in path:
            owner = owner._modules.setdefault(part, _Keys())  # type: ignore[assignment]
        owner._buffers[name] = tensor
    return root


def parse_bnb_state(state: Mapping[str, Tensor], where: str = "", sizes: int = 2) -> QuantWeight:
    """The `QuantWeight` behind bitsandbytes' keys (`weight`, `weight.absmax`, ...); every one is checked first.

    sizes: of its shape, how many there are.
    """
    packed = state["weight"]
    texts = [key for key in state if key.startswith(_STATE)]
    if len(texts) != 1:
        raise AdapterFileError(
            f"{where}weight: expected a 4-bit weight with one {_STATE}* entry, found {len(texts)}"
            + (f" (a dense {packed.dtype} weight: load it before quantising)" if packed.is_floating_point() else "")
        )
    facts = parse_json(bytes(state[texts[0]].cpu().tolist()), where + texts[0])
    quant_type, blocksize, shape, dtype = (facts.get(k) for k in ("quant_type", "blocksize", "shape", "dtype"))
    if quant_type not in QUANT_TYPES or blocksize not in BLOCKSIZES or dtype not in DTYPES:
        raise AdapterFileError(f"{where}{texts[0]}: unknown quant_type, blocksize or dtype in {facts}")
    if not isinstance(shape, list) or len(shape) != sizes or not all(type(n) is int and n >= 0 for n in shape):
        count = {2: "two", 3: "three"}[sizes]
        raise AdapterFileError(f"{where}{texts[0]}: expected a shape of {count} sizes, found {shape}")

    def need(name: str, dtype: torch.dtype, numel: int) -> Tensor:
        if (tensor := state.get(name)) is None:
            raise AdapterFileError(f"{where}{name} is missing")
        if tensor.dtype != dtype or tensor.numel() != numel:
            raise AdapterFileError(
                f"{where}{name}: {tensor.numel()} elements of {tensor.dtype}, expected {numel} of {dtype}"
            )
        return tensor.detach().reshape(-1)

    if packed.dtype != torch.uint8:
        packed = packed.contiguous().view(torch.uint8)  # bitsandbytes' quant_storage: the same bytes under another name
    numel = math.prod(shape)
    nblocks = -(-numel // blocksize)
    if packed.numel() != (numel + 1) // 2:
        raise AdapterFileError(f"{where}weight: {packed.numel()} bytes, {shape} in 4 bits needs {(numel + 1) // 2}")
    codes = need("weight.quant_map", torch.float32, 16)
    if not codes.is_meta and not torch.equal(codes.cpu(), table(QUANT_TYPES[quant_type])):
        raise AdapterFileError(f"{where}weight.quant_map is not the {quant_type} table")
    nested = "weight.nested_absmax" in state
    nested_blocksize = facts.get("nested_blocksize", 256)
    offset = facts.get("nested_offset", 0.0)
    if type(nested_blocksize) is not int or nested_blocksize < 1 or not isinstance(offset, (int, float)):
        raise AdapterFileError(f"{where}{texts[0]}: nested_blocksize {nested_blocksize}, nested_offset {offset}")
    return QuantWeight(
        packed=packed.detach().contiguous().view(-1, 1),
        absmax=need("weight.absmax", torch.uint8 if nested else torch.float32, nblocks),
        shape=tuple(shape), quant_type=quant_type, blocksize=blocksize, dtype=DTYPES[dtype],
        nested_absmax=need("weight.nested_absmax", torch.float32, -(-nblocks // nested_blocksize)) if nested else None,
        nested_code=need("weight.nested_quant_map", torch.float32, 256) if nested else None,
        nested_blocksize=nested_blocksize,
        offset=torch.tensor(float(offset), dtype=torch.float32, device=packed.device) if nested else None,
    )  # fmt: skip
