"""AdaMSS: low-rank updates in subspaces of the weight's rows (adaptive multi-subspaces).

[W | b] is approximated by U V of rank r, and its rows are clustered by those of U. On the rows of cluster i, W becomes
W + B_i A_i V, where A_i and B_i are trained. So W + B A V, with the A_i one below another and each B_i on its cluster's
rows: a LoRA of rank K, the sum of the clusters' ranks (5 by default), whose first factor is A V. FLOPs beside the
frozen layer's: 3 * 2 * tokens * K * (in + out). The least has out * K / subspaces in place of out * K; 1.01 either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import TargetConfig
from ..config.targets import DEFAULT_TARGETS
from .math.kmeans import cluster
from .method import Inner, LayerInfo, Method, State


@dataclass
class AdamssConfig(TargetConfig, own_type="ADAMSS"):
    """r: of the approximation. num_subspaces: clusters of rows. subspace_rank: of each cluster's update, or with
    use_dynamic_rank at most that, counting singular values above svd_threshold of the largest. init_weights:
    "orthogonal" starts at the identity, None does not. random_seed: of the approximation. use_asa: while training,
    only the most important subspaces of the whole model go on training: `model.update_and_allocate(step)`, called each
    step before gradients are cleared, reduces them to asa_target_subspaces between the steps init_warmup and
    final_warmup, every mask_interval steps, along a curve of asa_schedule_exponent; asa_importance_beta and
    asa_uncertainty_beta average importance over steps."""

    not_in_peft = ("exclude_modules",)
    choices: ClassVar[Any] = {"init_weights": ("orthogonal", None)}

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: str | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    def __post_init__(self) -> None:
        self.init_weights = self.init_weights or None
        super().__post_init__()
        for name in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent") if self.use_asa else ():
            if getattr(self, name) <= 0:
                what = "number" if name == "asa_schedule_exponent" else "integer"
                got = getattr(self, name)
                raise ValueError(f"`{name}` must be a positive {what} when `use_asa=True`, got {got}.")
        if self.use_asa and self.init_warmup >= self.final_warmup:
            got = f"init_warmup={self.init_warmup} and final_warmup={self.final_warmup}"
            why = "so that ASA has a non-empty pruning ramp"
            raise ValueError(f"`init_warmup` must be smaller than `final_warmup` when `use_asa=True` {why}, got {got}.")


def update_and_allocate(tuner: Any, global_step: int) -> None:
    """One step of adaptive subspace allocation for the active adapters that have `use_asa`."""
    for adapter in tuner.active_adapters:
        config = tuner.peft_config[adapter]
        if not getattr(config, "use_asa", False) or not config.init_warmup <= global_step <= config.final_warmup:
            continue
        views = [m.view(adapter) for _, m in tuner.adapter_layers() if isinstance(m.methods.get(adapter), Adamss)]
        for s in views:
            _measure(s, config)
        if global_step % config.mask_interval == 0:
            total, target = sum(s.num_subspaces for s in views), config.asa_target_subspaces
            left = 1.0 - (global_step - config.init_warmup) / (config.final_warmup - config.init_warmup)
            _keep_best(views, int(target + (total - target) * left**config.asa_schedule_exponent))


def _measure(s: Any, config: AdamssConfig) -> None:
    for end, parameters in (("A", s.adamss_A), ("B", s.adamss_B)):
        for i, p in enumerate(parameters):
            if p.grad is not None:
                now = (p * p.grad).abs().detach()
                importance, uncertainty = s.asa_averages.get((end, i)) or (torch.zeros_like(now), torch.zeros_like(now))
                s.asa_averages[end, i] = (
                    importance.lerp(now, 1 - config.asa_importance_beta),
                    uncertainty.lerp((now - importance).abs(), 1 - config.asa_uncertainty_beta),
                )


def _keep_best(views: list[Any], count: int) -> None:
    """Stop training all subspaces but the `count` most important ones of the whole model."""
    scores = []
    for s in views:
        means = {key: (one * other).mean() for key, (one, other) in s.asa_averages.items()}
        ends = [(i, means.get(("A", i)), means.get(("B", i))) for i in range(s.num_subspaces)]
        scores += [(float(a + b), s, i) for i, a, b in ends if a is not None and b is not None]
        s.asa_averages.clear()
    for rank, (_, s, i) in enumerate(sorted(scores, key=lambda found: found[0], reverse=True)):
        for p in (s.adamss_A[i], s.adamss_B[i]):
            p.requires_grad_(rank < count)
            if rank >= count:
                p.grad = None


class Adamss(Method, config=AdamssConfig):
    tensors = ("adamss_A", "adamss_B")
    default_targets: ClassVar[dict[str, Any]] = {**DEFAULT_TARGETS, "vit": ["query", "value"]}
    counts = ("r", "num_subspaces", "subspace_rank")
    examples = (
        {"r": 6, "num_subspaces": 3, "subspace_rank": 2},
        {"r": 100, "num_subspaces": 4, "subspace_rank": 3, "use_dynamic_rank": True, "svd_threshold": 0.6},
        {"r": 3, "use_asa": True, "init_weights": None},
    )
    model_methods: ClassVar[dict[str, Any]] = {"update_and_allocate": update_and_allocate}

    def make_state(self, config: AdamssConfig, info: LayerInfo, shared: Any) -> State:
        w, b = info.base.read()
        w = w.detach().float()
        if w.is_meta:
            raise ValueError(f"AdaMSS clusters the weight of {info.name!r}, which is on the meta device: load it first")
        if b is not None:
            w = torch.cat((w, b.detach().float().unsqueeze(1)), dim=1)
        devices, r = [] if w.device.type == "cpu" else [w.device], min(config.r, *w.shape)
        with torch.random.fork_rng(devices, device_type=w.device.type):
            torch.manual_seed(config.random_seed)
            u, _, v = torch.svd_lowrank(w, q=r, niter=2)
        u, v = u[:, :r], v[:, :r].T.contiguous()
        clusters = cluster(u, config.num_subspaces)
        place = "meta" if torch.empty(0).is_meta else w.device  # what is trained comes from a file then
        a_parts, b_parts = [], []
        for rows in clusters:
            a = _directions(u[rows], config)
            back = torch.zeros(len(rows), len(a), device=w.device)
            if config.init_weights is None:
                back.normal_().mul_(0.01)
            a_parts.append(nn.Parameter(a.to(place, info.dtype)))
            b_parts.append(nn.Parameter(back.to(place, info.dtype)))
        return {
            "adamss_A": nn.ParameterList(a_parts), "adamss_B": nn.ParameterList(b_parts), "adamss_newB": v,
            "num_subspaces": len(clusters), "scatter_index": nn.Buffer(torch.cat(clusters), persistent=False),
            "asa_averages": {},  # importance and uncertainty of numbers, by "A" or "B" and subspace
        }  # fmt: skip

    def _factors(self, s: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """A V, without and of the column for the bias, and B."""
        v = s.adamss_newB.to(s.adamss_A[0].dtype)
        down = torch.cat(list(s.adamss_A)) @ v
        into = s._layer.info.in_features
        blocks: Tensor = torch.block_diag(*s.adamss_B)  # type: ignore[no-untyped-call]
        up = torch.zeros_like(blocks).index_copy(0, s.scatter_index, blocks)
        return down[:, :into], up, down[:, into] if v.shape[1] > into else None

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        down, up, column = self._factors(s)
        up = up.to(w.dtype)
        added = None if column is None else up @ column.to(w.dtype)
        return w + up @ down.to(w.dtype), b if added is None else added if b is None else b + added

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor] | None:
        down, up, column = self._factors(s)
        return (down, up) if column is None else None

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        down, up, column = self._factors(s)
        return y + F.linear(F.linear(x.to(down.dtype), down, column), up)


def _directions(rows: Tensor, config: AdamssConfig) -> Tensor:
    """A of one cluster: orthonormal directions of its rows of U, in PEFT's order of random numbers."""
    gram = rows @ rows.T
    rank = min(len(rows), config.subspace_rank)
    if config.use_dynamic_rank:
        values = torch.svd_lowrank(gram, q=len(rows), niter=2)[1]
        rank = max(1, min(int((values > config.svd_threshold * values[0]).sum()), rank))
    u = torch.svd_lowrank(gram, q=rank, niter=2)[0][:, :rank]
    directions: Tensor = torch.linalg.qr(rows.T @ u)[0]
    return directions.T.contiguous()
