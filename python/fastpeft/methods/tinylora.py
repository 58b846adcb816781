"""TinyLoRA: W + B R A with R = sum_i v[i] P[i], where B A is the truncated SVD of W with its singular values shared
between both, P [u, r, r] is random and frozen, and v [u] is all that is trained (arXiv 2602.04118).

With `weight_tying` neighbouring layers share one v; one for all of them can be as few as 13 parameters. In an embedding
it is the table, [rows, dim], that is decomposed.

Cost: that of LoRA without the product for the gradients of A, 1 + (2 r in + 3 r out) / (2 in out), and u r r for R.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from peft_kernels import Fingerprint

from ..config.base import HasBias, HasFanInFanOut, TargetConfig, check, check_choice
from .computed import Computed
from .math.factored import FactoredMethod, dropout
from .math.projections import ProjectedMethod
from .method import Inner, LayerInfo, State

_SVDS: Any = WeakIdKeyDictionary()
MAX_ELEMENTS = 1 << 28  # of P, which may be computed for a file that names only its size


@dataclass
class TinyLoraConfig(HasFanInFanOut, HasBias, TargetConfig, own_type="TINYLORA"):
    """r: the rank of the SVD. u: the length of v. weight_tying: from 0, a v for each layer, to 1, one for all.
    projection_seed: of P, plus a layer's place among the targets. save_projection: whether files hold P. init_v_bound:
    of uniform v. tinylora_dropout: of the input. init_weights: v starts as zeros (True), or uniform ("uniform", False).
    """

    not_in_peft = ("exclude_modules",)

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    init_weights: bool | str = True


def redraw(tuner: Any, config: TinyLoraConfig, adapter: str) -> None:
    """Start v of an adapter anew, uniform, whatever `init_weights` says."""
    for v in tuner.tinylora_v[adapter].values():
        nn.init.uniform_(v, -config.init_v_bound, config.init_v_bound)


class TinyLora(ProjectedMethod, FactoredMethod, config=TinyLoraConfig):
    tensors = ("tinylora_v",)
    kinds = frozenset({"linear", "embedding"})
    dropout = "tinylora_dropout"
    seed, projections = "projection_seed", ("tinylora_P",)
    counts = ("r", "u")
    examples = ({"u": 5}, {"r": 30, "u": 3, "weight_tying": 1.0, "save_projection": False})

    model_methods: ClassVar[Any] = {"_init_tinylora_v": redraw}

    def check_config(self, config: TinyLoraConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        if config.u * config.r**2 > MAX_ELEMENTS:
            raise ValueError(f"`u`={config.u} matrices of `r`={config.r} have more than {MAX_ELEMENTS} elements")
        check(config, "weight_tying", 0.0 <= config.weight_tying <= 1.0, "from 0.0 to 1.0")
        check_choice(config, "init_weights", True, False, "uniform")

    def make_shared(self, config: TinyLoraConfig, layers: Sequence[LayerInfo]) -> State:
        groups = max(1, round(len(layers) * (1.0 - config.weight_tying)))
        size = max(1, len(layers) // groups)
        group_of = [str(min(i // size, groups - 1)) for i in range(len(layers))]
        vectors = nn.ParameterDict()
        for group in dict.fromkeys(group_of):
            v = torch.zeros(config.u)
            if config.init_weights is not True and not v.is_meta:
                v.uniform_(-config.init_v_bound, config.init_v_bound)
            vectors[group] = nn.Parameter(v)
        places = {info.name: (i, group) for i, (info, group) in enumerate(zip(layers, group_of, strict=True))}
        return {"tinylora_v": vectors, "places": places}

    def make_state(self, config: TinyLoraConfig, info: LayerInfo, shared: Any) -> State:
        place, group = shared.places[info.name]
        rows, columns = info.shape[::-1] if info.kind == "embedding" else info.shape
        r = min(config.r, rows, columns)
        p = (config.u, r, r)
        svd = functools.cache(lambda: _svd(info, r))
        return {
            "r": r, "u": config.u, "tinylora_group": group, "tinylora_table": info.kind == "embedding",
            "tinylora_A": Computed((r, columns), lambda: svd()[0]),
            "tinylora_B": Computed((rows, r), lambda: svd()[1]),
            **self.drawn(config, [p], lambda g: [torch.normal(0.0, r**-0.5, p, generator=g)], place),
            "tinylora_dropout": dropout(config.tinylora_dropout),
        }  # fmt: skip

    def _middle(self, s: Any, shared: Any) -> Tensor:
        v = shared.tinylora_v[s.tinylora_group]
        p = s.tinylora_P.to(v.device, v.dtype)
        return (v @ p.flatten(1)).view(p.shape[1:])  # type: ignore[no-any-return]

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor]:
        a, b, middle = s.tinylora_A, s.tinylora_B, self._middle(s, shared)
        if s.tinylora_table:  # the transposed weight
            return b.t(), a.t() @ middle.t().to(a.device, a.dtype)
        return a, b @ middle.to(b.device, b.dtype)

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        if not s.tinylora_table:
            return super().output(s, shared, x, y, inner)
        low = s.tinylora_dropout(inner.apply(x, s.tinylora_B.t()))
        return y + F.linear(low @ self._middle(s, shared).to(low.dtype), s.tinylora_A.t().to(low.dtype))


def _svd(info: LayerInfo, r: int) -> tuple[Tensor, Tensor]:
    """A and B, in the precision of the weight's own values. Kept as long as the weight, for its next adapter."""
    lying = info.base.tensors()
    found = _SVDS.get(lying[0])
    # memory last: only plain tensors on the CPU are ever unchanged, and others may have none
    if found is not None and found[0] == r and found[2].unchanged() and _places(found[1]) == _places(lying):
        return found[3].clone(), found[4].clone()
    w = info.base.read()[0].detach()
    w = w.t() if info.kind == "embedding" else w
    u, s, vh = torch.linalg.svd(w.float(), full_matrices=False)
    u, vh, root = u[:, :r].to(w.dtype), vh[:r].to(w.dtype), torch.sqrt(s[:r].to(w.dtype))
    held = [t.detach() for t in lying]  # the first one itself would hold its own entry for good
    _SVDS[lying[0]] = r, held, Fingerprint(held), root[:, None] * vh, u * root
    return root[:, None] * vh, u * root


def _places(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]
