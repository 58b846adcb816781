"""A part of what two processes do for tests/fastpeft/test_parallel.py.

LoRA on Megatron's parallel layers, beside LoRA on dense layers of the same weights in the same process.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import fastpeft
import torch
import torch.distributed as dist
from torch import Tensor, nn

REAL = importlib.util.find_spec("megatron") is not None
SETTINGS: dict[str, Any] = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 4, "use_cpu_initialization": True}
# gather_output and input_is_parallel, skip_bias_add of the first layer, sequence parallelism, settings as a dictionary
CASES = {
    "parts": (False, False, False, False), "whole": (True, False, False, True), "bias": (False, True, False, False),
    **({"sequence": (False, False, True, False)} if REAL else {}),
}  # fmt: skip
X = torch.linspace(-1, 1, 4 * 3 * 8).double().view(4, 3, 8).sin()  # [sequence, batch, features]


def layers() -> tuple[Any, Any, Any]:
    if not REAL:
        import megatron_stand_in

        megatron_stand_in.install()
        return (
            megatron_stand_in.ColumnParallelLinear, megatron_stand_in.RowParallelLinear,
            megatron_stand_in.TransformerConfig,
        )  # fmt: skip
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not torch.cuda.is_available():  # where Megatron makes what it gathers
        torch.cuda.current_device = lambda: torch.device("cpu")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(2)
    return tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear, TransformerConfig


class Parallel(nn.Module):
    def __init__(self, gathers: bool, skips: bool, sequence: bool) -> None:
        super().__init__()
        column, row, settings = layers()
        self.config = config = settings(
            **SETTINGS, sequence_parallel=sequence, tensor_model_parallel_size=2, params_dtype=torch.float64
        )  # fmt: skip
        options = {"config": config, "init_method": nn.init.xavier_normal_}
        self.up = column(8, 12, bias=True, gather_output=gathers, skip_bias_add=skips, **options)
        self.down = row(12, 8, bias=True, input_is_parallel=not gathers, skip_bias_add=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        y, bias = self.up(x)
        return self.down(torch.tanh(y if bias is None else y + bias))[0]


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def part(tensor: Tensor, dim: int | None) -> Tensor:
    return tensor if dim is None else tensor.chunk(2, dim)[dist.get_rank()]


DIMS = {"up.lora_B": 0, "down.lora_A": 1}  # what is split of an adapter


def dim_of(key: str) -> int | None:
    return next((dim for name, dim in DIMS.items() if name in key), None)


def run(gathers: bool, skips: bool, sequence: bool, as_dict: bool) -> dict[str, Any]:
    torch.manual_seed(3)
    model, dense = Parallel(gathers, skips, sequence), Dense().double()
    with torch.no_grad():
        for p in dense.parameters():
            p.normal_()
        for name, dim in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1), ("down.bias", None)):
            model.get_parameter(name).copy_(part(dense.get_parameter(name), dim))
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"]}
    settings = {**SETTINGS, "tensor_model_parallel_size": 2} if as_dict else model.config
    torch.manual_seed(7)
    plain = fastpeft.get_peft_model(dense, fastpeft.LoraConfig(**options))
    torch.manual_seed(7 + dist.get_rank())  # processes need not draw alike
    dtype = model.config.params_dtype
    config = fastpeft.LoraConfig(**options, megatron_config=settings, megatron_core="megatron.core")
    model = fastpeft.get_peft_model(model, config)
    assert model.base_model.model.config.params_dtype is dtype
    base = model.base_model.model
    column, row, _ = layers()
    found: dict[str, Any] = {
        "classes": [
            type(base.up.lora_A["default"]) is nn.Linear, isinstance(base.up.lora_B["default"], column),
            isinstance(base.down.lora_A["default"], row), type(base.down.lora_B["default"]) is nn.Linear,
        ],
    }  # fmt: skip
    ours, theirs = fastpeft.get_peft_model_state_dict(model), fastpeft.get_peft_model_state_dict(plain)
    found["start"] = {k: (ours[k].clone(), part(t, dim_of(k)).clone()) for k, t in theirs.items()}
    values = {k: torch.randn(t.shape, generator=torch.Generator().manual_seed(9)).double() for k, t in theirs.items()}
    fastpeft.set_peft_model_state_dict(plain, values)
    fastpeft.set_peft_model_state_dict(model, {k: part(t, dim_of(k)) for k, t in values.items()})
    x, own = X.clone().requires_grad_(), X.clone().requires_grad_()
    wanted = plain(x)
    wanted.square().sum().backward()
    given = own.chunk(2)[dist.get_rank()] if sequence else own
    y = model(given)
    y.square().sum().backward()
    found["output"] = y.detach(), (wanted.chunk(2)[dist.get_rank()] if sequence else wanted).detach()
    if sequence:  # Megatron's training adds up the gradients of what it finds marked
        dist.all_reduce(own.grad)
        for p in model.parameters():
            if p.grad is not None and getattr(p, "sequence_parallel", False) and dim_of_parameter(model, p) is None:
                dist.all_reduce(p.grad)
    found["x"] = own.grad, x.grad
    whole = dict(plain.named_parameters())
    found["grads"] = {
        n: (p.grad, part(whole[n].grad, dim_of(n))) for n, p in model.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        model.merge_adapter()
        plain.merge_adapter()
        found["merged"] = model(given), (plain(X).chunk(2)[dist.get_rank()] if sequence else plain(X))
        model.unmerge_adapter()
        with model.disable_adapter(), plain.disable_adapter():
            plain.unmerge_adapter()
            found["base"] = model(given), (plain(X).chunk(2)[dist.get_rank()] if sequence else plain(X))
    found["keys"] = sorted(ours) == sorted(theirs)
    return found


def dim_of_parameter(model: nn.Module, parameter: nn.Parameter) -> int | None:
    return next(dim_of(n) for n, p in model.named_parameters() if p is parameter)


def refused() -> list[str]:
    config = layers()[2](**SETTINGS, tensor_model_parallel_size=2)
    options: dict[str, Any] = {"target_modules": ["up"], "megatron_config": config}
    found = []
    for make in (
        lambda: fastpeft.get_peft_model(Parallel(False, False, False), fastpeft.LoraConfig(target_modules=["up"])),
        lambda: fastpeft.get_peft_model(Parallel(False, False, False), fastpeft.LoraConfig(**options, lora_bias=True)),
        lambda: fastpeft.get_peft_model(Parallel(False, False, False), fastpeft.LoraConfig(**options)).eval()(
            X, adapter_names=["default"] * 4),
        lambda: fastpeft.get_peft_model(Parallel(False, False, False), fastpeft.LoraConfig(
            target_modules=["up"], megatron_config=SETTINGS)).save_pretrained("nowhere"),
    ):  # fmt: skip
        try:
            make()
            found.append("nothing was refused")
        except ValueError as error:
            found.append(str(error))
    return found


def pefts_error() -> str:
    """PEFT's error with one of Megatron's layers."""
    import peft

    model = Parallel(False, False, False)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up"], megatron_config=model.config)
    try:
        peft.get_peft_model(model, config)(X.float())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def everything() -> dict[str, Any]:
    """In a process of a group of two."""
    return {**{name: run(*case) for name, case in CASES.items()}, "refused": refused()}
