"""An embedding whose table is quantised: rows are decoded when they are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels import QuantWeight, dequantize_4bit

from .nf4_store import NF4Store


class QuantEmbedding(NF4Store):
    """A frozen embedding over a `QuantWeight` of any format whose blocks lie in rows: ids [...] to vectors [..., dim].

    dtype: of the vectors. scale: that they are multiplied by (Gemma's embed_scale), None for none. A tied head is an
    `NF4Linear` over the same weight.
    """

    def __init__(
        self, weight: QuantWeight, dtype: torch.dtype, padding_idx: int | None = None, scale: float | None = None
    ) -> None:
        super().__init__()
        self.out_dtype, self.padding_idx, self.scale = dtype, padding_idx, scale
        self.set_quant_weight(weight)

    def set_quant_weight(self, weight: QuantWeight) -> None:
        if len(weight.shape) != 2:
            raise ValueError(f"QuantEmbedding needs a table of shape (tokens, dim), got {weight.shape}")
        super().set_quant_weight(weight)
        self.num_embeddings, self.embedding_dim = self.shape

    def forward(self, input: Tensor) -> Tensor:
        ids = input.reshape(-1)
        some = self.quant_weight().take(ids)
        if some is None:
            raise ValueError(f"QuantEmbedding: blocks of {self.quant_type} straddle the rows of {self.shape}")
        rows = dequantize_4bit(some, self.out_dtype).view(*input.shape, self.embedding_dim)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.quant_type}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.save_parts(destination, prefix)
