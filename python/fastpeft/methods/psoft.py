"""PSOFT: W + scaling * B (R - I) A, with A, B the largest r singular directions of W, frozen, and R [r, r] trained, an
orthogonal matrix scaled on both sides (openreview.net/forum?id=FSHrinMArK).

On activations a LoRA with the factors A and B (R - I). A and B are in no file: they follow from the base weight.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_kernels import cayley

from ..config.base import HasFanInFanOut, HasInitWeights, TargetConfig, check, check_probabilities, check_ranks
from ..config.types import PeftWarning
from ..weights.base import widened
from .computed import Computed
from .math.draws import drawn_normal
from .math.factored import FactoredMethod, dropout
from .math.rotation import skew
from .method import LayerInfo, State


@dataclass
class PsoftConfig(HasFanInFanOut, HasInitWeights, TargetConfig, own_type="PSOFT"):
    """r: size of R. psoft_alpha: scaling is psoft_alpha / r, which B is divided by. ab_svd_init: "psoft_init" (A has
    orthonormal rows) or "pissa_init" (the singular values are shared out). psoft_svd: "full", or "lowrank" with
    psoft_svd_lowrank_niter iterations from random_seed. psoft_orth: R is orthogonal, else any matrix. psoft_mag_a,
    psoft_mag_b: scale R's inputs and outputs. use_cayley_neumann: R from num_cayley_neumann_terms of a series, its
    generator kept within cayley_neumann_eps."""

    choices: ClassVar[Any] = {"ab_svd_init": ("psoft_init", "pissa_init"), "psoft_svd": ("full", "lowrank")}

    r: int = 32
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self.r)
        check_probabilities(self)
        check(self, "psoft_alpha", bool(self.psoft_alpha), "other than 0, by which B would be divided")
        eps, terms, series = self.cayley_neumann_eps, self.num_cayley_neumann_terms, self.use_cayley_neumann
        if series and not 1 <= terms <= 100:
            raise ValueError(f"`num_cayley_neumann_terms` must be a positive integer of at most 100, got {terms!r}")
        if series and not (eps is None or 0.0 < eps < 1.0):
            raise ValueError(f"`cayley_neumann_eps` must be in (0, 1) when set, got {eps!r}")
        for name, needed, used in (
            ("num_cayley_neumann_terms", "use_cayley_neumann=True", series),
            ("cayley_neumann_eps", "use_cayley_neumann=True", series),
            ("psoft_svd_lowrank_niter", "psoft_svd='lowrank'", self.psoft_svd == "lowrank"),
        ):
            if not used and getattr(self, name) != getattr(type(self), name):
                warnings.warn(f"`{name}` is only used when `{needed}`. It is ignored.", PeftWarning, stacklevel=3)


class OrthLayer(nn.Module):
    """R, by the entries above the diagonal of its generator (or as it is), and its scales."""

    def __init__(self, config: PsoftConfig) -> None:
        super().__init__()
        n, self.orth, self.eps = config.r, config.psoft_orth, config.cayley_neumann_eps
        self.size, self.terms = n, config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.weight = nn.Parameter(torch.zeros(n * (n - 1) // 2) if self.orth else torch.eye(n))
        self.vector_b = nn.Parameter(torch.ones(n)) if config.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.ones(n)) if config.psoft_mag_a else None
        if not config.init_weights:
            self.weight.data += drawn_normal(*self.weight.shape) * 0.1

    def get_matrix(self) -> Tensor:
        r: Tensor = widened(self.weight)
        if self.orth:
            q = skew(r, self.size)
            if self.terms is not None and self.eps is not None:
                norm = torch.linalg.norm(q)
                q = torch.where(norm > self.eps, q * (self.eps / (norm + 1e-12)), q)
            r = cayley(q, self.terms)
        r = r if self.vector_b is None else self.vector_b[:, None] * r
        return r if self.vector_a is None else r * self.vector_a


class Psoft(FactoredMethod, config=PsoftConfig):
    dropout = "psoft_dropout"
    tensors = ("psoft_R",)
    examples = (
        {"r": 6, "psoft_alpha": 3}, {"r": 1, "use_cayley_neumann": True},
        {"r": 5, "ab_svd_init": "pissa_init", "psoft_svd": "lowrank", "psoft_mag_a": False},
        {"r": 4, "psoft_orth": False, "psoft_mag_b": False, "init_weights": False},
        {"r": 6, "use_cayley_neumann": True, "num_cayley_neumann_terms": 4, "cayley_neumann_eps": 0.5},
    )  # fmt: skip

    def check_layer(self, config: PsoftConfig, info: LayerInfo) -> None:
        super().check_layer(config, info)
        if config.r > min(info.in_features, info.out_features):
            limit = f"less than or equal to min(in_features, out_features) ({info.in_features}, {info.out_features})"
            raise ValueError(f"{info.name!r}: `r` ({config.r}) must be {limit}")

    def make_state(self, config: PsoftConfig, info: LayerInfo, shared: Any) -> State:
        factors = functools.cache(lambda: _principal(info.weight(), config))
        n, m = info.out_features, info.in_features
        as_given = ("r", "psoft_alpha", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed", "ab_svd_init")
        return {name: getattr(config, name) for name in as_given} | {
            "scaling": config.psoft_alpha / config.r,
            "psoft_dropout": dropout(config.psoft_dropout),
            "_psoft_A_cache": Computed((config.r, m), lambda: factors()[0], persistent=False, exact=True),
            "_psoft_B_cache": Computed((n, config.r), lambda: factors()[1], persistent=False, exact=True),
            "psoft_R": OrthLayer(config),
        }

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor]:
        a, b, r = s._psoft_A_cache, s._psoft_B_cache, s.psoft_R.get_matrix()
        moved = r - torch.eye(len(r), dtype=r.dtype, device=r.device)
        dtype = torch.promote_types(a.dtype, r.dtype)
        return a.to(dtype), (b.to(dtype) @ moved.to(dtype)) * s.scaling

    def scale(self, s: Any) -> float | None:
        return float(s.psoft_alpha / s.r)


def _principal(w: Tensor, config: PsoftConfig) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], whose product is the best approximation of W of rank r over the scaling."""
    w, r = w.to(torch.float32), config.r
    if config.psoft_svd == "full":
        u, s, v = torch.linalg.svd(w, full_matrices=False)
    else:
        with torch.random.fork_rng([] if w.device.type == "cpu" else [w.device], device_type=w.device.type):
            torch.manual_seed(config.random_seed)
            u, s, v = torch.svd_lowrank(w, q=r, niter=config.psoft_svd_lowrank_niter)
            v = v.T
    u, s, v = u[:, :r], s[:r] / (config.psoft_alpha / r), v[:r]
    if config.ab_svd_init == "psoft_init":
        return v, u * s
    return s.sqrt()[:, None] * v, u * s.sqrt()
