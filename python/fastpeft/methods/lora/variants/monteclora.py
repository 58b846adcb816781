"""MonteCLoRA: in training A is a mean over random draws around it, with a learned spread (arXiv 2411.04358).

A draw adds sample_scaler * z L to A^T, with z normal and L L^T a Wishart sample scaled by exp(std_prior); the draws are
weighted by an approximate Dirichlet sample around exp(expert_weights_prior). Of the Wishart sample only the diagonal is
used, independent chi-squared numbers, so that L is r numbers, drawn when they are needed: PEFT keeps `buffer_size`
draws in every layer, 75 MiB each on 2048 inputs. The distribution is PEFT's, the stream of random numbers is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....config.base import check
from ....config.seen_as_peft import SeenAsPeft
from ...math.draws import drawn_uniform
from ...method import Inner, LayerInfo, State
from ..lora import Lora
from . import variant, views

MAX_SAMPLES = 1 << 12


@dataclass
class MontecloraConfig(SeenAsPeft):
    """num_samples: draws in a forward. use_entropy: add the sum of squared weights of the draws to the loss.
    dirichlet_prior: of the weights of the draws. sample_scaler: size of the noise. kl_loss_weight: of the divergence
    from the priors in the loss. buffer_size: accepted; nothing is buffered here."""

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            check(self, name, getattr(self, name) > 0, "greater than 0")
        check(self, "num_samples", self.num_samples <= MAX_SAMPLES, f"at most {MAX_SAMPLES}")


class Sampler(nn.Module):
    """The spread of one A and the weights of its draws; its buffers are those of the last draw, as PEFT saves them."""

    gaussian_var_prior: Tensor
    expert_weights: Tensor

    def __init__(self, r: int, config: MontecloraConfig) -> None:
        super().__init__()
        self.config = config
        self.std_prior = nn.Parameter(drawn_uniform(r))
        self.expert_weights_prior = nn.Parameter(drawn_uniform(config.num_samples))
        self.register_buffer("gaussian_var_prior", torch.eye(r))
        self.register_buffer("expert_weights", torch.ones(config.num_samples) / config.num_samples)
        self.drawn: tuple[Tensor, Tensor] | None = None  # variances and weights of the last draw, for the loss

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "drawn": None}  # a graph cannot be copied

    def noise(self, in_features: int) -> Tensor:
        """The part of the mean of a new draw beside A: [r, in_features]."""
        n, r, std = self.config.num_samples, len(self.std_prior), self.std_prior
        chi2 = torch.randn(r, r, device=std.device, dtype=std.dtype).square().sum(1)
        variances = (chi2 * (2 * std).exp()).clamp(min=1e-3)
        alpha = self.expert_weights_prior.exp().clamp(min=1e-6)
        spread = (1 - 2 / n) / alpha + (1 / alpha).sum() / n**2
        logits = (spread.clamp(min=1e-6) + 1e-6).sqrt() * torch.randn_like(spread) + alpha.log() - alpha.log().mean()
        weights = logits.softmax(-1)
        with torch.no_grad():
            self.gaussian_var_prior.copy_(variances.diag())
            self.expert_weights.copy_(weights)
        self.drawn = variances, weights
        z = torch.randn(n, r, in_features, device=std.device, dtype=std.dtype)
        mean = torch.einsum("n,nri->ri", weights, z)
        return mean * (self.config.sample_scaler * variances.sqrt()).unsqueeze(1)

    def get_variational_loss(self) -> tuple[Tensor | float, Tensor | float]:
        """(weighted divergence from the priors, entropy of the draws' weights) in training, else zeros."""
        if not self.training:
            return 0.0, 0.0
        n, r = self.config.num_samples, len(self.std_prior)
        variances, weights = self.drawn or (self.gaussian_var_prior.diagonal(), self.expert_weights)
        alpha = self.expert_weights_prior.exp()
        prior = torch.full_like(alpha, self.config.dirichlet_prior)
        dirichlet = (
            torch.lgamma(alpha.sum()) - torch.lgamma(prior.sum()) + (torch.lgamma(alpha) - torch.lgamma(prior)).sum()
            + ((alpha - prior) * (torch.digamma(alpha) - torch.digamma(alpha.sum()))).sum()
        )  # fmt: skip
        spread = (2 * self.std_prior).exp()
        wishart = 0.5 * r * (spread.sum() - spread.log().sum() - r)
        variances = variances.clamp(min=1e-6)
        normal = 0.5 * n * (variances.sum() - variances.log().sum() - r)
        entropy = weights.square().sum() if self.config.use_entropy else 0.0
        return self.config.kl_loss_weight * (dirichlet + wishart + normal), entropy


def monteclora_loss(tuner: Any, adapter_names: str | list[str] | None = None) -> Tensor | float:
    """The mean over layers of the adapters' variational loss, to be added to the task's (None: the active ones)."""
    samplers = [s.lora_monteclora_sampler for _, s in views(tuner, adapter_names, MonteClora)]
    losses = [part for sampler in samplers for part in sampler.get_variational_loss()]
    return sum(losses) / len(samplers) if samplers else 0.0


@variant("monteclora_config", MontecloraConfig)
class MonteClora(Lora):
    tensors = (*Lora.tensors, "lora_monteclora_sampler")
    model_methods: ClassVar[Any] = {"_get_monteclora_loss": monteclora_loss}
    examples: ClassVar[Any] = ({"r": 3, "monteclora_config": MontecloraConfig(num_samples=3)},)

    def make_state(self, config: Any, info: LayerInfo, shared: Any) -> State:
        state = super().make_state(config, info, shared)
        return {**state, "lora_monteclora_sampler": Sampler(config.r, config.monteclora_config)}

    def drawn(self, s: Any) -> tuple[Tensor, Tensor]:
        a, b = self.matrices(s)
        sampler: Sampler = s.lora_monteclora_sampler
        return (a + sampler.noise(a.shape[1]).to(a.dtype) if sampler.training else a), b

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        a = self.drawn(s)[0]
        return y + s.lora_B(F.linear(s.lora_dropout(x.to(a.dtype)), a)) * s.scaling  # type: ignore[no-any-return]
