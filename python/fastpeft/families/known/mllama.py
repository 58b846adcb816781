"""Llama 3.2 Vision, the language part: some layers attend to an image, by their own code around our attention."""

from ..description import Attention, Mlp, Norm, Together, family

PARTS = family(
    "MllamaText", None, Mlp(), Norm(), MllamaTextSelfAttention=Attention(dropout="dropout"),
    MllamaTextCrossAttention=Together(),
)  # fmt: skip
