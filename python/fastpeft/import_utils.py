"""`peft.import_utils`: which optional packages are there. Nothing is imported to answer."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata, util
from typing import Any

import torch

_PACKAGES = {
    "aqlm": "aqlm", "bnb": "bitsandbytes", "bnb_4bit": "bitsandbytes", "diffusers": "diffusers", "eetq": "eetq",
    "gptqmodel": "gptqmodel", "hqq": "hqq", "inc": "neural_compressor", "optimum": "optimum",
    "te": "transformer_engine", "te_pytorch": "transformer_engine_torch", "torchao": "torchao",
}  # fmt: skip


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch has an XPU; check_device: and can reach one."""
    if not check_device or not torch.xpu.is_available():
        return torch.xpu.is_available()
    try:
        torch.empty(0, device="xpu")
    except RuntimeError:
        return False
    return True


def _available(package: str) -> Callable[[], bool]:
    def is_available() -> bool:
        return util.find_spec(package) is not None

    is_available.__doc__ = f"Whether {package} is installed."
    return is_available


def _at_least(version: str, wanted: list[int]) -> bool:
    return [int(part) for part in version.split(".")[: len(wanted)]] >= wanted


def __getattr__(name: str) -> Any:
    """`is_<package>_available()`, and `is_transformers_ge_v5_4_0` and the like as PEFT's module has them."""
    if name.startswith("is_transformers_ge_v"):
        wanted = [int(part) for part in name.removeprefix("is_transformers_ge_v").split("_")]
        return _at_least(metadata.version("transformers"), wanted)
    package = _PACKAGES.get(name.removeprefix("is_").removesuffix("_available"))
    if package is None or name != f"is_{name[3:-10]}_available":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _available(package)
