"""GGUF files made of tiny models, as llama.cpp's converter makes them: names, permuted rows of q and k, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

Types = Mapping[str, str] | str


def llama_rows(w: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows in llama.cpp's order: of each head's two halves one row of each in turn."""
    return w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(
    model: Any, path: Path, types: Types = "Q4_1", embedding: str = "Q8_0", tokenizer: Any = None,
    change: Callable[[dict[str, Any]], object] | None = None,
) -> Path:  # fmt: skip
    """A Llama as a GGUF file. types: of the linear layers, or by the ends of their names in the file. tokenizer: a
    byte-level one. change: is given the tensors by name, as (values, type), before they are written."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    arrays: dict[str, Any] = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        array = value.float().numpy()
        if "attn_q." in name or "attn_k." in name:
            heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
            array = llama_rows(array, heads)
        arrays[name] = array
    add_tensors(writer, arrays, types, embedding, change)
    return path


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """A byte-level tokenizer of `size` tokens."""
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    tokens += ["!!"] * (size - len(tokens))  # what the one merge makes
    special = set(tokenizer.all_special_tokens) | {t for t in tokens if t.startswith("<|")}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def add_tensors(
    writer: Any, arrays: Mapping[str, Any], types: Types, embedding: str,
    change: Callable[[dict[str, Any]], object] | None = None,
) -> None:  # fmt: skip
    """Tensors by their names in the file, matrices in their types; the file is whole then."""
    ends = types if isinstance(types, Mapping) else {"": types}
    tensors: dict[str, Any] = {}
    for name, array in arrays.items():
        quant = "F32"
        if array.ndim > 1:
            quant = embedding if name == "token_embd.weight" else next(q for e, q in ends.items() if e in name)
        tensors[name] = array, quant
    if change is not None:
        change(tensors)
    for name, (array, quant) in tensors.items():
        kind = gguf.GGMLQuantizationType[quant]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_gguf(path: Path, seed: int = 0, tie: bool = True, **options: Any) -> Path:
    """A random Llama of hidden size 32 with a byte-level tokenizer, as one file."""
    import transformers
    from fastpeft.apps.training.testing import make_byte_tokenizer

    tokenizer = make_byte_tokenizer()
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tie,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    return write_gguf(model, path, tokenizer=tokenizer, **options)
