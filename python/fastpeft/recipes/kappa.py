"""KappaTune: the weights with the lowest condition numbers as targets of adapters (arXiv 2506.16289)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ..files.progress import shown
from ..weights.find import weight_of

MOE_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """Finds such weights, which adapters change with the least harm: linear layers, and parameters of experts."""

    def __init__(
        self, model: nn.Module, max_dim_size_to_analyze: int = 16384, moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.max_dim_size_to_analyze, self.show_progress = model, max_dim_size_to_analyze, show_progress
        self.moe_param_suffixes = moe_param_suffixes or MOE_SUFFIXES

    @functools.cached_property
    def _kappas(self) -> tuple[dict[str, float], dict[str, float]]:
        """Condition numbers of modules and of parameters, by name."""
        most = self.max_dim_size_to_analyze
        bases = [(n, weight_of(m), isinstance(m, nn.Linear)) for n, m in self.model.named_modules()]
        linear = [(n, b) for n, b, plain in bases if b is not None and (plain or b.quantized) and max(b.shape) <= most]
        experts = [(n, p) for n, p in self.model.named_parameters() if n.endswith(self.moe_param_suffixes)]
        experts = [(n, p) for n, p in experts if p.dim() == 3 and max(p.shape[1:]) <= most]
        linear_bar = shown(linear, "Computing SVD (linear layers)", self.show_progress)
        modules = {name: _condition(base.read()[0]) for name, base in linear_bar}
        experts_bar = shown(experts, "Computing SVD (MoE parameters)", self.show_progress)
        return modules, {name: sum(map(_condition, w)) / len(w) for name, w in experts_bar}

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None,
        _parameters: bool = False,
    ) -> list[str]:  # fmt: skip
        """Names of modules, best first: so many, or this share of them, or those below a condition number, or all."""
        kappas = self._kappas[_parameters]
        names = sorted(kappas, key=lambda name: kappas[name])
        if num_modules is not None:
            return names[:num_modules]
        if top_p is not None:
            return names[: max(1, int(len(names) * top_p))]
        return names if threshold is None else [name for name in names if kappas[name] <= threshold]

    # The same of experts' parameters, for `target_parameters`.
    get_best_target_parameters = functools.partialmethod(get_best_targets, _parameters=True)


def find_kappa_target_modules(
    model: nn.Module, top_p: float = 0.2, max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None, show_progress: bool = True,
) -> dict[str, list[str] | None]:  # fmt: skip
    """`target_modules` and `target_parameters` (None without experts) of the share `top_p` with the lowest condition
    numbers. Weights with a side above `max_dim_size_to_analyze` are passed over."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }


def _condition(w: Tensor) -> float:
    s = torch.linalg.svdvals(w.detach().float())
    return float(s[0] / (s[-1] + 1e-8))
