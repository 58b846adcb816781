"""OSF: the smaller singular directions of W are trained, the larger ones protected (arXiv 2504.07097).

W + U diag(S) V - U0 diag(S0) V0, the second product being what W has there. Gradients of U and V are projected onto the
complement of the frozen directions.

Cost, in products of T tokens by W (r = half the rank): the layer itself 2, x V^T, x V0^T and the products of both with
U and U0 2 forward and 2 backward, gradients of U and V 1/2 each, their projections at least 1/2 + 1/2 more each when
made on the T rows, which costs less than on the gradients while T < 2 r. Together 8, the least while the wrapped layer
is called as it is: four times the frozen layer's. PEFT has 12.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.base import HasInitWeights, TargetConfig
from ..config.patterns import match_names
from ..config.targets import ALL_LINEAR, by_type
from ..config.types import PeftWarning
from ..weights.base import wide
from .computed import Computed
from .method import Inner, LayerInfo, Method, State


@dataclass
class OSFConfig(HasInitWeights, TargetConfig, own_type="OSF"):
    """effective_rank: number of singular directions that are frozen, or their share of the smaller size if it is a
    float; half by default, at most all, which leaves nothing to train in that layer. rank_pattern: its value by layer,
    by expressions that match anywhere in a name. target_svd_config: accepted and not used, as in PEFT."""

    not_in_peft = ("exclude_modules", "layers_to_transform", "layers_pattern")

    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    target_svd_config: dict[str, int] | None = None


class OSF(Method, config=OSFConfig):
    tensors = ("osf_svd_params",)
    default_targets: ClassVar[dict[str, Any]] = by_type({
        "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj":
            "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi",
        "c_attn c_proj": "gpt2 gpt_bigcode", "query_key_value dense_4h_to_h": "bloom falcon gpt_neox",
        "q_proj k_proj v_proj out_proj fc1 fc2": "opt", "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
    })  # fmt: skip
    examples = ({}, {"effective_rank": 3, "init_weights": False}, {"effective_rank": 0.9})

    def open_fields(self, config: OSFConfig, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        unknown = config.target_modules is None and model_type not in self.default_targets
        return {"target_modules": ALL_LINEAR} if unknown else {}

    def layer_config(self, config: OSFConfig, names: Sequence[str]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for pattern, rank in (config.rank_pattern or {}).items():
            for name in match_names(pattern, names, prefix=r"(?s:.*?)", suffix=""):
                if name not in result:
                    result[name] = type(config)(effective_rank=rank, init_weights=config.init_weights)
        return result

    def check_layer(self, config: OSFConfig, info: LayerInfo) -> None:
        super().check_layer(config, info)
        if (rank := _rank(config, info)) < 1:
            got = f"{config.effective_rank!r}, which is {rank} for a weight of {info.out_features} x {info.in_features}"
            raise ValueError(f"{info.name!r}: `effective_rank` should be at least 1, got {got}.")

    def make_state(self, config: OSFConfig, info: LayerInfo, shared: Any) -> State:
        k, n, m = _rank(config, info), info.out_features, info.in_features
        dtype = info.dtype if info.dtype.is_floating_point else torch.float32
        low = min(n, m) - k
        if low == 0:  # PEFT serves it and says nothing; the name of the layer is left out, so that equal ones warn once
            rank = f"`effective_rank` ({config.effective_rank}), clamped to {k}, the smaller size of a layer,"
            text = f"{rank} freezes all of its singular directions: nothing is trained in it."
            warnings.warn(text, PeftWarning, stacklevel=2)

        @functools.cache
        def factors() -> list[Tensor]:
            return [t.to(dtype) for t in torch.linalg.svd(info.weight().to(torch.float32), full_matrices=False)]

        def low_part(i: int) -> Tensor:
            return factors()[i][:, k:] if i == 0 else factors()[i][k:]

        params, state = {}, State(effective_rank=k)
        for i, (name, shape) in enumerate({"U_low": (n, low), "S_low": (low,), "V_low": (low, m)}.items()):
            part = functools.partial(low_part, i)
            start = torch.empty(shape)
            if not start.is_meta:
                start = part().clone(memory_format=torch.contiguous_format)
                start = start if config.init_weights else start.normal_()
            params[name] = nn.Parameter(start)
            state[f"_osf_{name}_init"] = Computed(shape, part, persistent=False)
        # Where a factor is square its frozen directions are the complement of the initial trained ones.
        if n > m:
            state["_osf_U_high"] = Computed((n, k), lambda: factors()[0][:, :k], persistent=False)
        if m > n:
            state["_osf_V_high"] = Computed((k, m), lambda: factors()[2][:k], persistent=False)
        return {**state, "osf_svd_params": nn.ParameterDict(params)}

    @staticmethod
    def _apply(s: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        trained = [s.osf_svd_params[name] for name in ("U_low", "S_low", "V_low")]
        start = [s._osf_U_low_init, s._osf_S_low_init, s._osf_V_low_init]
        tensors = (*trained, *start, s.get("_osf_U_high"), s.get("_osf_V_high"))
        return _LowPart.apply(x.to(dtype), *(None if t is None else t.to(dtype) for t in tensors))  # type: ignore[no-any-return, no-untyped-call]

    def delta_weight(self, s: Any, shared: Any, w: Tensor | None) -> Tensor:
        v = s.osf_svd_params["V_low"]
        return self._apply(s, torch.eye(v.shape[1], device=v.device), wide(v.dtype)).T

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        return y + self._apply(s, x, s.osf_svd_params["U_low"].dtype).to(y.dtype)


def _rank(config: OSFConfig, info: LayerInfo) -> int:
    smaller, rank = min(info.in_features, info.out_features), config.effective_rank
    if rank is None:
        return smaller // 2
    return min(int(smaller * rank if isinstance(rank, float) and 0 < rank <= 1 else rank), smaller)


def _projected(a: Tensor, b: Tensor, kept: Tensor, high: Tensor | None, c: Tensor) -> Tensor:
    """a^T b, for rows a and b, projected onto the directions `kept` or, where these are not all, off those in `high`.

    c: a @ kept. Either the rows are projected or the product, whichever has fewer multiplications."""
    basis = kept if high is None else high
    c = c if high is None else a @ high
    (t, n), r, k = a.shape, b.shape[1], basis.shape[1]
    if t * n * (k + r) <= k * r * (t + n) + (0 if high is None else t * n * r):
        part = c @ basis.T
        return (part if high is None else a - part).T @ b
    product = basis @ (c.T @ b)
    return product if high is None else a.T @ b - product


class _LowPart(torch.autograd.Function):
    """x (U diag(S) V - U0 diag(S0) V0)^T, keeping x and its products with V and V0; gradients of U, V projected."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, s: Tensor, v: Tensor, u0: Tensor, s0: Tensor, v0: Tensor,
                u_high: Tensor | None, v_high: Tensor | None) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        h, h0 = rows @ v.T, rows @ v0.T
        ctx.save_for_backward(x, u, s, v, u0, s0, v0, u_high, v_high, h, h0)
        y = torch.addmm((h * s) @ u.T, h0 * s0, u0.T, alpha=-1)
        return y.view(*x.shape[:-1], len(u))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, u, s, v, u0, s0, v0, u_high, v_high, h, h0 = ctx.saved_tensors
        needs_x, needs_u, needs_s, needs_v = ctx.needs_input_grad[:4]
        g, rows = (t.reshape(-1, t.shape[-1]).to(u.dtype) for t in (grads[0], x))  # autocast made some of the four
        h, h0 = h.to(u.dtype), h0.to(u.dtype)
        gu, gu0 = g @ u, g @ u0
        dx = torch.addmm((gu * s) @ v, gu0 * s0, v0, alpha=-1).view(x.shape) if needs_x else None
        du = _projected(g, h * s, u0, u_high, gu0) if needs_u else None
        dv = _projected(rows, gu * s, v0.T, None if v_high is None else v_high.T, h0).T if needs_v else None
        return dx, du, (gu * h).sum(0) if needs_s else None, dv, None, None, None, None, None
