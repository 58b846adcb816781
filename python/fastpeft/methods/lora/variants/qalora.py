"""QA-LoRA: A sees the sum of each group of inputs, so that the update fits a quantised weight's zero points
(arXiv 2309.14717).

With groups of g inputs, A is [r, in / g] and acts on the mean of each group times the number of groups, as in PEFT: its
matrix, which is merged exactly, has each column g times over, times in / g^2. PEFT has this for GPTQ layers only and
elsewhere trains a plain LoRA without a word; here every linear layer has it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ....config.base import check
from ...method import LayerInfo, State
from ..lora import Lora
from . import variant


class PooledLinear(nn.Linear):
    """A linear map of the groups of its input."""

    def __init__(self, in_features: int, out_features: int, group: int) -> None:
        super().__init__(in_features // group, out_features, bias=False)
        self.group, self.factor = group, in_features / group**2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(*x.shape[:-1], -1, self.group).sum(-1) * self.factor)

    def matrix(self) -> Tensor:
        return self.weight.repeat_interleave(self.group, dim=1) * self.factor


@variant("use_qalora")
class QaLora(Lora):
    divisors: ClassVar[dict[str, tuple[str, ...]]] = {"qalora_group_size": ("in_features",)}
    examples: ClassVar[Any] = (
        {"r": 4, "use_qalora": True, "qalora_group_size": 4},
        {"r": 2, "use_qalora": True, "qalora_group_size": 12, "lora_bias": True},
    )

    def check_config(self, config: Any, loading: bool = False) -> None:
        super().check_config(config, loading)
        size = config.qalora_group_size
        check(config, "qalora_group_size", isinstance(size, int) and size >= 1, "a positive integer")

    def make_state(self, config: Any, info: LayerInfo, shared: Any) -> State:
        # PEFT makes the pooled A last, with nn.Linear's initialisation whatever init_lora_weights says.
        state = super().make_state(config, info, shared)
        state["lora_A"] = PooledLinear(info.in_features, config.r, config.qalora_group_size)
        return {**state, "qalora_group_size": config.qalora_group_size}
