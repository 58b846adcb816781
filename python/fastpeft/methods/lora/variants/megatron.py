"""LoRA on Megatron's parallel linear layers, where `megatron_config` is given. Of a ColumnParallelLinear's adapter B is
one too, of a RowParallelLinear's A, so that Megatron's training, checkpoints and sequence parallelism know them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....weights.megatron import COLUMN, ROW, MegatronWeight
from ...method import Inner, LayerInfo, State
from ..lora import Lora
from . import variant

ALLOWED = ("megatron",)  # packages that `megatron_core` may name; it is not imported to find the layers' classes


@variant("megatron_config")
class MegatronLora(Lora):
    """megatron_config: the TransformerConfig of the model, or its arguments. On layers that are not Megatron's it is
    plain LoRA. State dicts have this process's parts, as Megatron's own: its checkpoints join them."""

    kinds = Lora.kinds
    parallel = frozenset({"megatron"})
    examples: ClassVar[Any] = ()

    def check_config(self, config: Any, loading: bool = False) -> None:
        super().check_config(config, loading)
        if not any(str(config.megatron_core).startswith(f"{name}.") for name in ALLOWED):
            raise ValueError(
                f"config.megatron_core={config.megatron_core!r} does not start with a valid prefix {list(ALLOWED)}, "
                "which is unsupported due to being a potential security risk."
            )

    def check_layer(self, config: Any, info: LayerInfo) -> None:
        super().check_layer(config, info)
        if info.base.parallel and config.lora_bias:
            raise ValueError(f"LoraParallelLinear ({info.name!r}) does not support lora_bias yet, set it to False")

    def parted(self, config: Any, state: State, info: LayerInfo) -> None:
        base: Any = info.base
        assert isinstance(base, MegatronWeight)
        module, dim = base.module, base.split_dim
        group, name = base.group, "BA"[dim]
        with torch.no_grad():
            for entry in ("lora_A", "lora_B"):
                weight = state[entry].weight
                if not weight.is_meta:
                    torch.distributed.broadcast(weight, group=group, group_src=0)
                # whoever gets a part of the sequence has a part of the gradient, which Megatron adds up
                weight.sequence_parallel = bool(getattr(module, "sequence_parallel", False))
            whole = state[f"lora_{name}"]
            part = _parallel(config, module, whole, dim)
            step = part.weight.shape[dim]
            first = torch.distributed.get_rank(group) * step
            if whole.weight.is_meta:
                part = part.to("meta")
            else:
                part.to(whole.weight.device, whole.weight.dtype)
                part.weight.copy_(whole.weight.narrow(dim, first, step))
        state[f"lora_{name}"] = part

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        if not inner.info.base.parallel:
            return super().output(s, shared, x, y, inner)
        low = _first(s.lora_A(s.lora_dropout(s.cast(x, s.lora_A.weight.dtype))))
        added: Tensor = _first(s.lora_B(low)) * s.scaling
        return y + added


def _first(output: Any) -> Tensor:
    """An output without the bias that Megatron's layers return beside it."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _class(module: nn.Module, name: str) -> Callable[..., Any]:
    """Megatron's own class of a layer that may be of a subclass."""
    return next(c for c in type(module).__mro__ if c.__name__ == name and c.__module__.split(".")[0] in ALLOWED)


def _parallel(config: Any, module: Any, whole: nn.Linear, dim: int) -> Any:
    """A layer of Megatron's as the base layer is, with the sizes of a whole A or B. Its weight is to be filled."""
    given = config.megatron_config
    settings = copy.copy(type(module.config)(**given) if isinstance(given, dict) else given)
    settings.params_dtype, settings.perform_initialization = whole.weight.dtype, False
    settings.use_cpu_initialization = settings.use_cpu_initialization or not whole.weight.is_cuda
    options: dict[str, Any] = {"is_expert": module.is_expert}
    if hasattr(module, "tp_group"):
        options["tp_group"] = module.tp_group
    if dim == 0:
        options |= {"gather_output": module.gather_output}
    else:
        options |= {"input_is_parallel": module.input_is_parallel, "skip_bias_add": True}
    make = _class(module, (COLUMN, ROW)[dim])
    options |= {"config": settings, "init_method": nn.init.xavier_normal_, "bias": False}
    return make(whole.in_features, whole.out_features, **options)
