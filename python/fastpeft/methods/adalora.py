"""AdaLoRA: W + scaling / r * B diag(E) A, of which training keeps the ranks that matter (arXiv 2303.10512).

`model.update_and_allocate(step)` after each optimizer's step gives the budget out (`rank_allocator.py`), and a loss
that the model returns has `orth_reg_weight` times the mean of |A A^T - 1| and |B^T B - 1| added. A file holds the ranks
that were kept, which its configuration's `rank_pattern` names; a loaded adapter has only those. As in PEFT, "/ r" is by
the rank at the start. One active adapter is one call of `lora_linear` with diag(E) A in A's place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.targets import DEFAULT_TARGETS, by_type
from ..config.types import warn
from ..files.checks import PREFIX
from .lora.lora import LoraConfig
from .math import rank_allocator as ranks
from .math.draws import drawn_normal, normal_
from .math.factored import FactoredMethod, dropout
from .method import AdaptedLayer, Inner, LayerInfo, State


@dataclass
class AdaLoraConfig(LoraConfig, own_type="ADALORA"):
    """Of LoRA's fields those that name targets, lora_alpha, lora_dropout, init_lora_weights (a bool) and bias act.

    init_r, target_r: mean rank of the layers at the start and in the end. tinit, tfinal: steps before and after the
    budget falls, of total_step. deltaT: steps between two allocations. beta1, beta2: smoothing of importance and of its
    uncertainty. orth_reg_weight: of the orthogonality of A and B in the loss. rank_pattern: the ranks that were kept.
    """

    rank_pattern: dict[str, Any] | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("DoRA", self.use_dora), ("LOFTQ", self.loftq_config)):
            if value:
                raise ValueError(f"ADALORA does not support {name}, which has no meaning for it.")
        if self.r != LoraConfig.r:
            warn("Note that `r` is not used in AdaLora and will be ignored. The rank at the start is `init_r`.")
        if self.orth_reg_weight < 0:
            given = f"but the value passed is {self.orth_reg_weight}"
            raise ValueError(f"`orth_reg_weight` should be greater than or equal to 0, {given}")
        if self.total_step is None or self.total_step <= 0:
            raise ValueError(
                f"AdaLoRA does not work when `total_step` is None, supply a value > 0. Got {self.total_step!r}."
            )
        if not 0 <= self.tinit < self.total_step - self.tfinal or self.deltaT < 1:
            raise ValueError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or increase "
                f"`total_step`, and let `deltaT` be at least 1. Got tinit={self.tinit!r}, tfinal={self.tfinal!r}, "
                f"total_step={self.total_step!r}, deltaT={self.deltaT!r}."
            )
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise ValueError(f"`beta1` and `beta2` should be in (0, 1), got {self.beta1} and {self.beta2}")


# LoRA's options that have no meaning here; PEFT passes over them.
WITHOUT_MEANING = (
    "use_rslora", "lora_bias", "alpha_pattern", "use_qalora", "use_bdlora", "velora_config",
    "monteclora_config", "kasa_config", "alora_invocation_tokens", "arrow_config", "eva_config", "corda_config",
    "lora_ga_config", "layer_replication", "target_parameters", "trainable_token_indices", "megatron_config",
)  # fmt: skip


class AdaLora(FactoredMethod, config=AdaLoraConfig):
    prefix = "lora_"
    tensors = tuple(ranks.RANK_DIM)
    dropout = "lora_dropout"
    kinds = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
    default_targets: ClassVar[dict[str, Any]] = DEFAULT_TARGETS | by_type({
        "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt", "q k v o wi wo": "t5", "q k v o wi_0 wi_1 wo": "mt5",
        "query key value dense": "roberta", "query_proj key_proj value_proj dense": "deberta-v2",
    })  # fmt: skip
    counts = ("r", "init_r", "target_r")
    examples = ({"init_r": 4, "total_step": 9, "lora_alpha": 3}, {"init_r": 2, "total_step": 9, "lora_alpha": 0})
    model_methods: ClassVar[dict[str, Any]] = {
        f.__name__: f for f in (ranks.update_and_allocate, ranks.resize_modules_by_rank_pattern)
    }

    def check_config(self, config: AdaLoraConfig, loading: bool = False) -> None:
        super().check_config(config, loading)
        odd = [name for name in WITHOUT_MEANING if getattr(config, name)]
        if odd and not loading:
            raise ValueError(f"AdaLoraConfig({odd[0]}={getattr(config, odd[0])!r}) has no meaning for AdaLoRA.")
        if config.init_lora_weights not in (True, False) and not loading:
            raise ValueError(f"AdaLoRA's init_lora_weights is a bool, got {config.init_lora_weights!r}.")

    def make_state(self, config: AdaLoraConfig, info: LayerInfo, shared: Any) -> State:
        r, columns = config.init_r, math.prod(info.shape[1:])
        a, e, b = drawn_normal(r, columns), drawn_normal(r, 1), drawn_normal(info.out_features, r)  # in PEFT's order
        ranknum = drawn_normal(1).fill_(float(r))
        if config.init_lora_weights:
            e.zero_()
            normal_(a, std=0.02)
            normal_(b, std=0.02)
        return {
            "lora_A": nn.Parameter(a), "lora_B": nn.Parameter(b), "lora_E": nn.Parameter(e),
            "r": r, "lora_alpha": config.lora_alpha,
            "scaling": config.lora_alpha if config.lora_alpha > 0 else float(r),
            "lora_dropout": dropout(config.lora_dropout), "ranknum": nn.Parameter(ranknum, requires_grad=False),
        }  # fmt: skip

    # Files

    def pack(self, config: AdaLoraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = ranks.by_layer(config.rank_pattern or {})
        packed = {key: t for key, t in tensors.items() if not key.endswith(".ranknum")}  # it follows from the pattern
        for key, tensor in packed.items():
            layer, _, part = key.removeprefix(PREFIX).rpartition(".")
            own, dim = kept.get(layer), ranks.RANK_DIM.get(part)
            if own and dim is not None and len(own) == tensor.shape[dim]:
                packed[key] = ranks.select(part, tensor, own)
        return packed

    def unpack(self, config: AdaLoraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        layers = [key.removesuffix("lora_E") for key in tensors if key.endswith(".lora_E")]
        return tensors | {f"{layer}ranknum": torch.tensor([float(config.init_r)]) for layer in layers}

    def make_room(
        self, layer: AdaptedLayer, adapter: str, tensors: Mapping[str, Tensor]
    ) -> Callable[[], None] | None:
        old = {part: getattr(layer, part)[adapter] for part in ranks.RANK_DIM}
        r = len(tensors.get("lora_E", old["lora_E"]))
        shapes = {"lora_A": (r, old["lora_A"].shape[1]), "lora_B": (len(old["lora_B"]), r), "lora_E": (r, 1)}
        fits = all(part in tensors and tensors[part].shape == shape for part, shape in shapes.items())
        if not fits or r == len(old["lora_E"]):
            return None
        ranks.install(layer, adapter, {part: old[part].detach().new_zeros(shape) for part, shape in shapes.items()})
        return functools.partial(ranks.install, layer, adapter, old)

    # Math

    def factors(self, s: Any, shared: Any, w: Tensor | None) -> tuple[Tensor, Tensor]:
        # The scale goes where there are fewest numbers.
        return s.lora_A * (s.lora_E * (s.scaling / (s.ranknum + 1e-5))), s.lora_B

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        info = inner.info
        if info.kind == "linear":
            return super().output(s, shared, x, y, inner)
        a, b = self.factors(s, shared, None)
        x = s.lora_dropout(x.to(a.dtype))
        if info.groups > 1 or not len(a):
            return y + inner.apply(x, (b @ a).reshape(info.shape))
        low = inner.apply(x, a.reshape(-1, *info.shape[1:]))
        return y + F.linear(low.movedim(1, -1), b).movedim(-1, 1)

    def _fusible(self, s: Any) -> bool:
        return len(s.lora_E) > 0

    def scale(self, s: Any) -> float | None:
        return float(s.lora_alpha if s.lora_alpha > 0 else s.ranknum.item())

    def model_output(self, tuner: Any, adapter: str, output: Any) -> Any:
        loss, weight = getattr(output, "loss", None), tuner.peft_config[adapter].orth_reg_weight
        if not isinstance(loss, Tensor):
            return output
        pairs = ((layer.lora_A[adapter], layer.lora_B[adapter].t()) for _, layer in ranks.layers_of(tuner, adapter))
        trained = [m for pair in pairs for m in pair if m.requires_grad]
        losses = [(m @ m.t() - torch.eye(len(m), device=m.device, dtype=m.dtype)).norm() for m in trained]
        if losses:
            output.loss = loss + weight * sum(part.to(loss.device) for part in losses) / len(losses)
        return output
