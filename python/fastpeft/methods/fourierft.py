"""FourierFT: W + scaling * Re(ifft2(S)) with n trained entries of a sparse spectrum S (arXiv 2405.03003).

On activations: two real Fourier transforms per token and n entries between them; see `spectral.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..config.base import HasBias, HasFanInFanOut, HasInitWeights, TargetConfig
from ..weights.base import widened
from .math.spectral import SpectrumMethod, Update, fourier_update
from .method import LayerInfo, State


@dataclass
class FourierFTConfig(HasFanInFanOut, HasBias, HasInitWeights, TargetConfig, own_type="FOURIERFT"):
    """n_frequency: number of trained entries, n_frequency_pattern: by layer. random_loc_seed: of their places.
    init_weights: start with zeros (True) or, as by default, with a standard normal spectrum."""

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool = False


class FourierFT(SpectrumMethod, config=FourierFTConfig):
    tensors = ("fourierft_spectrum",)
    examples = ({"n_frequency": 50}, {"n_frequency": 480, "scaling": 3.0, "init_weights": True, "random_loc_seed": 1})

    def make_state(self, config: FourierFTConfig, info: LayerInfo, shared: Any) -> State:
        spectrum = self.spectrum(config.n_frequency, 1.0)
        if config.init_weights:
            nn.init.zeros_(spectrum)
        return {
            "fourierft_spectrum": spectrum,
            "fourierft_n_frequency": config.n_frequency,
            "fourierft_scaling": config.scaling,
            "fourierft_random_loc_seed": config.random_loc_seed,
            "indices": self.positions(config.n_frequency, config, info),
            "fourierft_shape": (info.out_features, info.in_features),
        }

    def update(self, s: Any) -> tuple[Update, Tensor]:
        rows, columns = s.fourierft_shape
        values = widened(s.fourierft_spectrum) * (s.fourierft_scaling / (rows * columns))
        return fourier_update((rows, columns), s.indices), values
