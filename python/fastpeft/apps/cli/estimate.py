"""The command `estimate`. Importing it is cheap: what it needs is imported when it runs."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Debug, Json, session, size, table

if TYPE_CHECKING:
    from ..training.config import TrainConfig

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def command(
    model: Annotated[str, typer.Argument(help="Folder, config.json, .gguf, Hub id or smollm2; only headers are read.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [key=value]...", help="Settings as of train; data is not needed.",
                       show_default=False),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="24GB|NAME", help="For a GPU of this memory, or l4, a100-80gb, h100, ...")
    ] = None,
    fit: Annotated[str | None, typer.Option(metavar="24GB", help="Find settings that fit into this memory.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimate memory and time of a training run from headers alone, and find settings that fit.

    Example: fastpeft estimate smollm2 method=dora max_length=2048 --fit 2GB
    """
    with session(as_json, debug) as out:
        result = estimate(_config(model, settings or []), gpu, fit)
        out.emit(result, lambda: show(result))


def parse_size(text: str) -> int:
    """Bytes of "24GB", "512MiB" or a plain number."""
    from ..training.errors import UserError

    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmg]i?|)b?\s*", text, re.IGNORECASE)
    try:
        return round(float(found[1]) * _UNITS[found[2].lower()]) if found else round(float(text))
    except (ValueError, OverflowError):
        raise UserError(f"expected a size as 24GB or 512MiB, got {text!r}", "write a number and a unit") from None


def _config(model: str, words: list[str]) -> TrainConfig:
    """The settings of a run of `model`: those of `fastpeft train`, without data."""
    from ..training.config import load_config

    path = words[0] if words and "=" not in words[0] else None
    given = words if path is None else words[1:]
    return load_config(path, [f"model={json.dumps(model)}", "data=-data-", *given])


def estimate(config: TrainConfig, gpu: str | None, fit: str | None) -> dict[str, Any]:
    """The estimate of a run on this CPU, or on a GPU by name or by its memory; with `fit`, of settings that fit."""
    from ..estimate import machines
    from ..estimate.fit import fitting
    from ..estimate.parts import estimate as of_run
    from ..estimate.process import process_bytes
    from ..estimate.shapes import configuration
    from ..training import models

    card = None if gpu is None else machines.card(gpu, parse_size)
    device = models.pick_device("cpu")
    dtype = models.pick_dtype(("bfloat16" if card else "auto") if config.dtype == "auto" else config.dtype, device)
    process = machines.CUDA_BYTES if card else process_bytes()
    base = configuration(config.model)
    changed: dict[str, Any] = {}
    if fit is not None:
        config, changed, found = fitting(config, base, dtype, process, parse_size(fit), card is not None)
    else:
        found = of_run(config, base, dtype, process, on_gpu=card is not None)
    result: dict[str, Any] = {"model": config.model, "quantize": config.quantize, "method": config.method, **found}
    if fit is not None:
        words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]
        train = " ".join(["fastpeft train", f"model={config.model}", "data=...", *words])
        result["fit"] = {"bytes": parse_size(fit), "settings": changed, "command": train}
    if card is not None:
        result["gpu"] = {"name": card.name, "memory_bytes": card.memory, "fits": found["peak_bytes"] <= card.memory}
    result["step_seconds"] = machines.step_seconds(found, card, dtype)
    return result


def show(result: dict[str, Any]) -> None:
    from ..training.metrics import duration

    share = 100 * result["trainable_parameters"] / result["parameters"]
    where = result["gpu"]["name"] if "gpu" in result else "this CPU"
    rows = [
        ("model", f"{result['model']}, {result['quantize']}, computing in {result['dtype']} on {where}"),
        ("parameters", f"{result['parameters']:,}"),
        ("trainable", f"{result['trainable_parameters']:,} ({share:.2f} %), {result['method']}"),
        ("tokens a step", f"{result['tokens_per_step']:,}"),
        *((f"memory: {name}", size(count)) for name, count in result["memory_bytes"].items()),
        *((f"kept for the backward pass, {name}", size(count)) for name, count in result["kept_bytes"].items()),
        ("memory: peak of loading", size(result["loading_peak_bytes"])),
        ("memory: peak of a step", size(result["step_peak_bytes"])),
        ("memory: estimate", size(result["peak_bytes"])),
    ]
    seconds = result["step_seconds"]
    if seconds["at_least"] is not None:
        work = f"{result['step_flops'] / 1e12:.2f} TFLOP at {seconds['gflops']:.0f} GFLOP/s, {seconds['how']}"
        rows.append(("time of a step", f"at least {duration(seconds['at_least'])} ({work})"))
    if "gpu" in result:
        fits = "yes" if result["gpu"]["fits"] else "no"
        rows.append(("fits", f"{fits}: it has {size(result['gpu']['memory_bytes'])}"))
    table("Estimate (nothing was loaded)", ("what", "value"), rows)
    if "fit" in result:
        print(f"fits {size(result['fit']['bytes'])}:\n  {result['fit']['command']}")
