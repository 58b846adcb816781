"""FRoD: W is written as U diag(l) V^T, with one V for all layers of the same role and U of unit columns; l and a sparse
S in U (S + diag(l)) V^T are trained (doi 10.1609/aaai.v40i31.39813).

The role is the last two parts of a layer's name (`self_attn_q_proj`). V comes from a joint decomposition of the role's
weights; U = W V^-T diag(l)^-1 follows from V and the base weight and is in no file.

What is added here is U (S + diag(l - l0)) V^T, with l0 what l began with. PEFT adds U (S + diag(l)) V^T - W, the same
but for the rounding of the decomposition.

Cost: products with V and U in both directions and none for their gradients, T in (in + out) each: 1 + (in + out) / out
of the frozen layer, 3.0 if it is square, which is the least. S has sparse_rate in^2 entries; its products and its
gradient, taken at these entries only, cost T of them each. Saved is V^T x.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import HasBias, HasFanInFanOut, HasInitWeights, HasProjection, TargetConfig, check
from ..files.whole import gathered
from .computed import Computed
from .math.draws import drawn_normal, normal_
from .math.factored import dropout
from .math.projections import ProjectedMethod
from .math.sparse import dense, sparse_linear
from .method import AdaptedLayer, Inner, LayerInfo, State
from .vera import Vera


@dataclass
class FrodConfig(HasProjection, HasFanInFanOut, HasBias, HasInitWeights, TargetConfig, own_type="FROD"):
    """frod_dropout: of the input. sparse_rate: the share of entries off the diagonal that S has. regularization_alpha:
    keeps the joint decomposition stable where layers of a role are alike. progressbar: shown while it is computed.
    runtime_offload_base_weight: accepted; the base weight is needed here and stays where it is."""

    not_in_peft = ("exclude_modules",)

    frod_dropout: float = 0.0
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False


class Frod(ProjectedMethod, config=FrodConfig):
    tensors = ("frod_lambda_l", "frod_lambda_s_values")
    projections = ("frod_V", "frod_s_indices", "frod_s_size")
    default_targets: ClassVar[dict[str, Any]] = {**Vera.default_targets, "vit": ["query", "value"]}
    examples = (
        {"sparse_rate": 0.05, "progressbar": False},
        {"sparse_rate": 0.0, "progressbar": False, "save_projection": False, "init_weights": False},
    )

    def check_config(self, config: FrodConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        check(config, "sparse_rate", 0 <= config.sparse_rate <= 1, "between 0 and 1")
        check(config, "regularization_alpha", math.isfinite(config.regularization_alpha), "finite")

    def make_shared(self, config: FrodConfig, layers: Sequence[LayerInfo]) -> State:
        roles: dict[str, dict[int, LayerInfo]] = {}
        for i, info in enumerate(layers):
            alike = roles.setdefault(_role(info.name), {})
            if any(other.in_features != info.in_features for other in alike.values()):
                raise ValueError(f"FRoD: layers of the role {_role(info.name)!r} have different numbers of inputs")
            alike[_index(info.name, i)] = info
        generator = functools.cache(lambda: torch.Generator(device="cpu").manual_seed(config.projection_prng_key))
        bar = functools.cache(lambda: _bar(len(roles)) if config.progressbar else None)
        saved, shared = config.save_projection, {}
        for role, alike in sorted(roles.items()):
            infos = [alike[i] for i in sorted(alike)]
            n, rate = infos[0].in_features, config.sparse_rate
            count = min(max(int(n * n * rate), int(rate > 0)), n * n - n)
            basis = functools.partial(_basis, infos, config.regularization_alpha, bar)
            places = functools.partial(_off_diagonal, n, count, generator)
            shared[f"frod_V.{role}"] = Computed((n, n), basis, saved)
            shared[f"frod_s_indices.{role}"] = Computed((2, count), places, saved, torch.long)
            shared[f"frod_s_size.{role}"] = Computed((2,), functools.partial(torch.tensor, [n, n]), saved, torch.long)
        return shared

    def shares(self, info: LayerInfo, names: Sequence[str]) -> Mapping[str, str]:
        return {name: f"{name}.{_role(info.name)}" for name in self.projections}

    def make_state(self, config: FrodConfig, info: LayerInfo, shared: Any) -> State:
        v, indices = (getattr(shared, f"{name}.{_role(info.name)}") for name in self.projections[:2])
        values = torch.zeros(indices.shape[1])
        u, lambdas = torch.empty(info.out_features, info.in_features), torch.empty(info.in_features)
        if not u.is_meta:  # else a file brings V, from which U follows
            u, lambdas = _left(info.base.read()[0], v)
        state = {"frod_U": _kept(u, info), "frod_lambda_0": nn.Buffer(lambdas.clone(), persistent=False)}
        if not config.init_weights:
            normal_(values, std=0.1)
            lambdas = lambdas + drawn_normal(info.in_features) * 0.1
        state |= {"frod_lambda_l": nn.Parameter(lambdas), "frod_lambda_s_values": nn.Parameter(values)}
        return {"r": info.out_features, "frod_dropout": dropout(config.frod_dropout), **state}

    def filled(self, layer: AdaptedLayer, adapter: str) -> None:
        weight, v = gathered({"w": layer.unmerged_weight()[0], "v": layer.frod_V[adapter]}).values()
        if not weight.is_meta and not v.is_meta:
            u, lambdas = _left(weight, v)
            dtype = layer.frod_lambda_l[adapter].dtype
            layer.frod_U.set(adapter, _kept(u, layer.info).to(weight.device), persistent=False)
            layer.frod_lambda_0.set(adapter, lambdas.to(weight.device, dtype), persistent=False)

    def unpack(self, config: FrodConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for key, indices in tensors.items():
            if "frod_s_indices." in key:
                v, size = (tensors[key.replace("frod_s_indices.", f"{name}.")] for name in ("frod_V", "frod_s_size"))
                wrong = indices.is_floating_point() or ((indices < 0) | (indices >= len(v))).any()
                if wrong or size.tolist() != [len(v)] * 2:
                    raise ValueError(f"{key} should be indices into a matrix of {len(v)} x {len(v)}")
        return tensors

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        dtype = torch.promote_types(s.frod_lambda_l.dtype, torch.float32)
        u, v, values = (t.to(dtype) for t in (s.frod_U, shared.frod_V, s.frod_lambda_s_values))
        middle = dense(values, shared.frod_s_indices, (len(v), len(v)))
        middle = middle + torch.diag((s.frod_lambda_l - s.frod_lambda_0).to(dtype))
        return u @ middle @ v.t()  # type: ignore[no-any-return]

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        lambdas = s.frod_lambda_l
        u, v = s.frod_U.to(x.device), shared.frod_V.to(x.device, lambdas.dtype)
        z = s.frod_dropout(x.to(lambdas.dtype)) @ v
        rotated = sparse_linear(z, s.frod_lambda_s_values, shared.frod_s_indices, (len(v), len(v)))
        return y + F.linear((rotated + z * (lambdas - s.frod_lambda_0)).to(u.dtype), u)


def _role(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `self_attn_q_proj`: the layers that share V."""
    parts = name.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    role = "_".join(parts[-2:])
    return "attention_output" if role == "output_dense" and parts[-3:-2] == ["attention"] else role


