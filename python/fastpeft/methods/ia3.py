"""IA3: a learned factor per output channel, or per input channel of feedforward layers (arXiv 2205.05638).

W -> diag(l) W and b -> l b, or W -> W diag(l). Elementwise on activations: no FLOPs of the order of the layer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..config.base import HasFanInFanOut, TargetConfig
from ..config.targets import DEFAULT_TARGETS, select
from ..config.types import PeftType
from .math.draws import drawn_normal
from .method import Inner, LayerInfo, Method, State

# PEFT's table: what is adapted of each model type, and which of it is feedforward.
FEEDFORWARD = {
    "bart": ["fc2"], "bert": ["output.dense"], "bloom": ["mlp.dense_4h_to_h"], "deberta": ["output.dense"],
    "deberta-v2": ["output.dense"], "falcon": ["dense_4h_to_h"], "gemma": ["down_proj"], "gemma2": ["down_proj"],
    "gemma3_text": ["down_proj"], "gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"], "gpt_neo": ["c_proj"],
    "gpt_neox": ["dense_4h_to_h"], "gptj": ["fc_out"], "llama": ["down_proj"], "llama4": ["down_proj"],
    "mistral": ["down_proj"], "mixtral": ["w2"], "mt5": [], "opt": ["fc2"], "phi": ["fc2"], "qwen2": ["down_proj"],
    "qwen3": ["down_proj"], "RefinedWeb": ["dense_4h_to_h"], "RefinedWebModel": ["dense_4h_to_h"],
    "roberta": ["output.dense"], "t5": ["wo"],
}  # fmt: skip
_ATTENTION = {
    "bert": ["key", "value"], "deberta-v2": ["key_proj", "value_proj"], "llama": ["k_proj", "v_proj"],
    "mistral": ["k_proj", "v_proj"], "mixtral": ["k_proj", "v_proj"], "mt5": ["k", "v", "wi_1"],
    "opt": ["q_proj", "k_proj"], "phi": ["q_proj", "v_proj"], "roberta": ["key", "value"], "t5": ["k", "v"],
}  # fmt: skip


@dataclass
class IA3Config(HasFanInFanOut, TargetConfig):
    """feedforward_modules: those of the target modules whose input is scaled instead of their output: ends of names, or
    a regular expression; None for the model type's default. init_ia3_weights: start at one."""

    own_type = PeftType.IA3
    not_in_peft = ("layers_to_transform", "layers_pattern")

    feedforward_modules: list[str] | set[str] | str | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)
        ends, targets = self.feedforward_modules, self.target_modules
        if isinstance(ends, set) and isinstance(targets, set) and not ends <= targets:
            raise ValueError("`feedforward_modules` should be a subset of `target_modules`")


class IA3(Method):
    prefix = "ia3_"
    config_class = IA3Config
    tensors = ("ia3_l",)
    kinds = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
    default_targets: ClassVar[dict[str, Any]] = {
        name: [*_ATTENTION.get(name, DEFAULT_TARGETS[name]), *inner] for name, inner in FEEDFORWARD.items()
    }
    examples = ({"feedforward_modules": []}, {"feedforward_modules": ".*", "init_ia3_weights": False})

    def open_fields(self, config: IA3Config, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        if config.feedforward_modules is not None:
            return {}
        if model_type not in FEEDFORWARD:
            raise ValueError("Please specify `feedforward_modules` in `peft_config`")
        return {"feedforward_modules": set(FEEDFORWARD[model_type])}

    def make_state(self, config: IA3Config, info: LayerInfo, shared: Any) -> State:
        ends = config.feedforward_modules or ()
        # As PEFT: an end of the name, whatever stands before it.
        feedforward = bool(select(ends, [info.name])) if isinstance(ends, str) else info.name.endswith(tuple(ends))
        n = info.in_features if feedforward else info.out_features
        shape = (1, n) if feedforward or info.kind != "linear" else (n, 1)
        scale = drawn_normal(*shape, *[1] * (len(info.shape) - 2))
        if config.init_ia3_weights:
            scale.fill_(1.0)
        return {"ia3_l": nn.Parameter(scale), "is_feedforward": feedforward}

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = s.ia3_l.flatten().to(w.dtype)
        if not s.is_feedforward:
            return w * scale.view(-1, *[1] * (w.dim() - 1)), None if b is None else b * scale
        # In a grouped convolution W holds, for each output channel, its own group's inputs.
        columns = scale.view(-1, 1, w.shape[1]).expand(-1, w.shape[0] * w.shape[1] // len(scale), -1)
        return w * columns.reshape(w.shape[0], w.shape[1], *[1] * (w.dim() - 2)), b

    def input(self, s: Any, shared: Any, x: Tensor) -> Tensor:
        return (x * _factor(s.ia3_l)).to(x.dtype) if s.is_feedforward else x

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        return y if s.is_feedforward else y * _factor(s.ia3_l)


def _factor(scale: Tensor) -> Tensor:
    """The vector as it multiplies activations, with or without a batch dimension."""
    return scale.flatten() if scale.dim() == 2 else scale.squeeze(0)
