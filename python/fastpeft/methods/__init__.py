"""One file per method or variant: its configuration and its math. A new file is found by itself; no list has them."""

from __future__ import annotations

import functools
import importlib
import pkgutil


@functools.cache
def load_all() -> None:
    """Import every method, which registers it."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
