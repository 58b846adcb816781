"""`fastpeft serve` as a Ray Serve application: replicas on the machines of a cluster behind Ray's HTTP proxy.

`app` is an application builder: `serve run fastpeft.apps.serve.ray_deployment:app model=smollm2 adapters=FOLDER`, or
`import_path` and `args` in a config file (docs/clusters.md). Each replica is a whole server, engine and adapters.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError
from ray import serve

from ..training.errors import UserError
from .limits import BodyLimits, Limits
from .run import Options, load

logger = logging.getLogger("fastpeft.apps.serve")

# Ray's: the address, connections, the end, the log of requests. And an adapter that a request loads would be in one
# replica alone.
_RAYS_OWN = {"host", "port", "connections", "grace", "access_log", "by_request"}
_NESTED: dict[str, Any] = {"limits": Limits, "bodies": BodyLimits}  # fields of `Options` that are given by their fields


def read_options(given: dict[str, Any]) -> Options:
    """`args` of the application: fields of `run.Options` and of its limits, also as the text that `serve run` passes.

    Paths become absolute here, since replicas work in other folders; every machine must have them. Raises UserError.
    """
    own = {field.name for field in dataclasses.fields(Options)} - _RAYS_OWN - _NESTED.keys()
    inner = {name: {field.name for field in dataclasses.fields(part)} - own for name, part in _NESTED.items()}
    known = own.union(*inner.values())
    wrong = sorted(set(given) - known)
    if wrong or "model" not in given:
        what = f"unknown: {', '.join(wrong)}" if wrong else "model is missing"
        hint = f"model=... and of {', '.join(sorted(known))}; the rest is Ray Serve's (docs/clusters.md)"
        raise UserError(f"arguments of the application: {what}", hint)
    targets = given.get("target_modules")
    if isinstance(targets, str):
        given = {**given, "target_modules": targets.split(",")}
    try:
        nested = {
            name: TypeAdapter(_NESTED[name]).validate_python({k: v for k, v in given.items() if k in fields})
            for name, fields in inner.items()
        }
        options = TypeAdapter(Options).validate_python({k: v for k, v in given.items() if k in own})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}: {first['msg']}", f"it is {first['input']!r}") from None
    model = Path(options.model).expanduser()
    return dataclasses.replace(
        options,
        **nested,
        model=str(model.resolve()) if model.exists() else options.model,
        adapters=None if options.adapters is None else options.adapters.expanduser().resolve(),
    )


class Replica:
    """One server. Ray builds its application after `__init__`, starts it (the engine with it) and ends it."""

    def __init__(self, options: Options) -> None:
        self._loaded = load(options, logger.info)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._loaded.service.app()

    def check_health(self) -> None:
        """Ray replaces a replica where this raises repeatedly; an engine that failed has started again by then."""
        if not self._loaded.service.engine.alive:
            raise RuntimeError("the engine's loop is down")

    def __del__(self) -> None:
        self._loaded.close()


def app(args: dict[str, Any]) -> serve.Application:
    """The application. Replicas, their GPUs and autoscaling: `deployments` of a config file, by the name `fastpeft`."""
    options = read_options(args)
    most = options.limits.max_batch + options.limits.max_queue
    # Ray's own limit lets the engine's batch fill, and is above it, so that the answer to too many is the server's 429.
    deployment = serve.deployment(name="fastpeft", max_ongoing_requests=most + 8)(serve.ingress()(Replica))
    return deployment.bind(options)
