"""The embedding of a model, and its output head, in 8 bits: GGUF's Q8_0, blocks of 32 with a scale each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight

from .nf4_linear import NF4Linear
from .quant_embedding import QuantEmbedding
from .quantize_plan import is_plain, is_quantisable
from .unsaved import refuse_saving

_QUANT, _BLOCK, _BYTES = "q8_0", 32, 34


def quantize_embeddings(model: Any) -> int:
    """Replace a model's token embedding, and its output head where that is dense, by layers in 8 bits, in place.

    A head that shares the embedding's table shares its bytes from then on. A head in 4 bits stays so. On the meta
    device the layers have no values. Returns the bytes of the dense tables. Afterwards `save_pretrained` is an error:
    no reader of folders knows such tables. Raises ValueError, with the model as it was, for a model without an
    embedding, tables of other classes, rows that are no whole blocks of 32, NaN and infinities.
    """
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    done = isinstance(words, QuantEmbedding)  # while it was read
    if not done and type(words) is not nn.Embedding and not hasattr(words, "embed_scale"):
        raise ValueError(f"quantize_embeddings: the embedding is a {type(words).__name__}, not a plain table")
    plain = () if done else (words,)
    holders = {name: m for name, m in model.named_modules(remove_duplicate=False)
               if m in plain or (m is head and is_plain(m)) or m._parameters.get("weight") is words.weight}  # fmt: skip
    for name, module in holders.items():
        _check(name, module)
    dense = {id(module.weight): module.weight for module in holders.values()}
    # all of them before the model changes
    made = {key: quantised_table(weight.detach()) for key, weight in dense.items()}
    for key, weight in made.items():
        put_table(model, [name for name, module in holders.items() if id(module.weight) == key], weight)
    refuse(model)
    return sum(weight.nbytes for weight in dense.values())


def finish_tables(model: Any) -> None:
    """`quantize_embeddings` of what reading left dense, where it did; `save_pretrained` is an error from then on."""
    if not isinstance(model.get_input_embeddings(), QuantEmbedding) or is_plain(model.get_output_embeddings()):
        quantize_embeddings(model)
    refuse(model)


def refuse(model: Any) -> None:
    """Make `save_pretrained` of a model with such tables an error."""
    refuse_saving(model, "a model with embeddings in 8 bits is not written as a folder: save adapters, or merge them "
                  "into the dense model")  # fmt: skip


def read_tables(model: Any, keys: Iterable[str]) -> dict[str, list[str]]:
    """Of a model on the meta device the names of the tables that can be quantised while `keys` are read from files: the
    key of each, and the modules that hold it. Not a tied one whose files have another of its names.

    What is left is for `quantize_embeddings`, once the model is read. Raises ValueError as it does."""
    words, head, found = model.get_input_embeddings(), model.get_output_embeddings(), {}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if module is not words and not (module is head and is_plain(module)):
            continue
        key, others = f"{name}.weight", [other for other, own in tied.items() if own == f"{name}.weight"]
        if key in tied or key not in keys or any(other in keys for other in others):
            continue
        names = [name, *(other.removesuffix(".weight") for other in others)]
        for held in names:
            _check(held, modules[held])
        found[key] = names
    return found


def put_table(model: Any, names: list[str], weight: QuantWeight) -> list[NF4Linear | QuantEmbedding]:
    """Put layers over one quantised table, of which there is one tensor, in the place of the dense ones of `names`."""
    made: list[NF4Linear | QuantEmbedding] = []
    for name in names:
        module = model.get_submodule(name)
        new = _layer(module, weight)
        if made:
            new._buffers["weight"] = made[0]._buffers["weight"]
        model.set_submodule(name, new.train(module.training))
        made.append(new)
    return made


def _check(name: str, module: Any) -> None:
    """Raise ValueError for what has no form in 8 bits."""
    table = isinstance(module, nn.Embedding) and module.max_norm is None
    if not table and not is_plain(module):
        raise ValueError(f"quantize_embeddings: {name}, a {type(module).__name__}, reads the table in its own way")
    weight = module.weight
    if weight.shape[-1] % _BLOCK:
        raise ValueError(f"quantize_embeddings: rows of {weight.shape[-1]} elements in {name} are no whole blocks of "
                         f"{_BLOCK}")  # fmt: skip
    if not weight.is_meta and not is_quantisable(weight.detach()):
        raise ValueError(f"quantize_embeddings: NaN, infinite or not float32/16 weights in {name}")


def quantised_table(dense: Tensor) -> QuantWeight:
    """A dense table [rows, width] in 8 bits; on the meta device without values."""
    if not dense.is_meta:
        return QuantWeight.quantize(dense, _QUANT)
    rows, width = dense.shape
    packed = dense.new_empty((rows, width // _BLOCK * _BYTES), dtype=torch.uint8)
    return QuantWeight.gguf(packed, _QUANT, (rows, width), dense.dtype)


def _layer(module: Any, weight: QuantWeight) -> NF4Linear | QuantEmbedding:
    if is_plain(module):
        return NF4Linear(weight, module.bias)
    scale = getattr(module, "scalar_embed_scale", None)
    if scale is None and (own := getattr(module, "embed_scale", None)) is not None:
        scale = float(own)
    return QuantEmbedding(weight, weight.dtype, module.padding_idx, scale)
