"""IA3: a learned factor per output channel, or per input channel of feedforward layers (arXiv 2205.05638).

W -> diag(l) W and b -> l b, or W -> W diag(l). Elementwise on activations: no FLOPs of the order of the layer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..config.base import HasFanInFanOut, TargetConfig
from ..config.targets import DEFAULT_TARGETS, by_type, select
from .math.draws import drawn_normal
from .method import Inner, LayerInfo, Method, State

# PEFT's table: what is adapted of each model type, and which of it is feedforward.
FEEDFORWARD = {"mt5": []} | by_type({
    "down_proj": "gemma gemma2 gemma3_text llama llama4 mistral qwen2 qwen3", "fc2": "bart opt phi", "w2": "mixtral",
    "dense_4h_to_h": "falcon gpt_neox RefinedWeb RefinedWebModel", "mlp.dense_4h_to_h": "bloom", "fc_out": "gptj",
    "output.dense": "bert deberta deberta-v2 roberta", "mlp.c_proj": "gpt2 gpt_bigcode", "c_proj": "gpt_neo",
    "wo": "t5",
})  # fmt: skip
_ATTENTION = by_type({
    "k_proj v_proj": "llama mistral mixtral", "key value": "bert roberta", "key_proj value_proj": "deberta-v2",
    "k v": "t5", "k v wi_1": "mt5", "q_proj k_proj": "opt", "q_proj v_proj": "phi",
})  # fmt: skip


@dataclass
class IA3Config(HasFanInFanOut, TargetConfig, own_type="IA3"):
    """feedforward_modules: those of the target modules whose input is scaled instead of their output: ends of names, or
    a regular expression; None for the model type's default. init_ia3_weights: start at one."""

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


class IA3(Method, config=IA3Config):
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
        return w * columns.reshape(*w.shape[:2], *[1] * (w.dim() - 2)), b

    def input(self, s: Any, shared: Any, x: Tensor) -> Tensor:
        return (x * _factor(s.ia3_l)).to(x.dtype) if s.is_feedforward else x

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        return y if s.is_feedforward else y * _factor(s.ia3_l)


def _factor(scale: Tensor) -> Tensor:
    """The vector as it multiplies activations, with or without a batch dimension."""
    return scale.flatten() if scale.dim() == 2 else scale.squeeze(0)
