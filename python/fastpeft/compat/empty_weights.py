"""PEFT's `init_empty_weights` and `skip_init_on_device`: modules whose parameters have no memory yet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")
_skipped = ContextVar("_skipped", default=False)


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Within this, parameters of new modules are on the meta device; include_buffers: and all that is made is."""
    if include_buffers:
        with torch.device("meta"):
            yield
        return
    register: Any = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not _skipped.get():
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_empty  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def skip_init_on_device(function: Callable[P, R]) -> Callable[P, R]:
    """A function that makes modules with memory, within `init_empty_weights` too."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _skipped.set(True)
        try:
            return function(*args, **kwargs)
        finally:
            _skipped.reset(token)

    return call
