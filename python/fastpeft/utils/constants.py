"""`peft.utils.constants`: names of files and of modules, and the default targets of each method by model type."""

from typing import Any

import torch

from ..config import CONFIG_NAME
from ..folder import PICKLE_NAME as WEIGHTS_NAME
from ..folder import SAFETENSORS_NAME as SAFETENSORS_WEIGHTS_NAME
from ..inject import SEQ_CLS_HEADS
from ..method import registry
from ..methods.ia3 import FEEDFORWARD
from ..targets import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND

ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = list(SEQ_CLS_HEADS)
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = {name: list(inner) for name, inner in FEEDFORWARD.items()}

__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "TOKENIZER_CONFIG_NAME",
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    "WEIGHTS_NAME",
]


def __getattr__(name: str) -> Any:
    """`TRANSFORMERS_MODELS_TO_<METHOD>_TARGET_MODULES_MAPPING`: a method's default targets by model type."""
    start, end = "TRANSFORMERS_MODELS_TO_", "_TARGET_MODULES_MAPPING"
    if name.startswith(start) and name.endswith(end):
        wanted = name.removeprefix(start).removesuffix(end)
        for kind, method in registry().items():
            if kind.value.replace("_", "") == wanted:
                return dict(method.default_targets)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
