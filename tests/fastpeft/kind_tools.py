"""Tools of the tests over every registered method: its kinds, which are its variants with their examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastpeft.methods.method import Method
from fastpeft.methods.registry import registry
from fastpeft.testing import add_adapter, make_layer


@dataclass(frozen=True)
class Kind:
    """A method with the configuration that one of its examples gives."""

    method: Method
    values: Mapping[str, Any]
    number: int

    def config(self, **more: Any) -> Any:
        return self.method.config_class(**{**self.values, **more})

    @property
    def variant(self) -> Method:
        return self.method.variant(self.config())

    def __repr__(self) -> str:
        return f"{type(self.variant).__name__}-{self.number}"

    def __hash__(self) -> int:
        return hash((type(self.method), self.number))

    def adapts(self, base: str) -> bool:
        """True if it goes on a sample base."""
        try:
            self.variant.check_layer(self.config(), make_layer(base).info)
        except ValueError:
            return False
        return True

    def merges(self, base: str) -> bool:
        layer = make_layer(base)
        add_adapter(layer, "probe", self.method, self.config())
        return self.variant.mergeable_in(layer.view("probe"), layer.info) is None


def examples(methods: Iterable[Method] = ()) -> list[Kind]:
    """Every example of every registered method, and of those given."""
    return [Kind(m, v, i) for m in (*registry().values(), *methods) for i, v in enumerate(m.examples)]


def kinds(methods: Iterable[Method] = ()) -> list[Kind]:
    """The first example of each method and of each variant of it."""
    return list({type(kind.variant): kind for kind in reversed(examples(methods))}.values())[::-1]
