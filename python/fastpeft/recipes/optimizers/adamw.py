"""torch's AdamW with the update of `peft_kernels.adamw`: adapters are many small tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels import adamw


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` for float32 parameters on a CPU: its groups, its state and its numbers.

    State dicts are those of torch's fused AdamW and go either way. Parameters that `peft_kernels.adamw.reason` has
    something against are a ValueError.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, fused=True, **options)
        why = adamw.reason([p for group in self.param_groups for p in group["params"]])
        if why is not None:
            raise ValueError(f"AdamW: {why}: use torch.optim.AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, scale: float = 1.0) -> Any:  # type: ignore[override]
        """One step. scale: multiplies the gradients, which stay as they are (clipping by their norm)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, kept in zip(self.param_groups, self._kept_of_groups(), strict=True):
            tensors = []
            for p in group["params"]:
                if (g := p.grad) is not None:
                    state = self.state[p] or self._begin(p)
                    tensors.append((p, g, state["exp_avg"], state["exp_avg_sq"], state["step"]))
            adamw.update(
                tensors, float(group["lr"]), group["betas"], group["eps"], group["weight_decay"],
                -scale if group["maximize"] else scale, kept,
            )  # fmt: skip
        return loss

    def _begin(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state

    def norm(self, gradients: Sequence[Tensor]) -> float:
        """The norm over gradients; those of the only group need not be looked at again in the step that follows."""
        return adamw.norm(gradients, self._kept_of_groups()[0])

    def _kept_of_groups(self) -> list[adamw.Kept]:
        kept: list[adamw.Kept] = self.__dict__.setdefault("_kept", [])  # torch neither copies nor pickles it
        kept += [adamw.Kept() for _ in range(len(self.param_groups) - len(kept))]
        return kept[: len(self.param_groups)]
