"""KaSA: W + scaling * B diag(d) A on a base without its r smallest singular components (arXiv 2412.06071).

d [r] is learned, as are A and B, which starts at zero. The truncation is a base edit (`base_edit.py`): deleting the
adapter brings the base back; 4-bit and 8-bit bases are requantised without these components, where PEFT leaves them as
they are and drops d without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....config.seen_as_peft import SeenAsPeft
from ...base_edit import EDIT, BaseEdit
from ...math.draws import drawn_normal
from ...method import Inner, LayerInfo, State
from ..lora import Lora
from ..start import start_of
from . import variant, views


@dataclass
class KasaConfig(SeenAsPeft):
    """Weights of the two regularisers that `model._get_kasa_loss()` gives, to be added to the task's loss: beta of
    |d|^2, gamma of |B'B - I| + |AA' - I|."""

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Truncation(BaseEdit):
    """The edit of the base: W without its r smallest singular components."""

    r: int
    once = True

    def __call__(self, w: Tensor) -> Tensor:
        p, q = _components(w, slice(None, -self.r))
        return p @ q

    def removed_factors(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return _components(w, slice(-self.r, None))


def _components(w: Tensor, which: slice) -> tuple[Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, which] * sigma[which], vh[which]


def kasa_loss(tuner: Any, adapter_names: str | list[str] | None = None) -> Tensor | float:
    """The regularisers of the adapters (None: the active ones), summed over layers; 0.0 if none is a KaSA."""
    total: Tensor | float = 0.0
    for name, s in views(tuner, adapter_names, Kasa):
        config = tuner.peft_config[name].kasa_config
        a, b, d = s.lora_A.weight.float(), s.lora_B.weight.float(), s.lora_diag.float()
        eye = torch.eye(len(d), device=d.device)
        off = torch.linalg.norm(b.T @ b - eye) + torch.linalg.norm(a @ a.T - eye)
        total = total + config.beta * d.square().sum() + config.gamma * off
    return total


@variant("kasa_config", KasaConfig)
class Kasa(Lora):
    tensors = (*Lora.tensors, "lora_diag")
    examples: ClassVar[Any] = ({"r": 4, "lora_alpha": 3, "kasa_config": KasaConfig()},)
    model_methods: ClassVar[Any] = {"_get_kasa_loss": kasa_loss}

    def check_config(self, config: Any, loading: bool = False) -> None:
        super().check_config(config, loading)
        start = start_of(config.init_lora_weights)
        if start is not None and start.edits_base:
            raise ValueError(f"kasa_config cannot be combined with init_lora_weights={config.init_lora_weights!r}.")

    def check_layer(self, config: Any, info: LayerInfo) -> None:
        super().check_layer(config, info)
        most = min(info.out_features, info.in_features)
        if config.r >= most:
            limit = f"smaller than min(in_features, out_features) ({most}) of {info.name!r}"
            raise ValueError(f"KaSA requires `r` ({config.r}) to be {limit}: else nothing of the base weight is left.")

    def make_state(self, config: Any, info: LayerInfo, shared: Any) -> State:
        state = super().make_state(config, info, shared)
        return {**state, "lora_diag": nn.Parameter(drawn_normal(config.r)), EDIT: Truncation(config.r)}

    def matrices(self, s: Any) -> tuple[Tensor, Tensor]:
        a, b = super().matrices(s)
        return a, b * s.lora_diag.to(b.dtype)

    def drawn(self, s: Any) -> tuple[Tensor, Tensor]:
        return self.matrices(s)

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        h = s.lora_A(s.lora_dropout(s.cast(x, s.lora_A.weight.dtype)))
        return y + s.lora_B(h * s.lora_diag) * s.scaling  # type: ignore[no-any-return]
