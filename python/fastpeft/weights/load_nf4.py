"""Loading folders that hold a 4-bit model, without its dense weights and without bitsandbytes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files.checks import AdapterFileError, list_some, mismatch, path_inside, read_json
from ..files.safetensors import Header, map_tensors, read_tensors
from ..files.shards import check_index, read_shards, weight_map
from .bnb_keys import DTYPES
from .nf4_experts import NF4Parameter, dense_parameters, pack, packed_parameters
from .nf4_linear import NF4Linear
from .quantize import mark_quantized
from .quantize_tables import finish_tables


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside get their parameters without storage; buffers (rotary tables) are made as usual."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_nf4_model(
    directory: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | None = None, auto_class: Any = None, mapped: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Load a folder with a 4-bit model, saved by transformers with bitsandbytes or by us, into `NF4Linear` layers.

    bitsandbytes is not needed, and the dense weights never exist. dtype: of the layers that are not quantised (default:
    the configuration's). compute_dtype: as in `NF4Linear`. auto_class: `transformers.AutoModelForCausalLM` by default.
    mapped: the weights stay in their files, mapped into memory (`map_tensors`): a model larger than memory opens, and
    none is read before it is used. options: further ones of `from_config`, such as attn_implementation.
    Every header is read and checked against the model before a tensor is. No code from the folder runs. Raises
    AdapterFileError when the folder holds no 4-bit weights or does not fit its configuration.
    """
    import transformers

    root = Path(directory)
    settings = read_json(root / "config.json")
    quantization = settings.get("quantization_config") or {}
    if not isinstance(quantization, dict) or not quantization.get("load_in_4bit"):
        raise AdapterFileError(f"{root}: its config.json has no quantization_config with load_in_4bit")
    config: Any = transformers.AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    vars(config).pop("quantization_config", None)
    dtype = dtype or config.dtype or torch.float32
    auto_class = auto_class or transformers.AutoModelForCausalLM
    with parameters_on_meta():
        model = auto_class.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    index = weight_map(root)
    headers = read_shards(path_inside(root, file) for file in sorted({*index.values()} or {"model.safetensors"}))
    check_index(headers, index)
    if _has_tables(model, headers):
        finish_tables(model)
    kept, quant_type, nested = _swap(model, headers, dtype, compute_dtype)
    _check(model, headers, root)
    _fill(model, headers, dtype, mapped)
    model.tie_weights()
    if left := [name for name, p in model.named_parameters() if p.is_meta]:
        raise AdapterFileError(f"{root}: no tensor for {list_some(left)}")
    if (root / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        model.generation_config = transformers.GenerationConfig.from_pretrained(root)
    saved_dtype = DTYPES.get(str(quantization.get("bnb_4bit_compute_dtype")))
    experts = bool(packed_parameters(model))
    mark_quantized(model, quant_type, nested, compute_dtype or saved_dtype, kept, experts)
    return model.to(device).eval()


def _swap(
    model: nn.Module, headers: list[Header], dtype: torch.dtype, compute_dtype: torch.dtype | None
) -> tuple[list[str], str, bool]:
    """Put an empty NF4Linear wherever the files hold a 4-bit weight; return what stays dense, the type, and nested."""
    names = {key for header in headers for key in header.tensors}
    split = (key.partition(".quant_state.bitsandbytes__") for key in names)
    types = {weight: quant_type for weight, mark, quant_type in split if mark}
    if not types:
        raise AdapterFileError("the folder holds no 4-bit weights of bitsandbytes' format")
    for weight, quant_type in types.items():
        name, _, parameter = weight.rpartition(".")
        try:
            old: Any = model.get_submodule(name)
        except AttributeError:
            raise AdapterFileError(f"the files hold a 4-bit weight for {name}, which the model does not have") from None
        nested = f"{weight}.nested_absmax" in names
        if parameter in dense_parameters(old):
            pack(old, parameter, quant_type, 64, nested)  # its block size, as the others', is in the file's data
            continue
        if parameter != "weight":
            what = f"a {type(old).__name__} has no such experts"
            raise AdapterFileError(f"the files hold a 4-bit weight {weight}: {what}")
        if type(old) is not nn.Linear and type(old).__name__ != "Conv1D":
            raise AdapterFileError(f"the files hold a 4-bit weight for {name}, a {type(old).__name__} in the model")
        out_features, in_features = old.weight.shape if type(old) is nn.Linear else reversed(old.weight.shape)
        # The block size is in the file's data; the layer is given its buffers when that is read.
        new = NF4Linear.empty(
            in_features, out_features, old.bias is not None, quant_type, nested=nested,
            compute_dtype=compute_dtype, dtype=dtype,
        )  # fmt: skip
        model.set_submodule(name, new)
    kept = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    first = next(iter(types))
    return kept, types[first], any(f"{weight}.nested_absmax" in names for weight in types)


def _has_tables(model: Any, headers: list[Header]) -> bool:
    """True where the files hold the embedding in 8 bits, as `load_cached_model` keeps it."""
    found = {key: info.dtype for header in headers for key, info in header.tensors.items()}
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    held = [name for name in tables if found.get(f"{name}.weight") is torch.uint8]
    return bool(held) and model.get_submodule(held[0]) is model.get_input_embeddings()


def _fill(model: nn.Module, headers: list[Header], dtype: torch.dtype, mapped: bool) -> None:
    owner = {key: header for header in headers for key in header.tensors}
    views = {key: tensor for header in headers for key, tensor in map_tensors(header).items()} if mapped else None

    def read(keys: list[str]) -> dict[str, torch.Tensor]:
        if views is not None:
            return {key: views[key] for key in keys}
        return {key: read_tensors(owner[key], [key])[key] for key in keys}

    packed: dict[str, list[str]] = {name: [] for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    experts = packed_parameters(model)
    parts_of: dict[str, list[str]] = {path: [] for path in experts}
    plain: list[str] = []
    for key in owner:
        name, mark, _ = key.partition(".weight")
        path = _path_of(key, experts)
        (parts_of[path] if path else packed[name] if mark and name in packed else plain).append(key)
    for header in headers:
        state = read([key for key in plain if owner[key] is header])
        cast = {key: v.to(dtype) if v.is_floating_point() else v for key, v in state.items()}
        model.load_state_dict(cast, strict=False, assign=True)
    # A layer's parts may lie in two shards.
    for name, keys in packed.items():
        if not keys:  # a head over the embedding's bytes: tied
            continue
        layer: Any = model.get_submodule(name)
        bias = layer._parameters.get("bias")
        parts = {key.removeprefix(name + "."): part for key, part in read(keys).items()}
        layer.load_state_dict(parts | ({} if bias is None else {"bias": bias.detach()}), assign=True)
        weight = layer.quant_weight()
        if weight.absmax is not None:  # of others all blocks would be read; they are our own, of checked weights
            try:
                weight.check_values(f"{owner[keys[0]].path}: {name}")
            except ValueError as error:
                raise AdapterFileError(str(error)) from None
    for path, keys in parts_of.items():
        state = {"weight" + key.removeprefix(path): part for key, part in read(keys).items()}
        experts[path].load(state, path, assign=True)


def _path_of(key: str, experts: Mapping[str, NF4Parameter]) -> str | None:
    """The parameter in 4 bits that a file's tensor belongs to: its bytes, or what lies beside them."""
    above, _, last = key.rpartition(".")
    above = above.removesuffix(".quant_state")
    return key if key in experts else above if last and above in experts else None


def _check(model: nn.Module, headers: list[Header], root: Path) -> None:
    expected = model.state_dict()
    found = {name: info for header in headers for name, info in header.tensors.items()}
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    extra = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found and name not in tied]
    if extra or missing:
        keys = f"missing {list_some(missing) or 'nothing'}; unexpected {list_some(extra) or 'nothing'}"
        raise AdapterFileError(f"{root} does not fit its configuration: {keys}")
    experts = packed_parameters(model)
    for name, info in found.items():
        # Of a 4-bit weight's parts only the bytes have a size that the configuration fixes. They may be stored under
        # another dtype, and then have another shape.
        want, same_bytes = expected[name], info.nbytes == expected[name].nbytes and info.dtype != expected[name].dtype
        beside = ".weight." in name or _path_of(name, experts) not in (None, name)
        if not beside and info.shape != want.shape and not same_bytes:
            raise AdapterFileError(f"{root}: size mismatch for {mismatch(name, info.shape, want.shape)}")
