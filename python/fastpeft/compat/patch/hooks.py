"""Hooks on PEFT's tuners, for models that are made after `fastpeft.patch()`: everyone passes `inject_adapter`, by
whatever name they imported what calls it. Where PEFT is not imported yet they are put on when it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TUNERS = "peft.tuners.tuners_utils"
_METHODS = ("inject_adapter", "set_adapter")
Then = Callable[[Any], None]


class Hooks(MetaPathFinder):
    """then(tuner): called after an adapter was put into a tuner's model, or another one made active."""

    def __init__(self, then: Then) -> None:
        self._then = then
        self._on: list[tuple[type, str, Any, Any]] = []

    def install(self) -> None:
        """Put the hooks on now, or when PEFT is imported. Does nothing the second time."""
        if self._on or self in sys.meta_path:
            return
        if TUNERS in sys.modules:
            self._attach(sys.modules[TUNERS])
        else:
            sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Take the hooks off again. One that somebody has wrapped since stays where it is, and does nothing."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for owner, name, original, ours in self._on:
            if vars(owner).get(name) is ours:
                setattr(owner, name, original)
        self._on = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TUNERS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    self._attach(module)

            loader.exec_module = exec_module
        return spec

    def _attach(self, module: Any) -> None:
        for name in _METHODS:
            original = vars(module.BaseTuner)[name]
            ours = self._followed(original)
            setattr(module.BaseTuner, name, ours)
            self._on.append((module.BaseTuner, name, original, ours))

    def _followed(self, original: Any) -> Any:
        @functools.wraps(original)
        def method(tuner: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(tuner, *args, **kwargs)
            if self._on:
                self._then(tuner)
            return result

        return method
