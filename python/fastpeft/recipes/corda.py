"""CorDA: the SVD of W, oriented by the covariance of the layer's inputs (arXiv 2406.05223).

With C the covariance, W C = U S V'; the adapter takes r components of U S (V' C^-1): the largest ("ipm", to learn what
the samples are about) or the smallest ("kpm", to keep what the samples know).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..files.progress import shown
from ..methods.lora.start.corda import EIGENS, CordaConfig, CordaEigens
from .layers_of import TargetLayer, load_tensors, means_over_passes, save_tensors, target_layers


def components(w: Tensor, covariance: Tensor, r: int, method: str) -> CordaEigens:
    """The r components of W [out, in] for the covariance of its inputs [in, in], damped until it can be inverted."""
    covariance = covariance.to(w)
    eye = torch.eye(covariance.shape[0], dtype=w.dtype, device=w.device)
    if not torch.isfinite(covariance).all() or covariance.diagonal().mean() <= 0:
        raise ValueError("the covariance of the layer's inputs is zero or not finite")
    damp = 0.01
    while True:
        damped = covariance + torch.diag(torch.ones_like(covariance[0]) * covariance.diagonal().mean() * damp)
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            break
        damp *= 2
    u, s, vh = torch.linalg.svd(w @ damped, full_matrices=False)
    v = (vh @ inverse).t()
    taken = slice(None, r) if method == "ipm" else slice(-r, None)
    return CordaEigens(s[taken].clone(), u[:, taken].clone(), v[:, taken].clone())


@torch.no_grad()
def preprocess_corda(
    model: nn.Module, lora_config: Any, run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:  # fmt: skip
    """Compute what CorDA starts from. To be called before `get_peft_model`, which uses it up.

    run_model: runs the model on samples, so that the layers' inputs are seen; not needed where a file of
    `lora_config.corda_config` has the result. hooked_model: the model that `run_model` runs, if it is another.
    """
    config: CordaConfig = lora_config.corda_config or CordaConfig()
    layers = target_layers(model, lora_config)
    parts = ("S_WC", "U_WC", "V_WC")
    found = load_tensors(config.cache_file, [f"{name}.{EIGENS}.{part}" for name in layers for part in parts])
    if found is None:
        covariances = load_tensors(config.covariance_file, list(layers))
        if covariances is None:
            if run_model is None:
                raise ValueError("preprocess_corda needs `run_model`, since no file has the covariances or the result.")
            watched = layers if hooked_model is None else target_layers(hooked_model, lora_config)
            hook = functools.partial(_covariance, config.use_float16_for_covariance)
            covariances = means_over_passes(hooked_model or model, watched, run_model, False, hook)
            covariances = {name: c for name, c in covariances.items() if name in layers}
            save_tensors(config.covariance_file, covariances)
        missing = sorted(set(layers) - set(covariances))
        if missing:
            raise ValueError(f"`run_model` did not run {', '.join(missing[:5])}: there is no covariance of its inputs.")
        found = {}
        for name, layer in shown(layers.items(), "Collecting eigens", config.verbose):
            eigens = components(layer.info.weight(), covariances[name], layer.r, config.corda_method)
            found |= {f"{name}.{EIGENS}.{part}": getattr(eigens, part) for part in parts}
        save_tensors(config.cache_file, found)
    for name, layer in layers.items():
        setattr(layer.info.module, EIGENS, CordaEigens(*(found[f"{name}.{EIGENS}.{part}"] for part in parts)))


def _covariance(half: bool, layer: TargetLayer, x: Tensor, output: Any, add: Callable[[Tensor], None]) -> None:
    """Add x' x of a layer's inputs in one forward pass, scaled by its largest input."""
    x = x if half else x.float()
    x = x / torch.max(x).abs()
    covariance = x.t() @ x
    if not torch.isfinite(covariance).all():
        raise ValueError(f"the inputs of {layer.info.name} hold, or their covariance overflows to, NaN or infinity")
    add(covariance)
