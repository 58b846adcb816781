"""The command `serve`. Importing it is cheap: what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..serve.limits import BodyLimits, ConnectionLimits, Limits
from .output import Cached, Debug, Json, session

_LIMITS, _BODIES, _CONNECTIONS = Limits(), BodyLimits(), ConnectionLimits()


def command(
    model: Annotated[str, typer.Argument(help="Folder, Hub id, .gguf or smollm2.")],
    adapters: Annotated[Path | None, typer.Option(help="Folder of adapter folders, asked for by name.")] = None,
    nf4: Annotated[bool, typer.Option("--nf4", help="Quantise the base to 4 bits.")] = False,
    cache_quantized: Cached = False,
    quantize_embeddings: Annotated[
        bool, typer.Option("--quantize-embeddings", help="With --nf4: embedding and head in 8 bits.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is reached from here alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="The base's name; default: MODEL.")] = None,
    max_resident: Annotated[int, typer.Option(min=1, help="Adapters in memory at a time.")] = 32,
    max_rank: Annotated[int | None, typer.Option(min=1, help="Largest rank served; default: the folder's.")] = None,
    max_virtual_tokens: Annotated[
        int | None, typer.Option(min=0, help="Longest prompt served; default: the folder's, 0: no prompts.")
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Layers adapters may act on; default: as the folder's do.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and answer together.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests computed at once.")] = _LIMITS.max_batch,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait beside them; above: 429.")] = (
        _LIMITS.max_queue
    ),
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one forward.")] = _LIMITS.batch_tokens,
    cache_tokens: Annotated[int | None, typer.Option(min=2, help="Tokens the key-value cache holds.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request; above: 504.")] = _LIMITS.timeout,
    max_connections: Annotated[
        int | None, typer.Option(min=1, help="Connections at once; above: idle ones are closed, or 503. "
                                 "Default: as many as `ulimit -n` has room for, at most 1024.")
    ] = None,
    max_client_connections: Annotated[
        int | None, typer.Option(min=1, help="Of them, from one address; above: 429. Default: all.")
    ] = None,
    header_bytes: Annotated[int, typer.Option(min=1024, help="Bytes of a request's header; above: 431, 414.")] = (
        _CONNECTIONS.header_bytes
    ),
    header_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a request's header is whole; above: 408.")
    ] = _CONNECTIONS.header_timeout,
    body_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until its body is whole; above: 408.")] = (
        _BODIES.body_timeout
    ),
    idle_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds a connection stays without a request, or with an answer not read.")
    ] = _CONNECTIONS.idle_timeout,
    max_body: Annotated[float, typer.Option(min=0.001, help="MiB of a body; above: 413.")] = _BODIES.max_body,
    body_memory: Annotated[
        float, typer.Option(min=0.001, help="MiB of all bodies that are not decoded yet; above: 503.")
    ] = _BODIES.body_memory,
    client_memory: Annotated[
        float, typer.Option(min=0.001, help="Of them, one client's; above: 429.")
    ] = _BODIES.client_memory,
    grace: Annotated[int, typer.Option(min=0, help="Seconds for open requests after SIGTERM, SIGINT or SIGHUP.")] = 30,
    rescan: Annotated[float, typer.Option(min=0.1, help="Seconds between looks at the folder.")] = 10.0,
    allow_runtime_adapters: Annotated[
        bool, typer.Option("--allow-runtime-adapters", help="Requests may load and unload adapters of the folder.")
    ] = False,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line on stderr for each request.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")] = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer OpenAI's API over HTTP with a model and a folder of adapters, all of them in one batch.

    Example: fastpeft serve smollm2 --adapters runs/adapters
    """
    with session(as_json, debug) as out:
        import sys

        from ..serve.run import Options, serve

        limits = Limits(max_batch=max_batch, max_queue=max_queue, batch_tokens=batch_tokens, timeout=timeout)
        bodies = BodyLimits(max_body, body_timeout, body_memory, client_memory)
        connections = ConnectionLimits(
            max_connections, max_client_connections, header_bytes, header_timeout, idle_timeout
        )
        options = Options(
            model, adapters, nf4, served_model_name, dtype, device, host, port, max_resident, max_rank,
            max_virtual_tokens, target_modules.split(",") if target_modules else None, max_length, cache_tokens,
            limits, bodies, connections, grace, rescan, allow_runtime_adapters, access_log,
            cache_quantized, quantize_embeddings,
        )  # fmt: skip

        def human(ready: dict[str, Any]) -> None:
            print(f"{ready['base']}\n{ready['url']}/v1 answers as {ready['model']!r}", end="", flush=True)
            print(f" and {ready['adapters']} adapters" if adapters is not None else "", flush=True)

        serve(
            options,
            lambda line: print(line, file=sys.stderr, flush=True),
            lambda ready: out.emit(ready, lambda: human(ready)),
        )
