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
    import torch

    from peft_kernels import native_library

    found = native_library("cuda")
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "reason": found.reason,
        "built_with": found.built_with,
        "torch": torch.version.cuda,
        "gpus": [native_library("cuda", gpu=i).reason for i in gpus],
    }


def look_verdicts() -> Finding:
    """Verdicts on kernels that were checked on GPUs of this machine."""
    from peft_kernels import verdicts

    rows = verdicts.kept()
    refused = [row for row in rows if row["why"] is not None]
    return {"passed": len(rows) - len(refused), "refused": refused}


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
                key = f"{device} {str(dtype).removeprefix('torch.')}"
                found[op][key] = peft_kernels.explain(op, *dispatch.ops()[op].sample(dtype, device))
    return found


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
    "verdicts": look_verdicts,
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
