"""The keys and values of a model and of its shadow, as one cache of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Cache

_BOTH = ("reset", "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices")


class ShadowCache(Cache):
    """A cache of the base model and one of the shadow, which sees the same tokens.

    What changes rows or length is done to both; all else is asked of the base model's. Attributes are `base` and
    `shadow`. It is never compiled: the two may differ in layers and sizes.
    """

    is_compileable = False  # type: ignore[assignment]

    def __init__(self, base: Any, shadow: Any) -> None:
        self.base, self.shadow = base, shadow  # no Cache.__init__: it has no layers of its own

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "shadow"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.base, name)

    @property
    def is_initialized(self) -> bool:
        return all(getattr(cache, "is_initialized", True) for cache in (self.base, self.shadow))

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, layer: int) -> Any:
        return self.base[layer]

    def __iter__(self) -> Any:
        return iter(self.base)

    def __repr__(self) -> str:
        return f"ShadowCache(base={self.base!r}, shadow={self.shadow!r})"


def _passed_on(name: str) -> Callable[..., Any]:
    def call(self: ShadowCache, *args: Any, **kwargs: Any) -> Any:
        if name in _BOTH:
            getattr(self.shadow, name)(*args, **kwargs)
        return getattr(self.base, name)(*args, **kwargs)

    return call


def _asked(name: str) -> property:
    return property(lambda self: getattr(self.base, name))


# Whatever this version of transformers asks of a cache, which `__getattr__` is not asked for where Cache has it.
for _name, _value in vars(Cache).items():
    if not _name.startswith("_") and _name not in vars(ShadowCache):
        setattr(ShadowCache, _name, _asked(_name) if isinstance(_value, property) else _passed_on(_name))
