"""The command `export`. Importing it is cheap: what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Debug, Json, session, size


def command(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="File to write.")],
    gguf_lora: Annotated[bool, typer.Option("--gguf-lora", help="As a LoRA that llama.cpp applies.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Base, of which headers are read: .gguf, folder, Hub id; default: its own.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter in another program's form.

    Example: fastpeft export --gguf-lora runs/mine/adapter mine.gguf
    """
    with session(as_json, debug) as out:
        result = export(adapter, output, gguf_lora, model)
        out.emit(result, lambda: print(f"{result['output']}: {len(result['tensors']) // 2} layers, r={result['r']}, "
                                       f"alpha={result['alpha']:g}, {result['architecture']}, {size(result['bytes'])}"
                                       ))  # fmt: skip


def export(adapter: Path, output: Path, gguf_lora: bool, model: str | None) -> dict[str, Any]:
    """Write `output` and say what is in it."""
    from ... import export_gguf_lora
    from ..training import models
    from ..training.errors import UserError
    from ..training.gguf_base import names_gguf
    from ..training.inference import adapter_note, base_of

    if not gguf_lora:
        raise UserError("no form is given", "use --gguf-lora")
    if not adapter.is_dir():
        raise UserError(f"{adapter} is not a folder", "give the folder of an adapter")
    if output.exists():
        raise UserError(f"{output} exists", "choose another output")
    base = model or base_of(str(adapter), adapter_note(str(adapter)))
    source = models.resolve(base, "gguf" if names_gguf(base) else "none")
    with models.quiet_transformers():
        made = export_gguf_lora(str(adapter), source.location, output)
    return {"output": str(output), "base": source.note, "adapter": str(adapter), **made,
            "bytes": output.stat().st_size}  # fmt: skip
