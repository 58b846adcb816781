"""Looks at one thing after the other and prints what it finds; run by ``doctor`` in a process of its own.

A broken library can end the process (an illegal instruction, a failing loader), so the doctor must not import it: it
starts this file by its path, reads a line of JSON before and after each look, and blames what had begun when it died.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Finding = dict[str, Any]


def look_torch() -> Finding:
    import torch

    found: Finding = {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "parallel": torch.__config__.parallel_info().splitlines()[:2],
        "product": float((torch.ones(4, 4) @ torch.ones(4, 4)).sum()),
        "gpus": [],
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found["gpus"].append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    return found


def look_peft_kernels() -> Finding:
    import peft_kernels
    from peft_kernels import dispatch

    return {"version": peft_kernels.__version__, "ops": sorted(dispatch.ops())}


def look_native_cpu() -> Finding:
    from peft_kernels import native_library

    found = native_library("cpu")
    if found.reason is not None:
        return {"reason": found.reason}
    return {"level": found.level, "levels": list(found.levels), "openmp": found.openmp}


def look_native_cuda() -> Finding:
    from peft_kernels import native_library

    return {"reason": native_library("cuda").reason}


def look_triton() -> Finding:
    import triton

    return {"version": triton.__version__}


def look_transformers() -> Finding:
    import transformers

    found: Finding = {"version": transformers.__version__}
    try:
        from transformers.integrations import peft as integration

        found["needs_peft"] = getattr(integration, "MIN_PEFT_VERSION", None)
    except ImportError as error:
        found["integration"] = str(error)
    return found


def look_peft() -> Finding:
    import peft

    return {"version": peft.__version__}


def look_fastpeft() -> Finding:
    import fastpeft

    return {"names": [name for name in ("get_peft_model", "LoraConfig", "PeftModel") if hasattr(fastpeft, name)]}


def look_bitsandbytes() -> Finding:
    import bitsandbytes

    return {"version": bitsandbytes.__version__}


def look_backends() -> Finding:
    """Which backend serves which op, on every type of device that is there."""
    import torch

    import peft_kernels
    from peft_kernels import dispatch

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    found: Finding = {}
    for op in sorted(dispatch.ops()):
        found[op] = {}
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16):
                arguments = _arguments(op, device, dtype)
                key = f"{device} {str(dtype).removeprefix('torch.')}"
                if arguments is None:
                    found[op][key] = {"unknown": "no sample call is known here"}
                else:
                    found[op][key] = peft_kernels.explain(op, *arguments)
    return found


def _arguments(op: str, device: str, dtype: Any) -> tuple[Any, ...] | None:
    """A small call of the op as training makes it: NF4, blocks of 64, nested scales, rank 16."""
    import torch

    import peft_kernels

    w = torch.ones(64, 128, device=device)
    if op == "quantize_4bit":
        return (w.to(dtype), 1, 64, True, 256)
    with peft_kernels.use_backend("reference"):
        weight = peft_kernels.quantize_4bit(w, "nf4", nested=True).flatten()
    if op == "dequantize_4bit":
        return (*weight, [64, 128], dtype)
    x, a, b = (
        torch.ones(8, 128, device=device, dtype=dtype),
        torch.ones(16, 128, device=device),
        torch.ones(64, 16, device=device),
    )
    dy, s = torch.ones(8, 64, device=device, dtype=dtype), torch.ones(8, 16, device=device)
    gain, norm_weight = torch.ones(64, device=device), torch.ones(128, device=device, dtype=dtype)
    parts = [[part] for part in weight]
    turns, columns = torch.ones(1, 32, 4, 4, device=device), torch.ones(128, device=device)
    head, angles = x.view(1, 8, 4, 32), x[None, :, :32]
    rows = torch.zeros(8, device=device, dtype=torch.int64)
    several = (rows, rows[:1], rows[:1] + 16, torch.ones(1, device=device), 16)
    calls: dict[str, tuple[Any, ...]] = {
        "lora_linear": (x, *weight, 64, a, b, 1.0, None, 0.0, None),
        "lora_linear_backward": (dy, x, *weight, a, b, s, 1.0, 0.0, None, True, True),
        "lora_linear_stacked": (x, *parts, [64], [a], [b], [1.0], [None], [0.0], [None]),
        "lora_linear_stacked_backward": (x, [dy], *parts, [a], [b], [s], [1.0], [0.0], [None], True, [True]),
        "multi_lora_linear": (x, *weight, 64, a, b.t(), *several, None, 0.0, None),
        "multi_lora_linear_backward": (dy, x, *weight, a, b.t(), s, *several, 0.0, None, True, True),
        "dora_linear": (x, *weight, 64, a, b, gain, 1.0, None, 0.0, None, True),
        "dora_linear_normed": (x, *weight, 64, a, b, gain, 1.0, None, 0.0, None, True),
        "dora_linear_backward": (dy, x, *weight, a, b, gain, dy, s, 1.0, 0.0, None, True, True, True),
        "squared_row_norms": (*weight, 64, 128),
        "dora_norm": (*weight, a, b, 1.0, None),
        "butterfly_linear": (x, turns, *weight, 64, gain, None, True),
        "butterfly_linear_backward": (dy, x, turns, *weight, gain, dy, True, True, True),
        "butterfly_rotate": (x, turns, False),
        "butterfly_rotate_backward": (x, x, turns, False, True, True),
        "cayley": (turns[0] - 1, 0),
        "cayley_backward": (turns[0], turns[0] - 1, turns[0], 0),
        "householder_rotate": (x, a, a),
        "householder_rotate_backward": (x, x, a, a, s, True, True),
        "pair_rotate": (x, columns, columns, 32),
        "pair_rotate_backward": (x, x, columns, columns, 32, True, True),
        "rotary_attention": (*[head] * 3, angles, angles, None, 1.0),
        "rotary_attention_backward": (*[head] * 4, angles, angles, None, dy.float()[None, :4, :8], 1.0),
        "rms_norm": (x, norm_weight, 1e-5),
        "rms_norm_backward": (x, x, norm_weight, 1e-5),
        "swiglu": (x, x),
        "swiglu_backward": (x, x, x),
    }
    return calls.get(op)


LOOKS: dict[str, Callable[[], Finding]] = {
    "torch": look_torch,
    "peft_kernels": look_peft_kernels,
    "native_cpu": look_native_cpu,
    "native_cuda": look_native_cuda,
    "triton": look_triton,
    "transformers": look_transformers,
    "fastpeft": look_fastpeft,
    "bitsandbytes": look_bitsandbytes,
    "backends": look_backends,
}


def main(names: list[str]) -> None:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print must not mix with the findings

    def tell(line: dict[str, Any]) -> None:
        channel.write(json.dumps(line) + "\n")
        channel.flush()

    for name in names:
        tell({"begin": name})
        try:
            tell({"name": name, "found": LOOKS[name]()})
        except BaseException as error:  # whatever a broken package raises is the finding
            text = " ".join(str(error).split())[:500]
            absent = isinstance(error, ModuleNotFoundError) and error.name == name
            tell({"name": name, "error": f"{type(error).__name__}: {text}", "absent": absent})


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are not top-level ones
    main(sys.argv[1:])
