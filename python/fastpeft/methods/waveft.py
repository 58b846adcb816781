"""WaveFT: W + scaling * the inverse wavelet transform of n trained coefficients at random places (arXiv 2505.12532).

On activations: one level of a 1-D transform per side and token, and n coefficients between them; see `spectral.py`.
use_idwt=False: the coefficients are the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config.base import HasBias, HasFanInFanOut, HasInitWeights, TargetConfig
from ..weights.base import widened
from .math.spectral import SpectrumMethod, Transform, Update, Wavelet
from .math.wavelets import LOW_PASS, filters
from .method import LayerInfo, State


@dataclass
class WaveFTConfig(HasFanInFanOut, HasBias, HasInitWeights, TargetConfig, own_type="WAVEFT"):
    """n_frequency: number of trained coefficients, n_frequency_pattern: by layer; proportional_parameters: share
    n_frequency times the number of layers out by their sizes instead. random_loc_seed: of their places. wavelet_family:
    db1 to db10, sym2 to sym10 or coif1 to coif5. use_idwt: transform, or add them where they are. init_weights: zeros,
    or small random numbers."""

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    proportional_parameters: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wavelet_family not in LOW_PASS:
            valid = f"Supported wavelet families are: {list(LOW_PASS)}"
            text = f"Invalid wavelet_family value: {(name := self.wavelet_family)!r}."
            raise ValueError(f"{text} Wavelet family {name} not supported. {valid}")


class WaveFT(SpectrumMethod, config=WaveFTConfig):
    tensors = ("waveft_spectrum",)
    examples = (
        {"n_frequency": 60}, {"n_frequency": 480, "wavelet_family": "coif1"},
        {"n_frequency": 300, "wavelet_family": "db3", "scaling": 3.0, "init_weights": False},
        {"n_frequency": 40, "use_idwt": False, "random_loc_seed": 1},
        {"n_frequency": 30, "proportional_parameters": True},
    )  # fmt: skip

    def make_shared(self, config: WaveFTConfig, layers: Sequence[LayerInfo]) -> State:
        if not config.proportional_parameters:
            return {}
        sizes = {info.name: info.in_features * info.out_features for info in layers}
        budget, total = config.n_frequency * len(layers), sum(sizes.values())
        return {"counts": {name: max(1, round(size / total * budget)) for name, size in sizes.items()}}

    def make_state(self, config: WaveFTConfig, info: LayerInfo, shared: Any) -> State:
        count = shared.counts[info.name] if config.proportional_parameters else config.n_frequency
        self.check_count(count, info)
        as_given = ("scaling", "random_loc_seed", "wavelet_family", "use_idwt")
        return {
            "waveft_spectrum": self.spectrum(count, 0.0 if config.init_weights else 0.01),
            "waveft_n_frequency": count,
            "waveft_indices": self.positions(count, config, info),
            "waveft_shape": (info.out_features, info.in_features),
            **{f"waveft_{field}": getattr(config, field) for field in as_given},
        }

    def update(self, s: Any) -> tuple[Update, Tensor]:
        values = widened(s.waveft_spectrum) * s.waveft_scaling
        rows, columns = s.waveft_indices
        if not s.waveft_use_idwt:
            n, m = s.waveft_shape
            return Update(Transform(n), Transform(m), rows, columns), values
        out, into = (Wavelet(n, *filters(s.waveft_wavelet_family)) for n in s.waveft_shape)
        # PEFT's matrix of coefficients is as large as both transforms need, with the places in its middle. Its quarter
        # on the right has the high filter along the rows' dimension, the one at the bottom along the columns'.
        rows, columns = rows + (out.size - out.n) // 2, columns + (into.size - into.n) // 2
        half_out, half_in = out.size // 2, into.size // 2
        right, bottom = columns // half_in, torch.div(rows, half_out, rounding_mode="floor")
        return Update(out, into, rows % half_out + right * half_out, columns % half_in + bottom * half_in), values