def _index(name: str, fallback: int) -> int:
    """The block of a layer: the number after `layers`, else the first in its name."""
    _, _, after = f".{name}".partition(".layers.")
    return next((int(part) for part in (*after.split(".")[:1], *name.split(".")) if part.isdigit()), fallback)


def _kept(u: Tensor, info: LayerInfo) -> Tensor:
    """U as a layer keeps it: it is as large as the weight, and has its precision."""
    u = nn.Buffer(u.to(info.dtype), persistent=False)
    u.exact = True  # type: ignore[attr-defined]  # no float32 for it on a half-precision base
    return u


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="FRoD joint decomposition", unit="role")


def _basis(infos: Sequence[LayerInfo], alpha: float, bar: Any) -> Tensor:
    """V of the layers of one role, from their weights: a higher-order generalised SVD."""
    weights = [info.base.read()[0].detach() for info in infos]
    joined = torch.cat([w.to("cpu", torch.float32) for w in weights])
    if joined.shape[0] < joined.shape[1]:
        v = torch.linalg.svd(joined, full_matrices=True).Vh.T
    else:
        q, r = torch.linalg.qr(joined)
        eye = torch.eye(r.shape[1])
        parts = q.split([len(w) for w in weights])
        mean = sum((torch.linalg.inv(p.T @ p + alpha * eye) for p in parts), torch.zeros_like(eye)) / len(parts)
        v = r.T @ torch.linalg.eigh(mean).eigenvectors
    if bar() is not None:
        bar().update()
    return v.to(weights[0].dtype)  # type: ignore[no-any-return]


def _off_diagonal(n: int, count: int, generator: Any) -> Tensor:
    """The places of S: drawn from all off the diagonal, in the order of rows."""
    if not count:
        return torch.empty(2, 0, dtype=torch.long)
    drawn = torch.randperm(n * n - n, generator=generator())[:count]
    rows, columns = drawn // (n - 1), drawn % (n - 1)
    return torch.stack([rows, columns + (columns >= rows)])


def _left(weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """U and l of W = U diag(l) V^T."""
    w, v = weight.detach().to("cpu", torch.float64), v.detach().to("cpu", torch.float64)
    try:
        product = torch.linalg.solve(v, w.T).T
    except RuntimeError:  # a singular V
        product = w @ torch.linalg.pinv(v, rtol=1e-6).T
    lambdas = torch.linalg.norm(product, dim=0)
    unit = torch.where(lambdas > 1e-12, product / lambdas, torch.zeros_like(product))
    return unit.float(), lambdas.float()
