"""CorDA: the adapter takes components of W oriented by the covariance of the layer's inputs (arXiv 2406.05223)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ....config.base import check_choice
from ....config.seen_as_peft import SeenAsPeft
from ...method import LayerInfo
from . import Start

EIGENS = "eigens"  # of a layer, until the adapter is made


@dataclass
class CordaConfig(SeenAsPeft):
    """cache_file: where the components are written, or read from if it exists. covariance_file: the same for the
    covariances, which serve any rank. corda_method: "ipm" or "kpm". use_float16_for_covariance: takes half the memory
    for less precision. verbose: show progress. prune_temporary_fields: accepted; no other fields are made here."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        check_choice(self, "corda_method", "ipm", "kpm")
        for name in ("cache_file", "covariance_file"):
            if isinstance(path := getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(path))


@dataclass
class CordaEigens:
    """The components that the adapter takes: S [r], U [out, r] and V [in, r]."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


class Corda(Start):
    name = "corda"
    shown = "CorDA"
    field = "corda_config"
    options = CordaConfig
    used = (EIGENS,)

    def factors(self, config: Any, info: LayerInfo, scaling: float, w: Tensor) -> tuple[Tensor, Tensor, None]:
        """A and B with scaling * B A = U S V'."""
        eigens = getattr(info.module, EIGENS, None)
        if eigens is None:
            raise ValueError(f"There are no components of {info.name!r}: run `preprocess_corda` first.")
        r = config.r
        parts = {"S_WC": (r,), "U_WC": (info.out_features, r), "V_WC": (info.in_features, r)}
        for name, shape in parts.items():
            tensor = getattr(eigens, name)
            if tuple(tensor.shape) != shape or not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{name} of {info.name!r} is {list(tensor.shape)}, expected {list(shape)} and finite numbers: run "
                    "`preprocess_corda` with the model and the configuration that get_peft_model is called with."
                )
        s, u, v = (getattr(eigens, name).to(w) for name in parts)
        root = (s / scaling).sqrt()
        return v.t() * root[:, None], u * root, None
