"""``fastpeft tune``: time the candidates of the Triton kernels for some layers, keep the fastest in a user table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from peft_kernels import tuning, tuning_launch, tuning_user

from ..training.errors import UserError
from .output import table

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Progress = Callable[[str, int, int], None]  # what, how many are done, of how many


@dataclass(frozen=True)
class Gpu:
    """Where kernels run. arch: the table in ``peft_kernels/tuned`` that serves it."""

    name: str
    arch: str
    device: torch.device


@dataclass(frozen=True)
class Layer:
    """A 4-bit linear layer [out_features, in_features] with LoRA, and the inputs that it gets."""

    out_features: int
    in_features: int
    r: int
    dtype: torch.dtype
    blocksize: int
    dropout: float


def find_gpu() -> Gpu:
    """The current CUDA device, if Triton can run there."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        raise UserError(
            f"tune measures kernels on an NVIDIA GPU, and torch {torch.__version__} (built with {built}) finds none",
            "run it on a machine with a GPU and torch's CUDA build; `fastpeft doctor` shows what is missing",
        )
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        reason = tuning_launch.unusable(device)
    except ImportError as error:
        raise UserError(
            f"tune measures Triton kernels, and Triton is missing: {error}", "pip install triton"
        ) from error
    if reason:
        raise UserError(f"tune measures Triton kernels, and here Triton {reason}", "see `fastpeft doctor`")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise UserError(f"the Triton kernels need compute capability 8.0, this GPU has {capability}", "")
    return Gpu(torch.cuda.get_device_name(device), tuning.arch_of(device), device)


def shapes_of_model(model: str) -> list[tuple[int, int]]:
    """(out_features, in_features) of a model's linear layers except its head, each shape once; loads no weights."""
    from ..training import models

    empty = models.empty_model(models.resolve(model), torch.bfloat16)
    head = empty.get_output_embeddings()
    return sorted(
        {(m.out_features, m.in_features) for m in empty.modules() if isinstance(m, torch.nn.Linear) and m is not head}
    )


def parse_shape(text: str) -> tuple[int, int]:
    """ "14336x4096" -> (14336, 4096): out_features x in_features."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise UserError(f"shape: expected OUTxIN, such as 14336x4096, got {text!r}", "")
    return int(found[1]), int(found[2])


def parse_rows(text: str) -> list[int]:
    """ "1,16,256" -> [1, 16, 256]."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise UserError(f"rows: expected numbers with commas between, such as 1,16,256, got {text!r}", "")
    return sorted({int(part) for part in text.split(",")})


def parse_dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(_DTYPES)}, got {name!r}", "use --dtype bf16")
    return _DTYPES[name]


def layers_of(
    shapes: Sequence[tuple[int, int]], r: int, dtype: torch.dtype, blocksize: int, dropout: float
) -> list[Layer]:
    """The layers to tune for; an error where there are none or where no 4-bit weight has such blocks."""
    if not shapes:
        raise UserError("tune needs layers: expected a model or --shape", "fastpeft tune --shape 14336x4096")
    if blocksize & (blocksize - 1) or not 32 <= blocksize <= 4096:
        raise UserError(f"blocksize: expected a power of two from 32 to 4096, got {blocksize}", "use --blocksize 64")
    return [Layer(n, k, r, dtype, blocksize, dropout) for n, k in dict.fromkeys(shapes)]


def run(
    layers: Sequence[Layer], rows: Iterable[int], gpu: Gpu, progress: Progress, clock: tuning.Clock | None = None
) -> dict[str, Any]:
    """Search every kernel of every layer and number of rows, and add what was found to the user table of ``gpu``.

    clock: seconds of a run, for tests; by default the GPU's own.
    """
    known = set(tuning.found())
    work = [(layer, m) for layer in layers for m in rows]
    with tuning.searching(clock=clock):
        for done, (layer, m) in enumerate(work):
            progress(f"{layer.out_features}x{layer.in_features}, {m} rows", done, len(work))
            tuning_launch.launch_lora_linear(
                m, layer.out_features, layer.in_features, layer.r, layer.dtype, layer.blocksize, layer.dropout,
                gpu.device,
            )  # fmt: skip
    progress("", len(work), len(work))
    results = []
    for (kernel, arch, shape), times in tuning.found().items():
        if (kernel, arch, shape) in known or arch != gpu.arch:
            continue
        seconds, config = min(times, key=lambda measured: measured[0])
        row = {"gpu": gpu.name, "kernel": kernel, **asdict(shape), **asdict(config)}
        results.append({**row, "microseconds": 1e6 * seconds, "microseconds_before": 1e6 * times[0][0]})
    path = tuning_user.path(gpu.arch)
    total = tuning_user.write(path, results) if results else len(tuning_user.read(path))
    return {"gpu": gpu.name, "arch": gpu.arch, "table": str(path), "rows_in_table": total, "measured": results}


def show(result: dict[str, Any]) -> None:
    columns = ("kernel", "rows", "out x in", "r", "tile", "warps", "stages", "us", "was")
    lines = [
        (
            row["kernel"], f"<= {row['M']}", f"{row['N']} x {row['K']}", f"<= {row['r']}",
            f"{row['BM']}, {row['BN']}, {row['BK']}", str(row["num_warps"]), str(row["num_stages"]),
            f"{row['microseconds']:.1f}", f"{row['microseconds_before']:.1f}",
        )
        for row in result["measured"]
    ]  # fmt: skip
    table(f"{result['gpu']} ({result['arch']}): the fastest of at most {tuning.MAX_CANDIDATES}", columns, lines)
    print(f"{result['table']}: {len(lines)} measured now, {result['rows_in_table']} in all")
