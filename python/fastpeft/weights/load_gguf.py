"""Models of GGUF files, as they lie: linear layers and embeddings over the file's blocks, nothing converted."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..files.checks import list_some
from ..files.gguf_file import GGUFFile, read_gguf
from .gguf_experts import fill_experts
from .gguf_layers import Naming, blocks, check_places, dense
from .gguf_names import empty_model
from .nf4_linear import NF4Linear
from .quant_embedding import QuantEmbedding
from .quantize_plan import is_conv1d, is_plain
from .unsaved import refuse_saving


def load_gguf_model(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
    auto_class: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """A GGUF file's model whose linear layers and embeddings hold the file's blocks, mapped into memory.

    dtype: of what the file has in floats (norms, biases), float32 by default. device: "meta" gives the layers without
    their values. auto_class: `transformers.AutoModelForCausalLM` by default; options: further ones of `from_config`.
    transformers gives the configuration, the names of tensors, and what its reader does to their values; rows of q and
    k, which llama.cpp keeps in another order for the llama family, are copies of the file's bytes in transformers'
    order. Nobody should write into the file while its model is open. Raises AdapterFileError for a file that is broken
    or does not fit, and GGUFPackageError without the package gguf.
    """
    file = read_gguf(path)
    dtype = dtype or torch.float32
    model = empty_model(file, auto_class, dtype, **options)
    naming = Naming.of(file, model)
    check_places(file, naming)
    _fill(model, file, naming, dtype, torch.device(device).type == "meta")
    file.check_unchanged()
    model.requires_grad_(False)
    model.name_or_path = model.config._name_or_path = str(path)
    _tie(model)
    why = f"a model over the blocks of {model.name_or_path} is not written as a folder: keep the file and save adapters"
    refuse_saving(model, why + ", or load a dense model by transformers' from_pretrained(folder, gguf_file=name)")
    return _shared(model.to(device).eval())


def _fill(model: nn.Module, file: GGUFFile, naming: Naming, dtype: torch.dtype, empty: bool) -> None:
    """Put a file's tensors into the model, on the meta device where it is to be `empty`."""
    given: set[str] = set()
    filled: dict[str, Tensor] = {}
    for name in file.tensors:
        key = naming.names.get(name)
        if key is None:
            continue
        path, _, parameter = key.rpartition(".")
        module: Any = model.get_submodule(path)
        own = module._parameters.get(parameter)
        if own is None:
            raise file.wrong(f"the model has no {key}")
        shape = tuple(own.shape)
        held = _holder(module) if parameter == "weight" else None
        if held is not None:
            weight = blocks(file, naming, name, shape[::-1] if is_conv1d(module) else shape, dtype, empty)
            if weight is not None:
                model.set_submodule(path, held(weight, module, dtype))
                given.add(key)
                continue
        given.add(key)
        if empty:
            continue
        value = dense(file, naming, name, shape, dtype)
        if value is not None:
            filled[key] = value
    for key, value in {**filled, **naming.found}.items():
        path, _, parameter = key.rpartition(".")
        module = model.get_submodule(path)
        module._parameters[parameter] = nn.Parameter(value.to(dtype), requires_grad=False)
        given.add(key)
    for one in naming.experts:
        fill_experts(model, file, one, dtype, empty)
        given.add(one.key)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if left := [name for name, p in model.named_parameters() if p.is_meta and name not in given and name not in tied]:
        raise file.wrong(f"it has no tensor for {list_some(left)}")


def _holder(module: nn.Module) -> Any:
    """A function that makes the layer over blocks in the place of this one; None where there is none."""
    if is_plain(module) or is_conv1d(module):
        return _linear
    return _embedding if isinstance(module, nn.Embedding) and module.max_norm is None else None


def _linear(weight: Any, old: Any, dtype: torch.dtype) -> NF4Linear:
    new = NF4Linear(weight, None)
    if old.bias is not None:  # on the meta device until the file's is read
        new.bias = nn.Parameter(old.bias.detach(), requires_grad=False)
    return new


def _embedding(weight: Any, old: Any, dtype: torch.dtype) -> QuantEmbedding:
    scale = getattr(old, "scalar_embed_scale", None)
    if scale is None and (own := getattr(old, "embed_scale", None)) is not None:
        scale = float(own)
    return QuantEmbedding(weight, dtype, old.padding_idx, scale)


def _tie(model: Any) -> None:
    """The head of a model whose configuration ties it to the embedding becomes a layer over the same blocks."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(words, QuantEmbedding):
        model.tie_weights()
    elif isinstance(head, nn.Linear) and getattr(model.config, "tie_word_embeddings", False):
        name = next(name for name, module in model.named_modules() if module is head)
        model.set_submodule(name, _linear(words.quant_weight(), head, words.out_dtype))


def _shared(model: Any) -> Any:
    """The same model, after a move that made two of what an embedding and its head share."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and isinstance(words, QuantEmbedding) and isinstance(head, NF4Linear):
        head._buffers["weight"] = words._buffers["weight"]
    return model
