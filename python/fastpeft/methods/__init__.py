"""One file per method: its configuration and its math. A new file is found by itself; nothing here lists them."""

from __future__ import annotations

import importlib
import pkgutil


def load_all() -> None:
    """Import every method, which registers it."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
