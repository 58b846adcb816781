"""HiRA: the weight times a low-rank product, elementwise: W + W * (B A) (openreview TwJrTz9cRS).

An embedding row is looked up in W and in A alone. On other layers' activations, each column pair of B and A costs a
product with W, r of them: no more, for one token alone. W (1 + B A) in the place of W costs one product in the forward,
two in the backward (`made_weight.py`), and B A and its transposes, r in out products each: (3 T + 4 r) / (2 T) of the
frozen layer's FLOPs at T tokens, 1.63 with r = 32 and T = 512. With dropout on x, W stays a product of its own.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import HasFanInFanOut, TargetConfig, check_ranks
from ..config.types import GroupsError, PeftWarning
from .math.draws import drawn_normal, kaiming_, normal_
from .math.factored import dropout
from .math.made_weight import as_it_is, one_token, weight_side, with_weight
from .method import Inner, LayerInfo, Method, State


@dataclass
class HiraConfig(HasFanInFanOut, TargetConfig, own_type="HIRA"):
    """r: rank of B A. hira_dropout: of the input. rank_pattern: of no effect, as in PEFT, whose files fit here.
    init_weights: B starts at zero (True, or "gaussian" for a normal A), or both are random (False)."""

    choices: ClassVar[Any] = {"init_weights": (True, False, None, "gaussian")}

    r: int = 32
    hira_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool | str | None = True


class Hira(Method, config=HiraConfig):
    tensors = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
    kinds = frozenset({"linear", "embedding", "conv1d", "conv2d", "conv3d"})
    examples = ({"r": 3}, {"r": 2, "init_weights": False})
    needs_base_weight = True

    def check_config(self, config: HiraConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        check_ranks(config.r, config.rank_pattern)
        if config.rank_pattern and not loading:
            warnings.warn("HiRA's layers all have rank `r`; `rank_pattern` has no effect", PeftWarning, stacklevel=2)

    def check_layer(self, config: HiraConfig, info: LayerInfo) -> None:
        super().check_layer(config, info)
        if info.groups > 1:
            what = f"HiRA does not support {type(info.module).__name__} layers with groups > 1"
            raise GroupsError(f"{what}: {info.name!r} has groups={info.groups}. Do not target it.")

    def make_state(self, config: HiraConfig, info: LayerInfo, shared: Any) -> State:
        embedding = info.kind == "embedding"
        a = drawn_normal(config.r, info.in_features, *info.shape[2:])
        b = drawn_normal(info.out_features, config.r, *[1] * len(info.shape[2:]))
        if embedding:
            if config.init_weights is not False:
                a.zero_()
                normal_(b)
        elif config.init_weights:
            if config.init_weights == "gaussian" and info.kind == "linear":
                normal_(a, std=1 / config.r)
            else:
                kaiming_(a)
            b.zero_()
        made = {f"hira_{'embedding_' * embedding}{n}": nn.Parameter(t) for n, t in (("A", a), ("B", b))}
        return {**made, "r": config.r, "hira_dropout": dropout(config.hira_dropout)}

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        assert w is not None
        a, b = (s.get(f"hira_embedding_{n}", s.get(f"hira_{n}")) for n in "AB")
        dtype = torch.promote_types(a.dtype, w.dtype)
        product: Tensor = b.to(dtype).flatten(1) @ a.to(dtype).flatten(1)
        return w * product.view(w.shape)

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        if inner.info.kind == "embedding":
            return y + y * F.linear(F.embedding(x, s.hira_embedding_A.t()), s.hira_embedding_B)
        return super().output(s, shared, s.hira_dropout(x), y, inner)

    def forward(self, s: Any, shared: Any, x: Tensor, inner: Inner) -> Tensor:
        drop, linear, frozen = s.hira_dropout, inner.info.kind == "linear", inner.frozen()
        drops = isinstance(drop, nn.Dropout) and drop.training
        if frozen is None or (drops and not linear):
            return super().forward(s, shared, x, inner)
        if not linear:
            return with_weight(inner, x, frozen, lambda w: w + self.delta_weight(s, shared, w))
        n, bias = inner.info.out_features, inner.bias()
        if one_token(x) and not drops:
            flat = x.reshape(1, -1)
            z = weight_side(torch.cat([flat, flat * s.hira_A.to(x.dtype)]), n, frozen, as_it_is)
            y: Tensor = z[0] + (z[1:] * s.hira_B.t()).sum(0)
            return (y if bias is None else y + bias).view(*x.shape[:-1], n)

        def rows(w: Tensor, i: int, j: int, a: Tensor, b: Tensor) -> Tensor:
            return w[i:j] * torch.add(b[i:j] @ a, 0 if drops else 1)

        if drops:
            return inner(x) + weight_side(drop(x), n, frozen, rows, s.hira_A, s.hira_B)
        return weight_side(x, n, frozen, rows, s.hira_A, s.hira_B, bias=bias)
