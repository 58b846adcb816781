"""GLoRA: W + W * A + B and b + b * D + E + W C (arXiv 2306.07967). C, D and E are there where the layer has a bias.

A and B as a vector or a number act on the output and on the sum of the input's features. As low-rank products, A needs
the weight side as HiRA's does (`made_weight.py`), and B goes into the same weight: (3 T + 8 r) / (2 T) of the frozen
layer's FLOPs at T tokens, 1.56 with r = 8 and T = 512, but not for one token, which W is multiplied with r times. W C
is a product with one more row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import HasBias, HasInitWeights, TargetConfig
from .math.draws import kaiming_, normal_
from .math.made_weight import as_it_is, one_token, weight_side
from .method import Inner, LayerInfo, Method, State


@dataclass
class GloraConfig(HasBias, HasInitWeights, TargetConfig, own_type="GLORA"):
    """r: rank of the low-rank forms. config_A_B: "lora", "vector" (a number per output channel), "constant" (one
    number) or "none". config_C: "lora", "vector" or "none". config_D_E: "vector", "constant" or "none".
    init_weights: False starts at random."""

    not_in_peft = ("exclude_modules", "layers_to_transform", "layers_pattern")
    choices: ClassVar[Any] = {
        "config_A_B": ("lora", "vector", "constant", "none"),
        "config_C": ("lora", "vector", "none"),
        "config_D_E": ("vector", "constant", "none"),
    }

    r: int = 8
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"


class Path(nn.Module):
    """One of A to E, of a shape: Xd Xu, or X, or, where there is none, the zeros that PEFT's files have for it."""

    def __init__(self, form: str, shape: tuple[int, ...], r: int, init_weights: bool) -> None:
        super().__init__()
        self.form = form
        if form == "none":
            self.register_buffer("zeros", torch.zeros(shape))
        elif form == "lora":
            self.Xd, self.Xu = nn.Parameter(torch.zeros(shape[0], r)), nn.Parameter(torch.zeros(r, shape[1]))
            kaiming_(self.Xu)
            if not init_weights:
                kaiming_(self.Xd)
        else:
            self.X = nn.Parameter(torch.zeros(1 if form == "constant" else (shape[0], *[1] * (len(shape) - 1))))
            if not init_weights and form == "constant":
                normal_(self.X, std=0.02)
            elif not init_weights:
                kaiming_(self.X if self.X.dim() == 2 else self.X[None])

    def forward(self) -> Tensor | None:
        """The value, which broadcasts to the shape, or None."""
        if self.form == "none":
            return None
        return self.Xd @ self.Xu if self.form == "lora" else self.X


class Glora(Method, config=GloraConfig):
    tensors = ("glora_A", "glora_B", "glora_C", "glora_D", "glora_E")
    needs_base_weight = True
    counts = ("r",)
    examples = (
        {"r": 3},
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector", "init_weights": False},
        {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
    )

    def make_state(self, config: GloraConfig, info: LayerInfo, shared: Any) -> State:
        out, width = info.out_features, info.in_features
        shapes = {"A": (out, width), "B": (out, width), "C": (width, 1), "D": (out,), "E": (out,)}
        forms = dict.fromkeys("AB", config.config_A_B) | {"C": config.config_C} | dict.fromkeys("DE", config.config_D_E)
        if not info.has_bias:
            forms |= dict.fromkeys("CDE", "none")
        paths = {f"glora_{n}": Path(forms[n], shapes[n], config.r, config.init_weights) for n in shapes}
        return {"r": config.r, **paths}

    def check_tensors(self, info: LayerInfo, tensors: Mapping[str, Tensor]) -> None:
        for key, value in tensors.items():
            if key.endswith("zeros") and value.any():
                raise ValueError(f"{key} of {info.name!r} should be zeros: the configuration has no such path")

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dw, db = _changes(s, w, b)
        return w + dw, _sum(b, db)

    def forward(self, s: Any, shared: Any, x: Tensor, inner: Inner) -> Tensor:
        frozen = inner.frozen()
        if frozen is None:
            dw, db = _changes(s, *inner.weight())
            return inner(x) + inner.apply(x, dw.to(x.dtype), None if db is None else db.to(x.dtype))
        n, bias, a, b, c = inner.info.out_features, inner.bias(), s.glora_A, s.glora_B, s.glora_C()
        few = a.form == "lora" and one_token(x)
        rows = [x.reshape(1, -1), x.reshape(1, -1) * a.Xu.to(x.dtype)] if few else []
        rows += [] if c is None else [c.t().to(x.dtype)]
        products = weight_side(torch.cat(rows), n, frozen, as_it_is) if rows else x.new_empty(0)
        db = _sum(_of_bias(s, bias), None if c is None else products[-1])
        if few:
            through = F.linear(F.linear(rows[0].to(b.Xu.dtype), b.Xu), b.Xd)[0]
            y: Tensor = products[0] + (products[1 : 1 + len(a.Xu)] * a.Xd.t()).sum(0) + through
            return _sum(y, bias, db).view(*x.shape[:-1], n)  # type: ignore[no-any-return]
        if a.form == "lora":
            return weight_side(x, n, frozen, _scaled, a.Xd, a.Xu, b.Xd, b.Xu, bias=_sum(bias, db))
        y = inner(x)
        if a.form != "none":
            y = y + (y if bias is None else y - bias) * a().t() + x.sum(-1, keepdim=True) * b().t()
        return _sum(y, db)  # type: ignore[no-any-return]


def _sum(*terms: Tensor | None) -> Any:
    """The sum of those that are there, or None."""
    there = [term for term in terms if term is not None]
    return functools.reduce(torch.add, there) if there else None


def _of_bias(s: Any, b: Tensor | None) -> Tensor | None:
    """b * D + E."""
    d, e = s.glora_D(), s.glora_E()
    return None if d is None or b is None else b * d.to(b.dtype) + e.to(b.dtype)


def _changes(s: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The additions to W and to b."""
    a, c, db = s.glora_A(), s.glora_C(), _of_bias(s, b)
    dw = torch.zeros_like(w) if a is None else w * a.to(w.dtype) + s.glora_B().to(w.dtype)
    if c is not None and b is not None:
        db = _sum(db, (w @ c.to(w.dtype)).squeeze(-1))
    return dw, db


def _scaled(w: Tensor, i: int, j: int, ad: Tensor, au: Tensor, bd: Tensor, bu: Tensor) -> Tensor:
    return w[i:j] * (1 + ad[i:j] @ au) + bd[i:j] @ bu
