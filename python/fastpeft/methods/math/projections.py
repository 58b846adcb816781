"""Methods with frozen random projections, which all layers share and every layer takes the part of its size from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..method import Method


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

    def ignores(self, config: Any, key: str) -> bool:
        return not config.save_projection and any(part in self.projections for part in key.split("."))


def check_seed(config: Any, field: str) -> None:
    """ValueError for a seed that torch cannot take."""
    value = getattr(config, field)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 1 << 63:
        raise ValueError(f"`{field}` should be an integer of 64 bits, got {value!r}")


def seeded(seed: int, draw: Callable[[torch.Generator], tuple[Tensor, ...]]) -> Callable[[int], Callable[[], Tensor]]:
    """Tensors that are drawn in turn from one seeded generator, once, when the first is asked for: `at(i)()`."""

    @functools.cache
    def drawn() -> tuple[Tensor, ...]:
        return draw(torch.Generator(device="cpu").manual_seed(seed))

    return lambda i: lambda: drawn()[i]


def kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Uniform with the variance 2 / columns of He et al. (arXiv 1502.01852)."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
