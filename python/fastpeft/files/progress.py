"""Progress bars of what takes long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def shown(items: Iterable[T], title: str, show: bool, **options: Any) -> Iterable[T]:
    """The items, with a bar of tqdm while they are gone through."""
    if not show:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=title, **options)  # type: ignore[no-any-return]
