"""Methods with frozen random projections, which all layers share and every layer takes the part of its size from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...config.base import check
from ..computed import Computed
from ..method import Method

Draw = Callable[[torch.Generator], Sequence[Tensor]]


class ProjectedMethod(Method):
    """seed: the field with the seed of the projections. projections: the keys in files that `save_projection` is about.

    PEFT gives all adapters of a model the projections of the first, for which their seeds must agree and the first must
    be the largest. Here each has those of its own configuration, as if it were alone, so that it computes the same with
    and without the others; adapters whose projections are equal keep one copy.
    """

    seed: ClassVar[str] = "projection_prng_key"
    projections: ClassVar[tuple[str, ...]] = ()

    def check_config(self, config: Any, loading: bool = False) -> None:
        super().check_config(config, loading)
        check_seed(config, self.seed)

    def drawn(self, config: Any, shapes: Sequence[tuple[int, ...]], draw: Draw, shift: int = 0) -> dict[str, Computed]:
        """The projections, of these shapes, which `draw` takes from one generator, once, when the first is asked for.

        shift: is added to the seed.
        """
        seed = getattr(config, self.seed) + shift
        drawn = functools.cache(lambda: draw(torch.Generator(device="cpu").manual_seed(seed)))
        return {
            name: Computed(tuple(shape), functools.partial(lambda i: drawn()[i], i), config.save_projection)
            for i, (name, shape) in enumerate(zip(self.projections, shapes, strict=True))
        }

    def ignores(self, config: Any, key: str) -> bool:
        return not config.save_projection and any(part in self.projections for part in key.split("."))


def check_seed(config: Any, field: str) -> None:
    """ValueError for a seed that torch cannot take."""
    value = getattr(config, field)
    check(config, field, type(value) is int and abs(value) < 1 << 63, "an integer of 64 bits")

