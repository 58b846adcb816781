"""bitsandbytes' kernel for evaluation on a CPU: which one its layers run here.

With the package `kernels` bitsandbytes downloads kernels-community/quantization-bitsandbytes and runs that; without it,
a slower one of its wheel. A copy that was built from that source takes their place where PEFT_KERNELS_BENCH_BNB_KERNEL
names it: the package `quantization_bitsandbytes` that a build makes, a folder that holds it, or its shared library. The
name of the folder around it is what results call it by. Training decodes the weight and knows none of them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

VARIABLE = "PEFT_KERNELS_BENCH_BNB_KERNEL"
PACKAGE = "quantization_bitsandbytes"
FROM_HUB = "quantization-bitsandbytes"


def load_built(path: Path) -> Callable[..., Any]:
    """`gemm_4bit_forward(x, packed, absmax, blocksize, quant_type)` of a built copy."""
    import torch

    if path.suffix == ".so" and path.is_file():
        torch.ops.load_library(path)
        return getattr(torch.ops, path.name.split(".")[0]).gemm_4bit_forward  # type: ignore[no-any-return]
    folder = path / PACKAGE if (path / PACKAGE).is_dir() else path
    spec = importlib.util.spec_from_file_location(PACKAGE, folder / "__init__.py")
    if spec is None or spec.loader is None or not (folder / "__init__.py").is_file():
        raise SystemExit(f"error: {VARIABLE} names a built {FROM_HUB}: expected a folder with {PACKAGE}, that package, "
                         f"or its .so, got {path}")  # fmt: skip
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return module.gemm_4bit_forward  # type: ignore[no-any-return]


def built_name(path: Path) -> str:
    """The name of the folder that holds the built package: no path of a machine gets into results."""
    inside = path.suffix == ".so" or path.name == PACKAGE
    outer = path.parent if inside else path
    return outer.parent.name if outer.name == PACKAGE else outer.name


@cache
def use_kernel() -> str | None:
    """Put the built copy, if one is named, in bitsandbytes' place. Its version and kernel; None where it is absent."""
    try:
        from bitsandbytes.backends.cpu import ops
        from bitsandbytes.functional import has_avx512bf16
    except ImportError:
        return None
    version, built = metadata.version("bitsandbytes"), os.environ.get(VARIABLE)
    if not has_avx512bf16():
        if built:
            raise SystemExit(f"error: {VARIABLE} is set; bitsandbytes has a kernel for evaluation only on CPUs with "
                             "AVX512-BF16, which this one lacks. Unset it.")  # fmt: skip
        return f"{version}, no kernel for evaluation on this CPU"
    if built:
        path = Path(built).resolve()
        ops.gemm_4bit_forward_kernel = load_built(path)
        return f"{version}, {FROM_HUB}, built from {built_name(path)}"
    if ops.gemm_4bit_forward_kernel is not None:
        return f"{version}, {FROM_HUB}, loaded by kernels {metadata.version('kernels')}"
    return f"{version}, the wheel's kernel"
