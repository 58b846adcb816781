"""Megatron's two parallel linear layers as far as adapters know them, for where megatron-core is not installed.

`install()` makes `megatron.core` importable with them; the tests run on megatron-core itself where it is there. As in
Megatron 0.16 a layer computes with its part of the weight, returns (output, bias), and has `tp_group` and `config`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class TransformerConfig:
    num_layers: int = 1
    hidden_size: int = 8
    num_attention_heads: int = 1
    use_cpu_initialization: bool = False
    perform_initialization: bool = True
    params_dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    tensor_model_parallel_size: int = 1


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.chunk(dist.get_world_size(), -1)[dist.get_rank()].contiguous()


class _Parallel(nn.Module):
    def __init__(
        self, input_size: int, output_size: int, dim: int, config: Any, init_method: Any, bias: bool,
        skip_bias_add: bool, is_expert: bool, tp_group: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.input_size, self.output_size, self.config = input_size, output_size, config
        self.skip_bias_add, self.is_expert = skip_bias_add, is_expert
        self.tp_group = tp_group or dist.group.WORLD
        self.sequence_parallel = config.sequence_parallel
        assert config.use_cpu_initialization  # Megatron's other way needs CUDA
        whole = torch.empty(output_size, input_size, dtype=config.params_dtype)
        if config.perform_initialization:
            init_method(whole)
        self.weight = nn.Parameter(whole.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone())
        size = self.weight.shape[0] if dim == 0 else output_size
        self.register_parameter("bias", nn.Parameter(torch.zeros(size, dtype=config.params_dtype)) if bias else None)

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass


class ColumnParallelLinear(_Parallel):
    def __init__(
        self, input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool = True,
        gather_output: bool = False, skip_bias_add: bool = False, is_expert: bool = False, tp_group: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(input_size, output_size, 0, config, init_method, bias, skip_bias_add, is_expert, tp_group)
        self.gather_output = gather_output

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = F.linear(_Copy.apply(x), self.weight, None if self.skip_bias_add else self.bias)
        return _Gather.apply(y) if self.gather_output else y, self.bias if self.skip_bias_add else None


class RowParallelLinear(_Parallel):
    def __init__(
        self, input_size: int, output_size: int, *, config: Any, init_method: Any, bias: bool, input_is_parallel: bool,
        skip_bias_add: bool, is_expert: bool = False, tp_group: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(input_size, output_size, 1, config, init_method, bias, skip_bias_add, is_expert, tp_group)
        self.input_is_parallel = input_is_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.input_is_parallel:
            x = _Copy.apply(x).chunk(dist.get_world_size(), -1)[dist.get_rank()]
        y = _Reduce.apply(F.linear(x, self.weight))
        if self.skip_bias_add or self.bias is None:
            return y, self.bias
        return y + self.bias, None


def install() -> None:
    """Let `import megatron.core.tensor_parallel` find the stand-ins."""
    made = {name: ModuleType(name) for name in ("megatron", "megatron.core", "megatron.core.tensor_parallel")}
    for cls in (ColumnParallelLinear, RowParallelLinear):
        cls.__module__ = "megatron.core.tensor_parallel.layers"
        setattr(made["megatron.core.tensor_parallel"], cls.__name__, cls)
    made["megatron.core"].tensor_parallel = made["megatron.core.tensor_parallel"]  # type: ignore[attr-defined]
    sys.modules.update(made)
